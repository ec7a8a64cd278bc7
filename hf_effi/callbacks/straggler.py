"""`StragglerCallback`: says which process the others wait for."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..functional import metrics
from ..functional.schedules._checks import check_number
from ..functional.stragglers import StragglerReport, find_straggler
from ._engines import sharding_engine
from ._turns import WRITE, TurnCallback, in_turn
from .observer import describe, only_observes
from .owners import Role
from .probing import in_probe

logger = logging.getLogger(__name__)

#: updates of one report at most; older ones are left out, so that the collective stays small
_MOST = 256


class StragglerCallback(TurnCallback):
    """
    Measures how long each process computes in an update, before it waits for the others, and names the slowest one.

    The time runs from the begin of the update to its last gradient: DDP waits for the other processes after that. It
    is taken by one hook on the parameter whose gradient comes last, which the first update tells, with a monotonic
    clock on the CPU and with events on a GPU. Nothing is synchronised in an update. At every `every_logs`-th log the
    times are gathered, in one collective of at most 256 numbers for each process, and the log gets
    `effi/straggler/ratio`, `rank`, `persistence` and `waiting_fraction`, so that trackers and the run record have
    them. There is a warning where one process is slower than the mean by more than `ratio`, in at least `persistence`
    of the updates.

    What a process waits for inside of the forward counts as its own time and hides a slow one: the gathered rewards of
    GRPO, and the buffers of the model (any model with rotary positions has some), which DDP sends at the begin of a
    forward unless `ddp_broadcast_buffers=False`. There is a warning about the second when training begins.

    Args:
        every_logs (`int`, *optional*, defaults to 1): Logs between two reports, at least 1.
        ratio (`float`, *optional*, defaults to 1.15): Slowest over mean above which there is a warning, at least 1.
        persistence (`float`, *optional*, defaults to 0.5): Share of the updates in which it must be the slowest, in
            `[0, 1]`.
        say (`Callable`, *optional*): Takes the warning; the log without.

    Attributes:
        reports (`list[StragglerReport]`): Of this training, oldest first.

    It only observes: with one process, and under FSDP, DeepSpeed and tensor parallelism, which wait in every layer, it
    says that it measures nothing, and the run goes on.

    Raises:
        ValueError: an argument out of range.

    Example:
    ```python
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[StragglerCallback(every_logs=5)])
    trainer.train()  # torchrun --nproc-per-node 8
    ```
    """

    role = Role("stragglers", "Two callbacks time the processes", "Keep one.")
    in_recipe = False

    def __init__(
        self,
        every_logs: int = 1,
        ratio: float = 1.15,
        persistence: float = 0.5,
        say: Callable[[str], None] | None = None,
    ) -> None:
        if isinstance(every_logs, bool) or not isinstance(every_logs, int) or every_logs < 1:
            raise ValueError(f"every_logs={every_logs!r} must be an integer of at least 1.")
        check_number("ratio", ratio, 1.0, float("inf"))
        check_number("persistence", persistence, 0.0, 1.0)
        self.every_logs, self.ratio, self.persistence = every_logs, ratio, persistence
        self.say = logger.warning if say is None else say
        self.reports: list[StragglerReport] = []
        self._forget()

    def _forget(self) -> None:
        self._hooks: list[Any] = []
        self._last: int | None = None
        self._from: Any = None
        self._to: Any = None
        self._spans: list[tuple[Any, Any]] = []
        self._logs = self._updates = 0

    # ---- events ----

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self._let_go()
        self._forget()
        self.reports = []
        if args.world_size < 2:
            return self._measure_nothing("it compares processes, and there is one")
        if (engine := sharding_engine(args)) is not None:
            return self._measure_nothing(
                f"{engine} lets the processes wait for each other in every layer, so that the time before the wait is "
                "not the own time of a process; it works with DDP"
            )
        if args.ddp_broadcast_buffers is not False and next(kwargs["model"].buffers(), None) is not None:
            if state.is_world_process_zero:
                logger.warning(
                    "StragglerCallback: DDP sends the buffers of the model at the begin of a forward, and a process "
                    "that waits there seems to compute. Set ddp_broadcast_buffers=False in the training arguments, "
                    "unless training changes buffers (batch norm), or a slow process may stay unnamed."
                )
        self._device = args.device
        self._parameters = [p for p in kwargs["model"].parameters() if p.requires_grad]
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._noting(number))
            for number, parameter in enumerate(self._parameters)
        ]

    def _noting(self, number: int) -> Callable[[torch.Tensor], None]:
        def note_last_gradient(parameter: torch.Tensor) -> None:
            self._last, self._to = number, self._now()

        return note_last_gradient

    @only_observes
    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_step_begin(args, state, control, **kwargs)
        if self._hooks:
            self._from, self._to = self._now(), None

    @only_observes
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._hooks:
            return
        if len(self._hooks) > 1 and self._last is not None:
            # From now on one hook is enough.
            self._let_go()
            last = self._parameters[self._last]
            self._hooks = [last.register_post_accumulate_grad_hook(self._noting(self._last))]
        self._updates += 1
        # The first update ran all hooks, and is left out. One without this gradient, as of an expert that no token
        # went to, still counts: every process gathers as many.
        if self._updates > 1 and not in_probe(state, 1):
            self._spans.append((self._from, self._to))

    @in_turn(WRITE)
    @only_observes
    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "loss" not in logs:
            return
        self._logs += 1
        if self._logs % self.every_logs or not self._spans:
            return
        spans, self._spans = self._spans[-_MOST:], []
        report = find_straggler(self._gathered(args, [self._seconds(*span) for span in spans]))
        self.reports.append(report)
        found = {
            metrics.STRAGGLER_RATIO: report.ratio,
            metrics.STRAGGLER_RANK: float(report.rank),
            metrics.STRAGGLER_PERSISTENCE: report.persistence,
            metrics.STRAGGLER_WAITING: report.waiting_fraction,
        }
        logs.update(found)
        state.log_history[-1].update(found)
        if args.process_index == 0 and report.is_straggling(self.ratio, self.persistence):
            self.say(
                f"Process {report.rank} takes {report.ratio:.2f} times the mean of all {args.world_size} processes, "
                f"and was the slowest in {report.persistence:.0%} of the last {report.updates} updates. The others "
                f"wait for it {report.waiting_fraction:.0%} of the time of all. Look at its device (clock, "
                "temperature, other jobs), or at the lengths of the rows that it gets."
            )

    @only_observes
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._let_go()

    # ---- helpers ----

    def stop_observing(self, error: Exception) -> None:
        """Let go of the model, and say why: what only observes ends no run."""
        self._measure_nothing(describe(error))

    def _measure_nothing(self, why: str) -> None:
        self._let_go()
        self._spans = []
        logger.warning(f"StragglerCallback measures nothing, and the run goes on: {why}.")

    def _let_go(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, first: Any, last: Any) -> float:
        """Return the seconds of a span; the device has long passed its events when a log is written."""
        if last is None:
            return 0.0
        if isinstance(first, float):
            return last - first
        last.synchronize()
        return first.elapsed_time(last) / 1000

    def _gathered(self, args: TrainingArguments, mine: list[float]) -> list[list[float]]:
        own = torch.tensor(mine, dtype=torch.float32, device=args.device)
        every = [torch.empty_like(own) for _ in range(args.world_size)]
        torch.distributed.all_gather(every, own)
        return [row.tolist() for row in every]
