"""`ScheduleMixin`: lets any Trainer take a schedule of this package from its config."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from ...callbacks.lr_schedule import LRScheduleCallback, check_arguments, check_scheduler, note_optimizer
from ...errors import RefusedError
from ...functional.schedules import Schedule, make_schedule
from ...functional.schedules.base import check_choice


@dataclass
class ScheduleArguments:
    """
    Fields that a config class gains.

    Args:
        lr_schedule (`str`, *optional*): Name of a schedule, for example `"wsd"`; `None` leaves the Trainer as it is.
        lr_schedule_kwargs (`dict` or `str`, *optional*): Its arguments, as a dict or as JSON.
        lr_schedule_on_mismatch (`str`, *optional*, defaults to `"error"`): What to do on resume when the checkpoint
            was trained with another schedule, length or learning rate: `"error"`, `"stored"` or `"new"`.
    """

    lr_schedule: str | None = field(
        default=None, metadata={"help": "Name of an hf_effi schedule, e.g. 'wsd'. None: the Trainer's own scheduler."}
    )
    lr_schedule_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Arguments of the schedule, as a dict or as JSON."}
    )
    lr_schedule_on_mismatch: str = field(
        default="error", metadata={"help": "On resume with another schedule: 'error', 'stored' or 'new'."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # of TrainingArguments
        schedule_from_config(self)  # raises on what cannot act, before a model is loaded


def schedule_from_config(args: Any) -> Schedule | None:
    """
    Build the schedule that a config names.

    Raises:
        ValueError: unknown name or argument, arguments without a name, or text that is not JSON.
        RefusedError: a second way to set the LR in the same config.
    """
    if not hasattr(args, "lr_schedule"):
        return None  # a plain config of the stock trainer
    name, kwargs = args.lr_schedule, args.lr_schedule_kwargs
    check_choice("lr_schedule_on_mismatch", args.lr_schedule_on_mismatch, ("error", "stored", "new"))
    if name is None:
        if kwargs:
            raise ValueError(f"lr_schedule_kwargs={kwargs!r} needs lr_schedule, e.g. lr_schedule='wsd'.")
        if args.lr_schedule_on_mismatch != "error":
            raise ValueError(
                f"lr_schedule_on_mismatch={args.lr_schedule_on_mismatch!r} needs lr_schedule, e.g. lr_schedule='wsd'."
            )
        return None
    if isinstance(kwargs, str):
        try:
            kwargs = json.loads(kwargs)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"lr_schedule_kwargs={kwargs!r} is not JSON ({error}). Write e.g. '{{\"warmup_steps\": 100}}'."
            ) from error
    if kwargs is not None and not isinstance(kwargs, dict):
        raise ValueError(f"lr_schedule_kwargs={kwargs!r} must be a dict or a JSON object.")
    schedule = make_schedule(name, **(kwargs or {}))
    if schedule.needs_counter:
        raise ValueError(f"lr_schedule={name!r} needs a token counter. Use LRScheduleCallback(..., counter=...).")
    check_arguments(args, f"lr_schedule={name!r}")
    # With such a section DeepSpeed never asks the Trainer for a scheduler, and lr_schedule would be ignored.
    deepspeed = getattr(getattr(args, "hf_deepspeed_config", None), "config", None) or {}
    if section := deepspeed.get("scheduler"):
        raise RefusedError(
            f"DeepSpeed owns the LR scheduler ({section.get('type')}). Remove the 'scheduler' section from the "
            f"DeepSpeed config to use lr_schedule={name!r}."
        )
    return schedule


class ConfigSchedule(LRScheduleCallback):
    """The [`LRScheduleCallback`] that `lr_schedule=` of a config is."""

    in_recipe = False
    name, option = "lr_schedule in the config", "lr_schedule_on_mismatch"


class FollowedLR(LambdaLR):
    """
    The scheduler that a [`ConfigSchedule`] takes over. Until then it is constant.

    In place of it earlier versions had one that kept the schedule in `scheduler.pt`; such a file is read, and its
    content handed over as `earlier`.
    """

    __slots__ = ("earlier",)  # no attribute: those go into `state_dict`

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.earlier: dict[str, Any] | None = None
        super().__init__(optimizer, lambda step: 1.0)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the progress, also of a file of an earlier version."""
        if "built" not in state_dict:
            super().load_state_dict(state_dict)
            return
        known = {name: state_dict[name] for name in ("base_lrs", "last_epoch", "_step_count", "_last_lr")}
        super().load_state_dict({**known, "lr_lambdas": [None] * len(self.lr_lambdas)})
        self.earlier = {"built": state_dict["built"], "current": state_dict["schedule"]}


class ScheduleMixin:
    """
    Makes `args.lr_schedule` what the Trainer follows, by a [`LRScheduleCallback`] of its own: one contract, one state
    in the checkpoint, and the same errors as with the callback. Put it before the Trainer class.

    With `lr_schedule=None` nothing changes.

    Attributes:
        lr_schedule ([`LRScheduleCallback`]): The callback, for example for `start_decay`; `None` where the config
            names no schedule.
    """

    lr_schedule: LRScheduleCallback | None = None
    #: The Trainer's, which takes any scheduler.
    lr_scheduler: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self._sync_schedule() is not None and self.lr_scheduler is not None:
            raise RefusedError(
                "`optimizers` brings a scheduler and lr_schedule names another. Pass (optimizer, None)."
            )
        note_optimizer(self.optimizer)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        made = self.lr_scheduler is None
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if self._sync_schedule() is not None and made:
            check_scheduler(scheduler, f"lr_schedule={self.args.lr_schedule!r}")
            scheduler = self.lr_scheduler = FollowedLR(scheduler.optimizer)
        return scheduler

    def _sync_schedule(self) -> LRScheduleCallback | None:
        """Let the callback be the one that the config names now; a search over hyperparameters changes the config."""
        schedule = schedule_from_config(self.args)
        callbacks = self.callback_handler.callbacks
        if schedule is None:
            if self.lr_schedule in callbacks:
                callbacks.remove(self.lr_schedule)
            self.lr_schedule = None
            return None
        if self.lr_schedule is None:
            # DeepSpeed makes its scheduler with a shallow copy of the trainer, which has the same list.
            made = (callback for callback in callbacks if isinstance(callback, ConfigSchedule))
            self.lr_schedule = next(made, None) or ConfigSchedule(schedule)
        self.lr_schedule.built, self.lr_schedule.on_mismatch = schedule, self.args.lr_schedule_on_mismatch
        if self.lr_schedule not in callbacks:
            callbacks.insert(0, self.lr_schedule)  # before the callbacks that read the LR
        return self.lr_schedule
