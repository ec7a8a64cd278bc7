"""What a run follows, as its checkpoint tells it, and which of two runs a resumed one follows."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import BrokenFileError, MismatchError
from ._checks import check_choice
from .base import OnMismatch, Schedule, describe_difference, reconcile, same_schedule

#: of the dict that `Followed.state_dict` returns; earlier versions had none
SCHEMA = 1


@dataclass(frozen=True)
class Followed:
    """
    Everything that the LR of a run comes from. Each update has `base_lrs[group] * current(finished updates)`.

    It records what was *applied*, also where a resumed run was asked for something else and went on with the stored
    values.

    Args:
        built (`Schedule`): The schedule as it was built, bound to the length of the run.
        current (`Schedule`): The one that is followed: `built`, or `built` with a decay that was started or a
            batch size that was changed.
        base_lrs (`tuple[float, ...]`): LR of each parameter group at multiplier 1.
        learning_rate (`float`, *optional*): `learning_rate` of the training arguments that `base_lrs` belong to;
            `None` outside of a Trainer.
        optimizer_lrs (`tuple[float, ...]`, *optional*): LRs that an optimizer of the user brought; `None` where the
            Trainer made the optimizer from `learning_rate`.
        run_steps (`int`, *optional*): Updates of the run.
        decay_asked_at (`int`, *optional*): Finished updates when `start_decay` was called.
    """

    built: Schedule
    current: Schedule
    base_lrs: tuple[float, ...]
    learning_rate: float | None = None
    optimizer_lrs: tuple[float, ...] | None = None
    run_steps: int | None = None
    decay_asked_at: int | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return JSON data, which [`~Followed.from_state`] reads."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        lists = {name: list(found[name]) for name in ("base_lrs", "optimizer_lrs") if found[name] is not None}
        return {"schema": SCHEMA, **found, "built": self.built.spec(), "current": self.current.spec(), **lists}

    @classmethod
    def from_state(cls, state: dict[str, Any], prefer: Sequence[type[Schedule]] = (), **missing: Any) -> Followed:
        """
        Read what a checkpoint holds, also of earlier versions.

        Args:
            state (`dict`): Of [`~Followed.state_dict`]. Other keys are left alone.
            prefer (`Sequence[type[Schedule]]`, *optional*): See [`~Schedule.from_spec`].
            missing: Fields for a state of an earlier version, which had fewer; ignored where the state has a schema.

        Raises:
            BrokenFileError: a later schema.
            ValueError: a schedule that is not defined here.
        """
        schema = state.get("schema")
        if schema not in (None, SCHEMA):
            raise BrokenFileError(
                f"The checkpoint holds a learning-rate schedule of schema {schema}, this version reads {SCHEMA}. "
                "Resume with the version of hf_effi that wrote it."
            )
        names = {field.name for field in dataclasses.fields(cls)}
        values = {name: value for name, value in state.items() if name in names}
        if schema is None:
            values |= missing
        for name in ("built", "current"):
            values[name] = Schedule.from_spec(values[name], prefer)
        for name in ("base_lrs", "optimizer_lrs"):
            if values.get(name) is not None:
                values[name] = tuple(float(lr) for lr in values[name])
        values.setdefault("run_steps", values["built"].total_steps)
        return cls(**values)


def settle(
    stored: Followed,
    asked: Followed,
    on_mismatch: OnMismatch = "error",
    *,
    step: int = 0,
    allow_lr_jump: bool = False,
) -> Followed:
    """
    Decide what a resumed run follows: the one contract of every way to give a schedule to a run.

    Schedule, length of the run, `learning_rate` and the LRs of an optimizer that was passed are compared with what the
    checkpoint says was applied. Without a difference the run goes on as stored. Otherwise:

    - `"error"` raises and names every difference.
    - `"stored"` goes on exactly as stored, and records that.
    - `"new"` has, from this update on, the LRs asked for times the new schedule: those of an optimizer that was
      passed, otherwise the stored ones in proportion to `learning_rate`, so that groups keep their ratios.

    Args:
        stored ([`Followed`]): Of the checkpoint.
        asked ([`Followed`]): Of this run, as a fresh one.
        on_mismatch (`str`, *optional*, defaults to `"error"`): `"error"`, `"stored"` or `"new"`.
        step (`int`, *optional*, defaults to 0): Finished updates.
        allow_lr_jump (`bool`, *optional*, defaults to `False`): See [`reconcile`].

    Raises:
        MismatchError: `"error"` and a difference; `"stored"` and a run that goes on after the stored schedule
            has ended at 0; `"new"` and a schedule that lifts a decaying LR; another number of parameter groups.

    Example:
    ```python
    >>> from hf_effi.functional.schedules import linear
    >>> old = Followed(linear(10), linear(10), (0.5, 0.1), learning_rate=0.5)
    >>> new = Followed(linear(10), linear(10), (0.25, 0.25), learning_rate=0.25)
    >>> settle(old, new, "stored").base_lrs, settle(old, new, "new").base_lrs
    ((0.5, 0.1), (0.25, 0.05))
    ```
    """
    check_choice("on_mismatch", on_mismatch, ("error", "stored", "new"))
    if len(stored.base_lrs) != len(asked.base_lrs):
        raise MismatchError(
            f"The checkpoint has LRs of {len(stored.base_lrs)} parameter groups, the optimizer has "
            f"{len(asked.base_lrs)}. Build the same groups, or start a new run from the weights."
        )
    found = _differences(stored, asked)
    if not found:
        known = {name: getattr(asked, name) for name in ("learning_rate", "optimizer_lrs", "run_steps")}
        return dataclasses.replace(stored, **{name: value for name, value in known.items() if value is not None})
    if on_mismatch == "error":
        raise MismatchError(
            f"The checkpoint was trained with {', and with '.join(found)}. Pass on_mismatch='stored' to go on with "
            "the checkpoint's, or on_mismatch='new' to train with this run's from here on (lr_schedule_on_mismatch "
            "in a config)."
        )
    if on_mismatch == "stored":
        _check_end(stored, asked.run_steps, step)
        return dataclasses.replace(stored, run_steps=asked.run_steps)
    return _switch(stored, asked, step, allow_lr_jump)


def _other_lrs(stored: Followed, asked: Followed) -> tuple[float, ...] | None:
    """Return the LRs of the optimizer that was passed, where they are not those that the stored LRs came from."""
    return None if asked.optimizer_lrs == (stored.optimizer_lrs or stored.base_lrs) else asked.optimizer_lrs


def _differences(stored: Followed, asked: Followed) -> list[str]:
    found = []
    if not same_schedule(stored.built, asked.built):
        found.append(f"another schedule ({describe_difference(stored.built, asked.built)})")
    elif None not in (stored.run_steps, asked.run_steps) and stored.run_steps != asked.run_steps:
        found.append(f"{stored.run_steps} updates, this run has {asked.run_steps}")
    if None not in (stored.learning_rate, asked.learning_rate) and stored.learning_rate != asked.learning_rate:
        found.append(
            f"learning_rate={stored.learning_rate}, this run has {asked.learning_rate}, which the Trainer alone would "
            "ignore"
        )
    if (other := _other_lrs(stored, asked)) is not None:
        before = stored.optimizer_lrs or stored.base_lrs
        found.append(f"an optimizer of LRs {list(before)}, this one has {list(other)}")
    return found


def _check_end(stored: Followed, run_steps: int | None, step: int) -> None:
    end = stored.current.last_step
    if run_steps is None or end is None or run_steps <= end or stored.decay_asked_at is not None:
        return
    if stored.current._multiplier(end) > 0:
        return  # it says what comes after its end
    raise MismatchError(
        f"on_mismatch='stored' goes on with {type(stored.current).__name__}, which ends at update {end} with an LR of "
        f"0, and the run has {run_steps}: {run_steps - max(end, step)} updates would change nothing. Train to update "
        f"{end}, "
        f"or pass on_mismatch='new' with a schedule for {run_steps} updates, such as extend_to(schedule, {run_steps}, "
        f"at={step})."
    )


def _switch(stored: Followed, asked: Followed, step: int, allow_lr_jump: bool) -> Followed:
    current, decay = stored.current, stored.decay_asked_at
    if not same_schedule(stored.built, asked.built):
        current, decay = reconcile(current, asked.built, "new", step=step, allow_lr_jump=allow_lr_jump), None
    base_lrs, old, new = stored.base_lrs, stored.learning_rate, asked.learning_rate
    if (other := _other_lrs(stored, asked)) is not None:
        base_lrs = other
    elif old is not None and new is not None and old != new:
        # Equal to the last digit where a group simply has the learning rate.
        base_lrs = tuple(new if lr == old else lr * (new / old) for lr in base_lrs)
    return dataclasses.replace(asked, current=current, base_lrs=base_lrs, decay_asked_at=decay)


def check_storable(schedule: Schedule) -> None:
    """
    Check that a checkpoint can hold the schedule and give it back, before the first update.

    Raises:
        ValueError: a field is no JSON, or the class cannot be built again from its fields.
    """
    cls, spec = type(schedule), schedule.spec()
    for name, value in spec["params"].items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            raise ValueError(
                f"{cls.__name__} cannot be stored in a checkpoint: {name}={value!r} is no JSON. Keep numbers, texts, "
                "lists and schedules in its fields, and compute the rest from them."
            ) from None
    end = schedule.last_step or schedule.total_steps or 1
    sampled = (0, min(1, end), end // 3, end // 2, end)
    values = [schedule._multiplier(t) for t in sampled]
    try:
        again = Schedule.from_spec(json.loads(json.dumps(spec)), classes_in(schedule))
        equal = [again._multiplier(t) for t in sampled] == values
    except Exception as error:
        raise ValueError(
            f"{cls.__name__} cannot be stored in a checkpoint: building it again from its dataclass fields fails "
            f"({error}). Decorate the class with @dataclass(frozen=True) and give every argument a field."
        ) from error
    if not equal:
        raise ValueError(
            f"{cls.__name__} cannot be stored in a checkpoint: built again from its dataclass fields it has other "
            "values. Decorate the class with @dataclass(frozen=True) and give every argument a field."
        )


def classes_in(value: Any) -> tuple[type[Schedule], ...]:
    """Return the class of a schedule and of the schedules in its fields."""
    if isinstance(value, (list, tuple)):
        return tuple(cls for item in value for cls in classes_in(item))
    if not isinstance(value, Schedule):
        return ()
    inner = (getattr(value, field.name) for field in dataclasses.fields(value))
    return (type(value), *classes_in(tuple(inner)))
