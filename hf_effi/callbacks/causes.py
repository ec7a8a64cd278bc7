"""`CausesCallback`: every so many updates, read what a run's troubles come from, and put it into the log."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..checkpoint.run_folder import calling_trainer
from ..errors import RefusedError
from ..functional import metrics
from ..functional.causes import Outliers, join_outliers
from ..optim.layer_parts import LayerWeight, layer_modules, layer_weights
from ._cause_reading import (
    ClipWatch,
    LayerWatch,
    WeightGradient,
    gradient_metrics,
    outlier_metrics,
    read_gradients,
    read_weight_norms,
    weight_metrics,
)
from ._engines import is_fsdp2, sharding_engine
from ._outside import outside
from ._turns import MEASURE, WRITE, TurnCallback, in_turn
from .cause_parts import CauseMoment, CausePart, measure_part
from .observer import describe, only_observes
from .owners import Role
from .probing import in_probe, trained_steps
from .straggler import StragglerCallback

logger = logging.getLogger(__name__)
STATE_KEY = "hf_effi.causes"
#: numbers for each layer that the ranks exchange: what `count_outliers` returns
_COUNTS = 5


class CausesCallback(TurnCallback):
    """
    Every `every_steps` updates, read the gradients of each layer before clipping, outliers of the hidden states behind
    it, and the norms of its weights; with several processes also which one the others wait for. What is found goes
    into the next log entry under `effi/causes/`, so that trackers, the run record, the report and [`TrainDoctor`] have
    it, which has rules for it.

    It only observes: weights, optimizer, schedule and random numbers are those of the run without it, to the bit.
    Between the probed updates nothing is hooked. What fails ends the observation with a warning, and the run goes on.

    Args:
        every_steps (`int`, *optional*, defaults to 50): Updates between two readings, at least 1. The first update is
            read, then every `every_steps`-th after it; updates that a search tries and undoes do not count.
        gradients (`bool`, *optional*, defaults to `True`): Norm of each layer and part, and the largest singular value
            by two power steps.
        outliers (`bool`, *optional*, defaults to `True`): Excess kurtosis, `max |x| / median |x|` and massive tokens.
        weight_norms (`bool`, *optional*, defaults to `True`): `|W| / |W_0|` of each layer, with `W_0` the weights that
            training began with; the checkpoint keeps their norms.
        stragglers (`bool`, *optional*, defaults to `True`): With several processes and no sharding, what
            [`StragglerCallback`] reports, unless the Trainer has one of its own.
        parts (`Sequence[CausePart]`, *optional*): More things to measure: see [`CausePart`].

    Attributes:
        latest (`dict[str, float]`): What the last reading of this training gave, by the names of the log.
        gradients_read (`list[WeightGradient]`): The gradients of single weights in it.

    Raises:
        ValueError: an argument out of range, or nothing to measure.
        RefusedError: DeepSpeed, FSDP 1 or tensor parallelism, whose gradients and weights are in parts that one rank
            cannot read; `outliers` under `torch_compile`.

    Example:
    ```python
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[CausesCallback(), TrainDoctor()])
    trainer.train()
    ```
    """

    role = Role("causes", "Two callbacks read the causes of one run", "Keep one.")
    in_recipe = False

    def __init__(
        self,
        every_steps: int = 50,
        *,
        gradients: bool = True,
        outliers: bool = True,
        weight_norms: bool = True,
        stragglers: bool = True,
        parts: Sequence[CausePart] = (),
    ) -> None:
        if isinstance(every_steps, bool) or not isinstance(every_steps, int) or every_steps < 1:
            raise ValueError(f"every_steps={every_steps!r} must be an integer of at least 1.")
        switches = {
            "gradients": gradients, "outliers": outliers, "weight_norms": weight_norms, "stragglers": stragglers
        }  # fmt: skip
        for name, value in switches.items():
            if not isinstance(value, bool):
                raise ValueError(f"{name}={value!r} must be True or False.")
        if not isinstance(parts, (list, tuple)) or not all(isinstance(part, CausePart) for part in parts):
            raise ValueError(f"parts={parts!r} must be a list of objects with due(step) and measure(moment).")
        if not parts and not any(switches.values()):
            raise ValueError("Everything is switched off and parts is empty. Leave CausesCallback out.")
        self.every_steps, self.parts = every_steps, tuple(parts)
        self.gradients, self.outliers, self.weight_norms = gradients, outliers, weight_norms
        self.stragglers = stragglers
        self._clip: ClipWatch | None = None
        self._layers: LayerWatch | None = None
        self._straggler: StragglerCallback | None = None
        self._forget()

    def _forget(self) -> None:
        self.latest: dict[str, float] = {}
        self.gradients_read: list[WeightGradient] = []
        self._weights: list[LayerWeight] = []
        self._reference: dict[str, float] = {}
        self._pending: dict[str, float] = {}
        self._due = False
        #: what went wrong on this process, and whether all of them have stopped for it
        self._error: Exception | None = None
        self._is_over = False

    # ---- events ----

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self._let_go()
        self._forget()
        self._check_run(args)
        for part in self.parts:
            if callable(check := getattr(part, "check", None)):
                check(args, kwargs["model"])
        self._straggler = self._timer(args, state)
        if self._straggler is not None:
            self._straggler.on_train_begin(args, state, control, **kwargs)
        self._begin(state, kwargs["model"])

    @only_observes
    def _begin(self, state: TrainerState, model: torch.nn.Module) -> None:
        self._weights = layer_weights(model)
        stored = state.stateful_callbacks.get(STATE_KEY) if state.global_step else None
        now = read_weight_norms(self._weights) if self.weight_norms else {}
        if stored is not None and not _is_readable(stored):
            logger.warning("The checkpoint holds nothing of CausesCallback that can be read: it begins anew.")
            stored = None
        if stored is not None:
            self._pending = dict(stored["pending"])
            now |= {name: norm for name, norm in stored["reference"].items() if name in now}
        self._reference = now
        self._store(state)

    def _check_run(self, args: TrainingArguments) -> None:
        engine = sharding_engine(args)
        if engine is not None and not is_fsdp2():
            raise RefusedError(
                f"CausesCallback reads whole gradients and weights, and {engine} keeps them in parts that it cannot "
                "reach. Train with DDP, FSDP2 or on one device."
            )
        if args.torch_compile and self.outliers:
            raise RefusedError(
                "CausesCallback hooks layers in the probed updates, and a compiled model does not run hooks. Set "
                "torch_compile=False, or pass outliers=False."
            )

    def _timer(self, args: TrainingArguments, state: TrainerState) -> StragglerCallback | None:
        if not self.stragglers or args.world_size < 2 or sharding_engine(args) is not None:
            return None
        others = getattr(getattr(calling_trainer(state), "callback_handler", None), "callbacks", [])
        return None if any(isinstance(other, StragglerCallback) for other in others) else StragglerCallback()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_step_begin(args, state, control, **kwargs)
        if self._straggler is not None:
            self._straggler.on_step_begin(args, state, control, **kwargs)
        self._due = not self._is_over and not in_probe(state, 1) and trained_steps(state) % self.every_steps == 0
        if not self._is_over and not in_probe(state, 1):
            with outside(state):
                self._look(args, state, **kwargs)

    @only_observes
    def _look(self, args: TrainingArguments, state: TrainerState, **kwargs: Any) -> None:
        step = trained_steps(state)
        due = [part for part in self.parts if part.due(step)]
        if not due and not self._due:
            return
        trainer = calling_trainer(state)
        moment = CauseMoment(
            step, args, state, kwargs["model"], kwargs.get("optimizer"), kwargs.get("lr_scheduler"), trainer
        )
        found: dict[str, float] = {}
        for part in due:
            found |= measure_part(part, moment)
        if found:
            self._add(state, found)
        if self._due and self.gradients:
            if trainer is None:
                raise RefusedError("the Trainer that clips the gradients did not call; pass gradients=False")
            self._clip = ClipWatch(trainer.accelerator)
        if self._due and self.outliers:
            self._layers = LayerWatch(kwargs["model"])

    @in_turn(MEASURE)
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._straggler is not None:
            self._straggler.on_pre_optimizer_step(args, state, control, **kwargs)
        if self._due:
            self._due = False
            self._read(args, state)
            # On every rank, whatever happened on this one: nobody waits for a rank that has stopped.
            self._exchange(args, state, kwargs["model"])
            self._let_go()

    @only_observes
    def _read(self, args: TrainingArguments, state: TrainerState) -> None:
        if self._error is not None:
            return
        found: dict[str, float] = {}
        if self._clip is not None:
            self._clip.close()
            if args.max_grad_norm and not self._clip.seen:
                raise RefusedError("the gradients were clipped without accelerate; pass gradients=False")
            self.gradients_read = read_gradients(self._weights, self._clip.factor())
            found |= gradient_metrics(self.gradients_read)
        if self.weight_norms:
            found |= weight_metrics(self._weights, read_weight_norms(self._weights), self._reference)
        if self._layers is not None and self._layers.error is not None:
            raise self._layers.error
        self._add(state, found)

    def _exchange(self, args: TrainingArguments, state: TrainerState, model: torch.nn.Module) -> None:
        """Join the outliers of all ranks, and whether one of them has failed. One collective."""
        layers = self._layers
        own = [0.0 if self._error is None else 1.0]
        if self.outliers:
            size = len(layer_modules(model) if layers is None else layers.layers)
            rows = layers.take() if layers is not None and self._error is None else [[0.0] * _COUNTS] * size
            own += [number for row in rows for number in row]
        every = self._gathered(args, own)
        if any(rank[0] for rank in every):
            self._is_over = True
            if self._error is None:
                self.stop_observing(RuntimeError("another process could not read the causes"))
            return
        if layers is None:
            return self._add(state, {metrics.CAUSE_UPDATE: float(state.global_step + 1)})
        found: dict[str, Outliers] = {}
        for number, label in enumerate(layers.layers):
            first = 1 + _COUNTS * number
            found[label] = join_outliers([rank[first : first + _COUNTS] for rank in every])
        self._add(state, {**outlier_metrics(found), metrics.CAUSE_UPDATE: float(state.global_step + 1)})

    @in_turn(WRITE)
    @only_observes
    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._straggler is not None:
            self._straggler.on_log(args, state, control, **kwargs)
        # Of an update, or of the end, where the last reading had no log entry after it.
        if self._pending and ("loss" in kwargs["logs"] or "train_runtime" in kwargs["logs"]):
            kwargs["logs"].update(self._pending)
            state.log_history[-1].update(self._pending)
            self._pending = {}
            self._store(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._straggler is not None:
            self._straggler.on_train_end(args, state, control, **kwargs)
        self._let_go()

    # ---- helpers ----

    def _add(self, state: TrainerState, found: dict[str, float]) -> None:
        """Keep what was found for the next log; a later reading of the same name is the one that is logged."""
        finite = {name: value for name, value in found.items() if math.isfinite(value)}
        self.latest |= finite
        self._pending |= finite
        self._store(state)

    def _store(self, state: TrainerState) -> None:
        state.stateful_callbacks[STATE_KEY] = {"reference": dict(self._reference), "pending": dict(self._pending)}

    def stop_observing(self, error: Exception) -> None:
        """Let go of the model, and say why: what only observes ends no run."""
        self._let_go()
        if self._error is None:
            logger.warning(f"CausesCallback reads nothing more, and the run goes on: {describe(error)}")
        self._error = error

    def _let_go(self) -> None:
        if self._clip is not None:
            self._clip.close()
        if self._layers is not None:
            self._layers.close()
        self._clip = self._layers = None

    def _gathered(self, args: TrainingArguments, mine: list[float]) -> list[list[float]]:
        if args.world_size < 2:
            return [mine]
        own = torch.tensor(mine, dtype=torch.float32, device=args.device)
        every = [torch.empty_like(own) for _ in range(args.world_size)]
        torch.distributed.all_gather(every, own)
        return [rank.tolist() for rank in every]


def _is_readable(stored: Any) -> bool:
    """Whether a checkpoint holds what [`CausesCallback`] has put there."""
    if not isinstance(stored, dict) or set(stored) != {"reference", "pending"}:
        return False
    return all(
        isinstance(part, dict)
        and all(isinstance(name, str) and isinstance(value, (int, float)) for name, value in part.items())
        for part in stored.values()
    )
