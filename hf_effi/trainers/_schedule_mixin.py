"""`ScheduleMixin`: lets any Trainer take a schedule of this package from its config."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import torch

from ..callbacks.lr_schedule import check_arguments
from ..functional.schedules import Schedule, ScheduleError, ScheduleLR, make_schedule
from ..functional.schedules.base import check_choice


@dataclass
class ScheduleArguments:
    """
    Fields that a config class gains.

    Args:
        lr_schedule (`str`, *optional*): Name of a schedule, for example `"wsd"`; `None` leaves the Trainer as it is.
        lr_schedule_kwargs (`dict` or `str`, *optional*): Its arguments, as a dict or as JSON.
        lr_schedule_on_mismatch (`str`, *optional*, defaults to `"error"`): What to do on resume when the checkpoint
            holds another schedule: `"error"`, `"stored"` or `"new"`.
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
        ScheduleError: unknown name or argument, arguments without a name, text that is not JSON, or a second way to
            set the LR in the same config.
    """
    if not hasattr(args, "lr_schedule"):
        return None  # a plain config of the stock trainer
    name, kwargs = args.lr_schedule, args.lr_schedule_kwargs
    check_choice("lr_schedule_on_mismatch", args.lr_schedule_on_mismatch, ("error", "stored", "new"))
    if name is None:
        if kwargs:
            raise ScheduleError(f"lr_schedule_kwargs={kwargs!r} needs lr_schedule, e.g. lr_schedule='wsd'.")
        if args.lr_schedule_on_mismatch != "error":
            raise ScheduleError(
                f"lr_schedule_on_mismatch={args.lr_schedule_on_mismatch!r} needs lr_schedule, e.g. lr_schedule='wsd'."
            )
        return None
    if isinstance(kwargs, str):
        try:
            kwargs = json.loads(kwargs)
        except json.JSONDecodeError as error:
            raise ScheduleError(
                f"lr_schedule_kwargs={kwargs!r} is not JSON ({error}). Write e.g. '{{\"warmup_steps\": 100}}'."
            ) from error
    if kwargs is not None and not isinstance(kwargs, dict):
        raise ScheduleError(f"lr_schedule_kwargs={kwargs!r} must be a dict or a JSON object.")
    schedule = make_schedule(name, **(kwargs or {}))
    if schedule.needs_counter:
        raise ScheduleError(f"lr_schedule={name!r} needs a token counter. Use LRScheduleCallback(..., counter=...).")
    check_arguments(args)
    # With such a section DeepSpeed never asks the Trainer for a scheduler, and lr_schedule would be ignored.
    deepspeed = getattr(getattr(args, "hf_deepspeed_config", None), "config", None) or {}
    if section := deepspeed.get("scheduler"):
        raise ScheduleError(
            f"DeepSpeed owns the LR scheduler ({section.get('type')}). Remove the 'scheduler' section from the "
            f"DeepSpeed config to use lr_schedule={name!r}."
        )
    return schedule


class ScheduleMixin:
    """
    Overrides `create_scheduler` so that `args.lr_schedule` is what the Trainer follows. Put it before the Trainer class.

    The scheduler is a [`ScheduleLR`]: it stores the schedule in `scheduler.pt` and compares it on resume. With
    `lr_schedule=None` nothing changes.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        schedule = schedule_from_config(self.args)
        if schedule is not None and self.lr_scheduler is not None:
            raise ScheduleError(
                "`optimizers` brings a scheduler and lr_schedule names another. Pass (optimizer, None)."
            )

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        schedule = schedule_from_config(self.args)
        if schedule is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        optimizer = self.optimizer if optimizer is None else optimizer
        self.lr_scheduler = ScheduleLR(optimizer, schedule.bind(num_training_steps), self.args.lr_schedule_on_mismatch)
        # Without the mark a second train() would go on with the exhausted scheduler.
        self._created_lr_scheduler = True
        return self.lr_scheduler
