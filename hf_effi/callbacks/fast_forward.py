"""`FastForwardCallback`: tells whether the learning rate is too low, by going on along an update that was made."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import Subset
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..checkpoint.run_folder import calling_trainer
from ..checkpoint.snapshot import restore_rng, take_rng
from ..errors import RefusedError
from ..functional import metrics
from ..functional.fast_forward import learning_rate_is_low, place_on_ray, typical, walk_while_falling
from ..functional.kept_arguments import keeps_arguments
from ..functional.options import refuse_idle
from ..functional.probes import probing_model
from ._lr_search import same_on_ranks, validation_loss
from ._turns import MEASURE, WRITE, TurnCallback, in_turn
from .adaptive_lr import refuse_sharded
from .observer import describe
from .owners import Role
from .probing import outside_probes, trained_steps

logger = logging.getLogger(__name__)
STATE_KEY = "hf_effi.fast_forward"


class FastForwardCallback(TurnCallback):
    """
    Every `every_steps` updates, repeat the last update on a copy of the weights while the loss on a few fixed rows
    falls, and report how often that was (`tau*`). Where each of `patience` walks is longer than `limit`, it says that
    the learning rate is too low.

    It is a diagnosis: weights, optimizer, schedule and random numbers are those of the run without it, to the bit. The
    method that it comes from (Fast Forward, 2409.04206) keeps the repeated steps, which in our
    measurements only makes up for a learning rate that is too low: raise that instead.

    Args:
        every_steps (`int`, *optional*, defaults to 25): Updates between two walks, at least 1. Paper: 6, to train by.
        rows (`int`, *optional*, defaults to 32): Rows of the Trainer's `eval_dataset`, its first ones. Paper: 32.
        longest (`int`, *optional*, defaults to 16): Repetitions at most, and above `limit`. A walk costs `tau* + 2`
            forwards of the rows at most.
        limit (`int`, *optional*, defaults to 5): Repetitions that are still normal, at least 1; ours.
        patience (`int`, *optional*, defaults to 3): Walks in a row that must be longer, at least 1; ours.
        evaluate (`Callable[[Module], float]`, *optional*): Returns the loss of a model in evaluation mode, always on
            the same rows; instead of those of `eval_dataset`.

    Attributes:
        walks (`list[tuple[int, int]]`): Update and `tau*` of each walk so far; also kept over a resume.

    Where the loss of the rows cannot be had in a run, it says so once, and the run goes on without walks.

    Raises:
        ValueError: an argument out of range.
        RefusedError: DeepSpeed, FSDP or tensor parallelism; or no `evaluate` and no single `eval_dataset` with a
            length.

    Example:
    ```python
    diagnosis = FastForwardCallback()
    Trainer(model, args, train_dataset=rows, eval_dataset=held_out, callbacks=[diagnosis]).train()
    print(diagnosis.walks)
    ```
    """

    role = Role("fast forward", "Two callbacks want to walk along the updates", "Keep one.")

    @keeps_arguments
    def __init__(
        self,
        every_steps: int = 25,
        *,
        rows: int = 32,
        longest: int = 16,
        limit: int = 5,
        patience: int = 3,
        evaluate: Callable[[torch.nn.Module], float] | None = None,
    ) -> None:
        least = {"every_steps": every_steps, "rows": rows, "longest": longest, "limit": limit, "patience": patience}
        for name, value in least.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r} must be an integer of at least 1.")
        if longest <= limit:
            raise ValueError(f"longest={longest!r} must be above limit={limit!r}: no walk could be longer than that.")
        if evaluate is not None and not callable(evaluate):
            raise ValueError(f"evaluate={evaluate!r} is not a function. Pass one from a model to its loss, or None.")
        refuse_idle("rows", rows, 32, acts=evaluate is None, needs="without evaluate=")
        self.every_steps, self.rows, self.longest = every_steps, rows, longest
        self.limit, self.patience = limit, patience
        self._evaluate = evaluate
        self._loss: Callable[[torch.nn.Module], float] | None = None
        self._before: dict[str, torch.Tensor] = {}
        self._said = self._is_new = False
        self.walks: list[tuple[int, int]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        refuse_sharded(args, "FastForwardCallback")
        stored = state.stateful_callbacks.get(STATE_KEY, {}) if state.global_step else {}
        try:
            self.walks = [(int(step), int(steps)) for step, steps in stored.get("walks", [])]
        except (AttributeError, TypeError, ValueError):
            logger.warning("The checkpoint holds no walks of FastForwardCallback that can be read: it begins anew.")
            self.walks = []
        self._before, self._is_new = {}, False
        self._said = self._is_low()
        self._loss = self._evaluate or _loss_on_rows(calling_trainer(state), self.rows)

    @outside_probes
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._loss is not None and (trained_steps(state) + 1) % self.every_steps == 0:
            self._before = {name: weight.clone() for name, weight in _trainable(kwargs["model"]).items()}

    @in_turn(MEASURE)
    @outside_probes
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._before:
            return
        before, self._before = self._before, {}
        model = kwargs["model"]
        live = _trainable(model)
        start = {name: weight.clone() for name, weight in live.items()}
        source: Any = self._loss
        failed: Exception | None = None

        def loss_after(steps: int) -> float:
            nonlocal failed
            place_on_ray(live, start, before, steps)
            try:
                loss = validation_loss(source, model, args.device)
            except Exception as error:  # whatever the loss of somebody's model raises
                loss, failed = math.nan, error
            # The same number on every process, so that all of them take the same steps.
            return same_on_ranks(loss, args.device)

        try:
            with probing_model(model):
                steps, losses = walk_while_falling(loss_after, self.longest)
        finally:
            place_on_ray(live, start, before, 0)
        if not math.isfinite(losses[0]):  # on every process, so that all of them stop
            self.stop_observing(failed or ValueError(f"the loss of the rows is {losses[0]}"))
            return
        self.walks.append((state.global_step + 1, steps))
        self._is_new = True
        state.stateful_callbacks[STATE_KEY] = {"walks": [list(walk) for walk in self.walks]}
        self._say(args)

    @in_turn(WRITE)
    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_log(args, state, control, **kwargs)
        if self._is_new and "loss" in kwargs["logs"]:
            self._is_new = False
            steps = float(self.walks[-1][1])
            kwargs["logs"][metrics.FAST_FORWARD_STEPS] = state.log_history[-1][metrics.FAST_FORWARD_STEPS] = steps

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._loss, self._before = None, {}

    def stop_observing(self, error: Exception) -> None:
        """Say that there are no more walks: what only observes ends no run."""
        self._loss = None
        logger.warning(f"FastForwardCallback stopped its walks, and the run goes on: {describe(error)}")

    @property
    def typical_steps(self) -> float:
        """The median of `tau*` over all walks, 0 before the first."""
        return typical(steps for _, steps in self.walks)

    def _is_low(self) -> bool:
        return learning_rate_is_low([steps for _, steps in self.walks], self.limit, self.patience)

    def _say(self, args: TrainingArguments) -> None:
        low = self._is_low()
        if low and not self._said and args.process_index == 0:
            step, steps = self.walks[-1]
            more = " or more" if steps == self.longest else ""
            logger.warning(
                "Update %d: the last %d walks went on for more than %d updates in the direction of one (this one for "
                "%d%s), and the loss kept falling: raise the learning rate.",
                step,
                self.patience,
                self.limit,
                steps,
                more,
            )
        self._said = low


def _trainable(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}


def _loss_on_rows(trainer: Any, rows: int) -> Callable[[torch.nn.Module], float]:
    """Return the mean loss on the first rows of a Trainer's eval dataset, which are read at the first call."""
    dataset = getattr(trainer, "eval_dataset", None)
    if dataset is None or isinstance(dataset, dict) or not hasattr(dataset, "__len__"):
        found = "none" if dataset is None else "a dictionary" if isinstance(dataset, dict) else "one without a length"
        raise RefusedError(
            f"FastForwardCallback needs one eval_dataset with a length, the Trainer has {found}. Pass eval_dataset= "
            "to the Trainer, or evaluate= to FastForwardCallback."
        )
    if not len(dataset):
        raise RefusedError("The Trainer's eval_dataset is empty. Pass at least one row, or evaluate=function.")
    batches: list[Any] = []

    def loss(model: torch.nn.Module) -> float:
        if not batches:
            count = range(min(rows, len(dataset)))
            first = dataset.select(count) if hasattr(dataset, "select") else Subset(dataset, count)
            rng = take_rng()
            batches.extend(trainer.get_eval_dataloader(first))
            restore_rng(rng)
        losses = []
        for batch in batches:
            found, _, _ = trainer.prediction_step(model, batch, prediction_loss_only=True)
            if found is None:
                raise RefusedError("An eval batch gives no loss. Put labels in the eval dataset, or pass evaluate=.")
            losses.append(float(found.mean()))
        return sum(losses) / len(losses)

    return loss
