"""`RewindCallback`: back to a copy in memory where a loss is not finite or spikes, and on with other data."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..checkpoint.capture import replaced
from ..checkpoint.memory_snapshot import MemorySnapshot
from ..checkpoint.run_folder import calling_trainer
from ..errors import RefusedError
from ..functional import metrics
from ..functional.kept_arguments import keeps_arguments
from ..functional.spikes import is_spike
from ._engines import sharding_engine
from ._turns import WRITE, TurnCallback, in_turn
from .owners import Role
from .probing import in_probe

logger = logging.getLogger(__name__)

#: `(loss, losses of the updates before) -> whether to rewind`
Rule = Callable[[float, Sequence[float]], bool]
#: key of the state in `TrainerState.stateful_callbacks`
KEY = "hf_effi.rewind"
#: share of the time that snapshots may take before it is said
_SHARE = 0.05


class RewindCallback(TurnCallback):
    """
    Goes back to a copy in host memory where an update would break the run, and on with the data after it.

    Every `every_steps` updates it copies trainable weights, optimizer, scheduler and random numbers into host memory
    ([`MemorySnapshot`]). Before each optimizer step the loss of the update, averaged over the processes, and the norm
    of its gradient are looked at. Where the rule says so, on all processes alike, the update is not made and the copy
    is put back to the bit. The data of the updates since the copy is not trained on again, as in the training of PaLM
    (2204.02311, section 5.1), where a spike did not come back with other data.

    `global_step` counts on: it says how much data was passed, and a checkpoint resumes at the right place. The LR
    scheduler goes back with the weights. The run is then the one that never saw these updates' data: same weights to
    the bit, where nothing depends on `global_step` or on the data's place in the run.

    Formula of `"spike"`: `0.6745 (x - median) / max(MAD, 0.001 |median|) > threshold`, over the last `window` losses
    ([`~hf_effi.functional.spikes.is_spike`]).

    Args:
        rewind_on (`str` or `Callable`, *optional*, defaults to `"nan"`): `"nan"`: the loss or the norm of the gradient
            is not finite. `"spike"`: that, or the loss is a spike. A function `(loss, losses before) -> bool` decides
            by itself on finite losses; it must be a function of its arguments, since every process calls it.
        every_steps (`int`, *optional*, defaults to 50): Updates between two copies, at least 1. A rewind loses that
            many updates at most.
        skip_batches (`int`, *optional*, defaults to 0): Further updates whose data is passed over after a rewind. PaLM
            passed over 200 to 500 batches.
        max_rewinds (`int`, *optional*, defaults to 10): How many a run may have, at least 1.
        window (`int`, *optional*, defaults to 100): Losses that a spike is compared with, at least `least`.
        threshold (`float`, *optional*, defaults to 6.0): Of the robust z-score, above 0.
        least (`int`, *optional*, defaults to 20): Losses without which only a loss that is not finite counts.

    Raises:
        ValueError: an argument out of range.
        RefusedError: sharded weights (FSDP, DeepSpeed, tensor parallelism); `fp16`, whose loss scaler leaves out such
            updates by itself; no host memory for a copy; one more rewind than `max_rewinds`.

    Example:
    ```python
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[RewindCallback("spike", every_steps=100)])
    trainer.train()
    ```
    """

    role = Role("rewind", "Two callbacks want to rewind the run", "Keep one.")

    @keeps_arguments
    def __init__(
        self,
        rewind_on: str | Rule = "nan",
        every_steps: int = 50,
        skip_batches: int = 0,
        max_rewinds: int = 10,
        window: int = 100,
        threshold: float = 6.0,
        least: int = 20,
    ) -> None:
        if not callable(rewind_on) and rewind_on not in ("nan", "spike"):
            raise ValueError(f"rewind_on={rewind_on!r} is not 'nan', 'spike' or a function (loss, losses) -> bool.")
        for name, value, low in (
            ("every_steps", every_steps, 1),
            ("skip_batches", skip_batches, 0),
            ("max_rewinds", max_rewinds, 1),
            ("least", least, 1),
            ("window", window, least),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f"{name}={value!r} must be an integer of at least {low}.")
        if rewind_on != "spike" and (threshold, least) != (6.0, 20):
            raise ValueError("threshold and least act with rewind_on='spike' only. Leave them out.")
        is_spike(0.0, [0.0], threshold, least)  # checks the range
        self.rewind_on, self.every_steps, self.skip_batches = rewind_on, every_steps, skip_batches
        self.max_rewinds, self.window, self.threshold, self.least = max_rewinds, window, threshold, least
        self._undo: ExitStack | None = None
        self._forget()

    def _forget(self) -> None:
        self._snapshot: MemorySnapshot | None = None
        self._loss: torch.Tensor | None = None
        self._losses: list[float] = []
        self._losses_then: list[float] = []
        self._loss_sum: torch.Tensor | None = None
        self._accepted = self._left_to_skip = self.rewinds = self.skipped = 0
        self._void = False
        self._spent = 0.0
        self._began = 0.0
        self._has_told = False

    # ---- events ----

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if (engine := sharding_engine(args)) is not None:
            raise RefusedError(
                f"RewindCallback copies whole weights and optimizer states, which {engine} keeps in shards. Train "
                "with DDP or on one device, or resume from a checkpoint after a spike."
            )
        if args.fp16:
            raise RefusedError(
                "fp16 training leaves out updates whose gradient is not finite by itself, and scales the loss by what "
                "it finds. Use bf16=True, or drop RewindCallback."
            )
        trainer = calling_trainer(state)
        if trainer is None:
            raise RefusedError("RewindCallback was called by no Trainer, whose losses it looks at.")
        self._let_go()
        self._forget()
        stored = state.stateful_callbacks.get(KEY) if state.global_step > 0 else None
        if stored is not None:
            self.rewinds, self.skipped = int(stored["rewinds"]), int(stored["skipped"])
            self._left_to_skip = int(stored["left_to_skip"])
            self._losses = [float(loss) for loss in stored["losses"]]
        self._undo = ExitStack()
        self._undo.enter_context(replaced(trainer, "training_step", self._watching(trainer.training_step)))
        self._trainer = trainer

    def _watching(self, training_step: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def watched_training_step(*args: Any, **kwargs: Any) -> torch.Tensor:
            loss = training_step(*args, **kwargs)
            seen = loss.detach().float().mean()
            self._loss = seen if self._loss is None else self._loss + seen
            return loss

        return watched_training_step

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_step_begin(args, state, control, **kwargs)
        self._loss = None
        # The Trainer's sum for the next log, into which a loss that is not finite would go.
        self._loss_sum = self._trainer._tr_loss.clone()
        due = self._snapshot is None or self._accepted >= self.every_steps
        if due and not self._left_to_skip and not in_probe(state, 1):
            if self._snapshot is None:
                self._snapshot = MemorySnapshot(kwargs["model"], kwargs["optimizer"], kwargs["lr_scheduler"])
            self._snapshot.take(state.global_step)
            self._losses_then, self._accepted = list(self._losses), 0
            self._tell_of_cost(args)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._snapshot is None or in_probe(state, 1):
            return
        parameters = [p for p in kwargs["model"].parameters() if p.grad is not None]
        loss, norm = self._agreed(args, parameters)
        finite = math.isfinite(loss) and math.isfinite(norm)
        self._void = self._left_to_skip > 0 or not finite or self._says_so(loss)
        if not self._void:
            self._losses = [*self._losses, loss][-self.window :]
            self._accepted += 1
            return
        if self._left_to_skip:
            self._left_to_skip -= 1
        else:
            self._count_rewind(args, state, loss if finite or not math.isfinite(loss) else math.nan)
        for parameter in parameters:
            parameter.grad = None  # so that the optimizer's step leaves weights and states alone

    @in_turn(WRITE)
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._void:
            self._void = False
            self._snapshot.restore()
            self._losses, self._accepted = list(self._losses_then), 0
            self._trainer._tr_loss.copy_(self._loss_sum)
            # What is logged is the mean over the updates that were made.
            self._trainer._globalstep_last_logged += 1
        state.stateful_callbacks[KEY] = {
            "rewinds": self.rewinds,
            "skipped": self.skipped,
            "left_to_skip": self._left_to_skip,
            "losses": self._losses,
        }

    @in_turn(WRITE)
    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.rewinds and "loss" in kwargs["logs"]:
            found = {metrics.REWINDS: float(self.rewinds), metrics.REWIND_SKIPPED: float(self.skipped)}
            kwargs["logs"].update(found)
            state.log_history[-1].update(found)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._let_go()
        self._snapshot = None

    # ---- helpers ----

    def _let_go(self) -> None:
        if self._undo is not None:
            self._undo.close()
        self._undo = None

    def _agreed(self, args: TrainingArguments, parameters: Sequence[torch.nn.Parameter]) -> tuple[float, float]:
        """Return the loss of the update and the norm of its gradient, the same on every process: one collective."""
        norms = [p.grad.detach().float().norm() for p in parameters]
        norm = torch.stack([n.to(args.device) for n in norms]).norm() if norms else torch.zeros((), device=args.device)
        loss = torch.zeros((), device=args.device) if self._loss is None else self._loss.to(args.device)
        both = torch.stack([loss, norm])
        if args.world_size > 1:
            torch.distributed.all_reduce(both)
            both /= args.world_size
        found = both.tolist()
        return found[0], found[1]

    def _says_so(self, loss: float) -> bool:
        if self.rewind_on == "nan":
            return False
        if self.rewind_on == "spike":
            return is_spike(loss, self._losses, self.threshold, self.least) if self._losses else False
        return bool(self.rewind_on(loss, tuple(self._losses)))

    def _count_rewind(self, args: TrainingArguments, state: TrainerState, loss: float) -> None:
        update, since = state.global_step + 1, self._snapshot.step
        if self.rewinds == self.max_rewinds:
            raise RefusedError(
                f"Update {update} has the loss {loss:g}, and this run has been rewound max_rewinds={self.max_rewinds} "
                "times: the data does not explain it. Lower learning_rate or max_grad_norm, look at the data, or "
                "raise max_rewinds; then resume from a checkpoint."
            )
        self.rewinds += 1
        self.skipped += update - since + self.skip_batches
        self._left_to_skip = self.skip_batches
        if args.process_index == 0:
            logger.warning(
                "The loss of update %d is %g: back to the state after update %d. The data of %d updates is not "
                "trained on (rewind %d of %d at most).",
                update,
                loss,
                since,
                update - since + self.skip_batches,
                self.rewinds,
                self.max_rewinds,
            )

    def _tell_of_cost(self, args: TrainingArguments) -> None:
        first, self._spent = self._spent == 0.0, self._spent + self._snapshot.seconds
        if first:
            self._spent, self._began = 1e-9, time.perf_counter()  # the first one makes the memory
            return
        share = self._spent / max(time.perf_counter() - self._began, 1e-9)
        if share > _SHARE and not self._has_told and args.process_index == 0:
            self._has_told = True
            logger.warning(
                "Copies into memory take %.0f%% of the time with every_steps=%d. With every_steps=%d they would take "
                "5%%. Whether they pay beside checkpoints: measure_rewind(trainer).saved_seconds(...).",
                100 * share,
                self.every_steps,
                math.ceil(self.every_steps * share / _SHARE),
            )
