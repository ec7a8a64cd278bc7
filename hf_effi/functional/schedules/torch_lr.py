"""`to_lambda_lr`: a schedule as a torch scheduler, for loops without a Trainer."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from ...errors import DecayToZeroWarning, MismatchError, RefusedError
from ..options import refuse_idle
from ._checks import check_choice
from .base import OnMismatch, Schedule, start_decay
from .followed import Followed, check_storable, classes_in, settle


class ScheduleLR(LambdaLR):
    """
    A torch scheduler that follows a [`Schedule`] and stores it in its `state_dict`.

    Args:
        optimizer (`torch.optim.Optimizer`): Its groups' LRs are the base LRs.
        schedule (`Schedule`): Bound to the length of the run, or open-ended.
        on_mismatch (`str`, *optional*, defaults to `"error"`): What `load_state_dict` does when the checkpoint was
            trained with another schedule, length or LR: `"error"`, `"stored"` or `"new"`; see [`settle`].
        allow_lr_jump (`bool`, *optional*, defaults to `False`): Whether `"new"` may lift the LR of a decaying run.

    Raises:
        ValueError: not a schedule or optimizer, or a schedule of your own that a checkpoint cannot hold.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        on_mismatch: OnMismatch = "error",
        allow_lr_jump: bool = False,
    ) -> None:
        if not isinstance(schedule, Schedule):
            raise ValueError(f"schedule={schedule!r} is not a Schedule. Pass one of this package, e.g. wsd(1000).")
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ValueError(f"optimizer={optimizer!r} is not a torch.optim.Optimizer. Pass the run's optimizer.")
        check_choice("on_mismatch", on_mismatch, ("error", "stored", "new"))
        needs = "with on_mismatch='new'"
        refuse_idle("allow_lr_jump", allow_lr_jump, False, on_mismatch == "new", needs)
        self.schedule = schedule
        self.on_mismatch = on_mismatch
        self.allow_lr_jump = allow_lr_jump
        super().__init__(optimizer, lambda step: self.schedule(step))
        check_storable(schedule)
        apply_momentum(optimizer, schedule, self.last_epoch)
        lrs = tuple(float(lr) for lr in self.base_lrs)
        self._asked = Followed(schedule, schedule, lrs, optimizer_lrs=lrs, run_steps=schedule.total_steps)
        self._followed = self._asked

    @property
    def built(self) -> Schedule:
        """The schedule as it was built; after a resume with `"stored"` the checkpoint's."""
        return self._followed.built

    def step(self, epoch: int | None = None) -> None:
        """Go on to the next update."""
        super().step(epoch)
        apply_momentum(self.optimizer, self.schedule, self.last_epoch)

    def follow(self, schedule: Schedule) -> None:
        """Follow another schedule from the next update on."""
        self.schedule = schedule
        apply_multiplier(self, schedule(self.last_epoch))
        apply_momentum(self.optimizer, schedule, self.last_epoch)

    def start_decay(self, decay_steps: int | None = None, **kwargs: Any) -> None:
        """
        Start the decay of a WSD-like schedule with the next update; see `wsd.start_decay`.

        Raises:
            ValueError: the schedule has no decay to start, or the decay has begun.
        """
        self.follow(start_decay(self.schedule, self.last_epoch, decay_steps, **kwargs))
        self._followed = dataclasses.replace(self._followed, decay_asked_at=self.last_epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return progress and what is followed in plain containers, which `torch.load(weights_only=True)` accepts."""
        return {
            **dataclasses.replace(self._followed, current=self.schedule).state_dict(),
            "last_epoch": self.last_epoch,
            "_step_count": self._step_count,
            "_last_lr": [float(lr) for lr in self._last_lr],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """
        Restore progress; decide what is followed by `on_mismatch`; write the LR into the optimizer.

        Raises:
            MismatchError: not a state of this class, or see [`settle`].
        """
        if "built" not in state_dict:
            raise MismatchError(
                f"The state of the scheduler holds no schedule, only {', '.join(sorted(state_dict))}: it was written "
                "by another scheduler. Start a new one at its last_epoch, or load it into the scheduler that wrote it."
            )
        # Earlier versions called what is followed "schedule".
        state = {"current": state_dict.get("schedule"), **state_dict}
        stored, step = Followed.from_state(state, classes_in(self._asked.built)), state_dict["last_epoch"]
        found = settle(stored, self._asked, self.on_mismatch, step=step, allow_lr_jump=self.allow_lr_jump)
        self._followed, self.base_lrs = found, list(found.base_lrs)
        self.last_epoch = step
        self._step_count = state_dict["_step_count"]
        self.follow(found.current)


def apply_multiplier(scheduler: LambdaLR, multiplier: float) -> None:
    """Write `base_lr * multiplier` into every param group and into what the scheduler reports as its last LR."""
    lrs = [base * multiplier for base in scheduler.base_lrs]
    for group, lr in zip(scheduler.optimizer.param_groups, lrs, strict=True):
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
    scheduler._last_lr = lrs


def apply_momentum(optimizer: torch.optim.Optimizer, schedule: Schedule, step: float) -> None:
    """
    Write the momentum of a schedule that cycles it ([`one_cycle`]) into every param group.

    Raises:
        RefusedError: a group has neither `momentum` nor `betas`.
    """
    momentum = schedule.momentum(step) if hasattr(schedule, "momentum") else None
    if momentum is None:
        return
    for group in optimizer.param_groups:
        if "betas" in group:
            group["betas"] = (momentum, *group["betas"][1:])
        elif "momentum" in group:
            group["momentum"] = momentum
        else:
            raise RefusedError(
                f"{type(optimizer).__name__} has neither momentum nor betas to cycle. Pass momentum_low=None and "
                "momentum_high=None to the schedule."
            )


def final_lr_ratio(scheduler: Any, total_steps: int) -> float | None:
    """
    Return the LR after `total_steps` updates over the highest of the run, or `None` where no closed form says it.

    Args:
        scheduler: Any torch scheduler; a `LambdaLR`, which all of transformers' closed forms are, has an answer.
        total_steps (`int`): Updates of the run.

    Example:
    ```python
    >>> import torch
    >>> from hf_effi.functional.schedules import cosine, to_lambda_lr
    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    >>> round(final_lr_ratio(to_lambda_lr(cosine(100, floor=0.3), optimizer), 100), 6)
    0.3
    ```
    """
    if not isinstance(scheduler, LambdaLR):
        return None
    multiplier = scheduler.lr_lambdas[0]
    sampled = range(0, total_steps, max(1, total_steps // 100))
    peak = max((multiplier(step) for step in sampled), default=0.0)
    return multiplier(total_steps) / peak if peak > 0 else None


def warn_decay_to_zero(scheduler: Any, total_steps: int, why: str, limit: float = 0.1) -> None:
    """Warn with [`DecayToZeroWarning`] if the LR ends below `limit` of its peak; `why` ends the sentence."""
    ratio = final_lr_ratio(scheduler, total_steps)
    if ratio is not None and ratio < limit:
        warnings.warn(f"The LR ends at {ratio:.2g} of its peak, {why}", DecayToZeroWarning, stacklevel=2)


def to_lambda_lr(
    schedule: Schedule,
    optimizer: torch.optim.Optimizer,
    *,
    total_steps: int | None = None,
    on_mismatch: OnMismatch = "error",
    allow_lr_jump: bool = False,
) -> ScheduleLR:
    """
    Make a torch scheduler of a schedule: call `.step()` once per optimizer update.

    Args:
        schedule (`Schedule`): Any schedule of this package.
        optimizer (`torch.optim.Optimizer`): Multipliers apply to the LR each of its groups has now.
        total_steps (`int`, *optional*): Length of the run, where the schedule was built without it.
        on_mismatch, allow_lr_jump (*optional*): See [`ScheduleLR`].

    Example:
    ```python
    >>> import torch
    >>> from hf_effi.functional.schedules import linear, to_lambda_lr
    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    >>> scheduler = to_lambda_lr(linear(), optimizer, total_steps=4)
    >>> lrs = []
    >>> for _ in range(4):
    ...     lrs.append(optimizer.param_groups[0]["lr"])
    ...     optimizer.step()
    ...     scheduler.step()
    >>> lrs
    [0.5, 0.375, 0.25, 0.125]
    ```
    """
    if total_steps is not None and isinstance(schedule, Schedule):
        schedule = schedule.bind(total_steps)
    return ScheduleLR(optimizer, schedule, on_mismatch, allow_lr_jump)
