"""One owner for what multiplies the scheduled LR: each callback offers a named factor, and the product is written."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..functional import metrics
from ._turns import WRITE, TurnCallback, in_turn
from .owners import Role

#: before the name of a factor in the log
METRIC = metrics.LR_FACTOR
_ATTRIBUTE = "_hf_effi_lr_factors"


@dataclass
class _Offer:
    factor: Callable[[], float]
    lowest: float
    update: int


class LRFactors:
    """
    Writes `max(lowest, scheduled LR x product of all factors)` into the optimizer, once per update.

    A factor counts for the update it was offered for, so what a removed callback offered is gone with the next one.
    The scheduled LR is what the scheduler wrote last, whoever drives it. Factors are multiplied in the order of their
    names: the order of the callbacks changes no bit.

    Args:
        scheduler (`LambdaLR`): The Trainer's.
    """

    def __init__(self, scheduler: LambdaLR) -> None:
        self._scheduler = scheduler
        self._offers: dict[str, _Offer] = {}
        self._scheduled: list[float] = []
        self._written: list[float] | None = None
        #: the factors of the last update
        self.applied: dict[str, float] = {}

    @classmethod
    def of(cls, state: TrainerState, scheduler: LambdaLR) -> LRFactors:
        """
        Return the owner in one `train()`: an attribute of its state, which is saved by fields and so leaves it out.
        """
        if not hasattr(state, _ATTRIBUTE):
            setattr(state, _ATTRIBUTE, cls(scheduler))
        return getattr(state, _ATTRIBUTE)

    @staticmethod
    def known(state: TrainerState) -> tuple[str, ...]:
        """Return the names of the factors that were offered in one `train()` so far."""
        owner = getattr(state, _ATTRIBUTE, None)
        return () if owner is None else tuple(sorted(owner._offers))

    def offer(self, name: str, factor: Callable[[], float], update: int, lowest: float = 0.0) -> None:
        """Offer a factor for one update; it is asked for when the LR is written."""
        self._offers[name] = _Offer(factor, lowest, update)

    def write(self, update: int) -> None:
        """
        Write the LR of this update into every parameter group and into what the scheduler reports as its last LR.
        """
        scheduler = self._scheduler
        if scheduler._last_lr is not self._written:
            self._scheduled = [float(lr) for lr in scheduler._last_lr]
        offers = {name: offer for name, offer in sorted(self._offers.items()) if offer.update == update}
        self.applied = {name: offer.factor() for name, offer in offers.items()}
        factor, lowest = math.prod(self.applied.values()), max(offer.lowest for offer in offers.values())
        self._put([max(lowest, lr * factor) for lr in self._scheduled])

    def release(self) -> None:
        """Put the scheduled LR back where the scheduler has not stepped: fp16 training skipped the update."""
        scheduler = self._scheduler
        if scheduler._last_lr is self._written:
            self._put(self._scheduled)
            self._written = None

    def _put(self, lrs: list[float]) -> None:
        scheduler = self._scheduler
        for group, lr in zip(scheduler.optimizer.param_groups, lrs, strict=True):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        # What the Trainer logs as the LR of this update; a list of our own, by which we know it again.
        scheduler._last_lr = self._written = list(lrs)


class LRFactorCallback(TurnCallback):
    """A callback that multiplies the scheduled LR; `factor` is its name, in the log and among the others."""

    factor = ""

    @property
    def role(self) -> Role:
        """One factor of each name: a second one would share its entry in the checkpoint."""
        return Role(("LR factor", self.factor), "Two callbacks multiply the LR by one rule", "Keep one.")

    def multiplier(self, state: TrainerState, scheduler: LambdaLR) -> float:
        """Return what the scheduled LR of the update in progress is multiplied by."""
        raise NotImplementedError

    @property
    def lowest_lr(self) -> float:
        """The LR that is never gone below while this callback is there."""
        return 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_step_begin(args, state, control, **kwargs)
        scheduler = kwargs["lr_scheduler"]
        LRFactors.of(state, scheduler).offer(
            self.factor, lambda: self.multiplier(state, scheduler), state.global_step + 1, self.lowest_lr
        )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        LRFactors.of(state, kwargs["lr_scheduler"]).write(state.global_step + 1)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        LRFactors.of(state, kwargs["lr_scheduler"]).release()

    @in_turn(WRITE)
    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        value = LRFactors.of(state, kwargs["lr_scheduler"]).applied.get(self.factor)
        if value is not None and "learning_rate" in kwargs["logs"]:
            kwargs["logs"][METRIC + self.factor] = state.log_history[-1][METRIC + self.factor] = value
