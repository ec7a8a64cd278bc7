"""`Schedule`: a pure function `step -> multiplier of the base learning rate` that can be stored and compared."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, Self, runtime_checkable

from ...errors import BrokenFileError, MismatchError, PastEndWarning
from ..options import refuse_idle
from ._checks import check_choice, check_number, check_one_of, check_steps
from ._kinds import class_of, kind_of

OnMismatch = Literal["error", "stored", "new"]
DecayOffset = Literal["start", "end", "inside"]


@dataclass(frozen=True)
class Schedule:
    """
    A learning-rate schedule as a value: callable, immutable, comparable, and storable as JSON.

    `schedule(t)` is the multiplier of every parameter group's base LR for the update that follows `t` finished ones
    (0-based, as torch's `LambdaLR` counts). Change it by making another one: `bind`, `start_decay`, `replace`.

    Args:
        total_steps (`int`, *optional*): Optimizer updates of the whole run. `None` leaves it to whoever runs the
            schedule, see [`~Schedule.bind`].

    Example:
    ```python
    >>> from hf_effi.functional.schedules import linear, Schedule
    >>> schedule = linear(4)
    >>> [schedule(t) for t in range(5)]
    [1.0, 0.75, 0.5, 0.25, 0.0]
    >>> Schedule.from_spec(schedule.spec()) == schedule
    True
    ```
    """

    total_steps: int | None = None

    #: learning rates of the source are absolute; the optimizer's LR must equal `reference_lr`
    absolute: ClassVar[bool] = False
    #: the argument of `__call__` is progress in equivalent steps, which a token counter has to supply
    needs_counter: ClassVar[bool] = False
    # Whether this one has warned of its end. No field: it is no argument, and two schedules are equal without it.
    _warned: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if isinstance(self.total_steps, (Schedule, str, list, tuple, dict)):
            others = [f.name for f in dataclasses.fields(self) if f.name != "total_steps"]
            raise ValueError(
                f"total_steps={self.total_steps!r} is not allowed: the first argument of {type(self).__name__} is the "
                f"number of updates, a whole number >= 1; leave it out to have it inferred. Pass by name: "
                f"{', '.join(others)}."
            )
        if self.total_steps is not None:
            check_steps("total_steps", self.total_steps, 1, "Leave it out to have it inferred.")
        object.__setattr__(self, "_warned", False)
        self._check()

    def _check(self) -> None:
        """Validate fields; called once, on construction."""

    def _multiplier(self, t: float) -> float:
        raise NotImplementedError

    @property
    def last_step(self) -> int | None:
        """Step from which the value no longer changes by plan, or `None` where there is no end."""
        return self.total_steps

    def __call__(self, step: float) -> float:
        try:
            bad = step != step or step < 0 or step == math.inf
        except TypeError:
            bad = True
        if bad:
            raise ValueError(f"step={step!r} is not allowed: it counts finished updates and is a number >= 0.")
        end = self.last_step
        if end is not None and step > end:
            if not self._warned:
                object.__setattr__(self, "_warned", True)
                warnings.warn(
                    f"{type(self).__name__} was asked for step {step}, but it ends at step {end}: the multiplier "
                    f"stays at {self._multiplier(end):g}. Build it for more steps, or see extend_to.",
                    PastEndWarning,
                    stacklevel=2,
                )
            step = end
        return float(self._multiplier(step))

    def trace(self, steps: int | None = None) -> list[float]:
        """Return the multipliers of updates 1..`steps` (default: of the whole run)."""
        return [self(t) for t in range(self._total() if steps is None else steps)]

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some arguments changed."""
        return dataclasses.replace(self, **changes)

    def bind(self, total_steps: int) -> Self:
        """
        Return the schedule for a run of `total_steps` updates.

        Raises:
            ValueError: the schedule was built for another number of updates.
        """
        if self.total_steps is None:
            return self.replace(total_steps=total_steps)
        if self.total_steps != total_steps:
            raise ValueError(
                f"{type(self).__name__} was built for total_steps={self.total_steps}, but the run has {total_steps} "
                "updates. Leave total_steps out of the schedule to have it inferred, or change max_steps / "
                "num_train_epochs of the run."
            )
        return self

    def spec(self) -> dict[str, Any]:
        """
        Return a JSON dict from which [`~Schedule.from_spec`] builds an equal schedule.

        One of ours is named by its name, a class of your own by its import path, `"my_module:MySchedule"`.
        """
        params = {}
        for field in dataclasses.fields(self):
            params[field.name] = _to_json(getattr(self, field.name))
        return {"kind": kind_of(type(self)), "params": params}

    @staticmethod
    def from_spec(spec: dict[str, Any], prefer: Sequence[type[Schedule]] = ()) -> Schedule:
        """
        Build the schedule that [`~Schedule.spec`] described.

        No module is imported for it: a class of your own must exist already.

        Args:
            spec (`dict`): What [`~Schedule.spec`] returned.
            prefer (`Sequence[type[Schedule]]`, *optional*): Classes of your own that are meant where several have the
                path that the spec names, as after a notebook cell that was run twice.

        Raises:
            ValueError: unknown kind or parameter, or several classes of your own with this name.
        """
        return _build(spec, prefer, own=True)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint has to hold. A schedule has no state besides its arguments."""
        return self.spec()

    def _total(self) -> int:
        if self.total_steps is None:
            raise ValueError(
                f"{type(self).__name__} does not know the length of the run. Pass total_steps=..., call "
                ".bind(total_steps), or give it to LRScheduleCallback, which reads it from the Trainer."
            )
        return self.total_steps


@runtime_checkable
class StartsDecay(Protocol):
    """A schedule whose decay begins when it is asked to, as those of [`wsd`], [`infinite`] and [`scale`]."""

    def start_decay(self, at: int, decay_steps: int | None = None, **kwargs: Any) -> Schedule:
        """Return the schedule that decays from update `at` on, over `decay_steps` updates."""
        ...


def start_decay(schedule: Schedule, at: int, decay_steps: int | None = None, **kwargs: Any) -> Schedule:
    """
    Return `schedule` with its decay started; see `wsd.start_decay`.

    Raises:
        ValueError: it has no decay to start, or the decay has begun before `at`.
    """
    if not isinstance(schedule, StartsDecay):
        raise ValueError(f"{type(schedule).__name__} has no decay to start. Use wsd, wsdc or infinite.")
    return schedule.start_decay(at, decay_steps, **kwargs)


def _to_json(value: Any) -> Any:
    if isinstance(value, Schedule):
        return value.spec()
    if isinstance(value, (list, tuple)):
        return [_to_json(item) for item in value]
    return value


def _build(spec: dict[str, Any], prefer: Sequence[type[Schedule]], own: bool) -> Schedule:
    kind, params = spec.get("kind"), spec.get("params", {})
    if not isinstance(kind, str) or not isinstance(params, dict):
        raise BrokenFileError(
            f"A stored schedule has a name as its 'kind' and a mapping as its 'params', not {repr(kind)[:80]} and "
            f"{type(params).__name__}: the file that it is from is damaged."
        )
    cls = class_of(kind, Schedule, prefer, own)
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := sorted(set(params) - known):
        raise ValueError(f"{kind} has no argument {', '.join(unknown)[:200]}. It has: {', '.join(sorted(known))}.")
    try:
        return cls(**{name: _from_json(value, prefer, own) for name, value in params.items()})
    except (TypeError, ValueError, OverflowError) as error:
        if isinstance(error, ValueError) and len(str(error)) < 1000:  # a schedule's own sentence
            raise
        raise ValueError(f"{kind} does not take its stored arguments: {' '.join(str(error).split())[:300]}") from error


def _from_json(value: Any, prefer: Sequence[type[Schedule]], own: bool) -> Any:
    if isinstance(value, dict) and "kind" in value:
        return _build(value, prefer, own)
    if isinstance(value, list):
        return tuple(_from_json(item, prefer, own) for item in value)
    return value


def make_schedule(name: str, **kwargs: Any) -> Schedule:
    """
    Build a schedule of this package from scalars, as they stand in a config file or a card.

    Args:
        name (`str`): Name of the schedule, for example `"wsd"`. Never a class of a user, whatever it is called.
        kwargs: Its arguments.

    Raises:
        ValueError: unknown name, unknown argument or bad value.

    Example:
    ```python
    >>> make_schedule("wsd", warmup_steps=2, decay_fraction=0.5, shape="linear").bind(6).trace()
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    ```
    """
    return _build({"kind": name, "params": kwargs}, (), own=False)


def same_schedule(one: Schedule, other: Schedule) -> bool:
    """Return whether two schedules have the same arguments."""
    return json.dumps(one.spec(), sort_keys=True) == json.dumps(other.spec(), sort_keys=True)


def describe_difference(stored: Schedule, new: Schedule) -> str:
    """Return the arguments in which two schedules differ, as `name: stored -> new`."""
    one, other = stored.spec(), new.spec()
    if one["kind"] != other["kind"]:
        return f"{one['kind']} -> {other['kind']}"
    names = [name for name in one["params"] if one["params"][name] != other["params"].get(name)]
    return ", ".join(f"{name}: {one['params'][name]!r} -> {other['params'][name]!r}" for name in names)


def reconcile(
    stored: Schedule, new: Schedule, on_mismatch: OnMismatch = "error", *, step: int = 0, allow_lr_jump: bool = False
) -> Schedule:
    """
    Decide which schedule a resumed run follows.

    Args:
        stored (`Schedule`): The one in the checkpoint.
        new (`Schedule`): The one this run was started with.
        on_mismatch (`str`, *optional*, defaults to `"error"`): `"error"` refuses a difference, `"stored"` goes on
            with the checkpoint's schedule, `"new"` takes the new one.
        step (`int`, *optional*, defaults to 0): Finished updates.
        allow_lr_jump (`bool`, *optional*, defaults to `False`): Whether the new schedule may lift the LR of a run
            that is already decaying.

    Raises:
        MismatchError: they differ and `on_mismatch="error"`, or the new one would lift a decaying LR.

    Example:
    ```python
    >>> from hf_effi.functional.schedules import wsd
    >>> old, new = wsd(100, warmup_steps=0), wsd(200, warmup_steps=0)
    >>> reconcile(old, new, "new", step=60).decay_begin
    160
    ```
    """
    check_choice("on_mismatch", on_mismatch, ("error", "stored", "new"))
    if same_schedule(stored, new):
        return stored
    if on_mismatch == "stored":
        return stored
    if on_mismatch == "error":
        raise MismatchError(
            f"The checkpoint was trained with another schedule ({describe_difference(stored, new)}). "
            "Pass on_mismatch='stored' to go on with the checkpoint's, or on_mismatch='new' to switch."
        )
    if step > 0 and not allow_lr_jump:
        now, before, lifted = stored._multiplier(step), stored._multiplier(step - 1), new._multiplier(step)
        if now < before and lifted > before * (1 + 1e-9):
            raise MismatchError(
                f"The run is decaying (multiplier {now:g} at step {step}), and the new schedule would lift it to "
                f"{lifted:g}. Resume from a checkpoint before the decay, use extend_to, or pass allow_lr_jump=True."
            )
    return new


@dataclass(frozen=True)
class _Warm(Schedule):
    """
    Shared by every schedule that starts with a linear warm-up.

    Args:
        warmup_steps (`int`, *optional*): Updates of warm-up.
        warmup_fraction (`float`, *optional*): The same as a fraction of the run. Neither: no warm-up.
        warmup_start (`float`, *optional*): Multiplier the ramp starts from; `floor` if `None`.
        warmup_offset (`int`, *optional*, defaults to 1): 1: the first update has the LR `1/W` of the way up, update W
            is at the peak. 0: the first update has the start value, as transformers does.
        floor (`float`, *optional*, defaults to 0.0): Lowest multiplier.
    """

    warmup_steps: int | None = dataclasses.field(default=None, kw_only=True)
    warmup_fraction: float | None = dataclasses.field(default=None, kw_only=True)
    warmup_start: float | None = dataclasses.field(default=None, kw_only=True)
    warmup_offset: int = dataclasses.field(default=1, kw_only=True)
    floor: float = dataclasses.field(default=0.0, kw_only=True)

    def _check(self) -> None:
        check_one_of("warmup_steps", self.warmup_steps, "warmup_fraction", self.warmup_fraction)
        check_number("floor", self.floor, 0.0, 1.0, fix="It is the lowest LR as a fraction of the peak.")
        if self.warmup_start is not None:
            check_number("warmup_start", self.warmup_start, 0.0, 1.0)
        check_choice("warmup_offset", self.warmup_offset, (0, 1))
        self._check_idle()
        if self.total_steps is not None and self.warmup > self.total_steps:
            warnings.warn(
                f"{type(self).__name__}: the warm-up of {self.warmup} steps is longer than the run of "
                f"{self.total_steps}; the peak is never reached.",
                UserWarning,
                stacklevel=4,
            )

    def _check_idle(self) -> None:
        """Refuse settings of a warm-up where none is asked for; one of 0 updates, which a sweep may have, is."""
        asked, needs = self._asks_for_warmup, "with a warm-up: pass warmup_steps or warmup_fraction"
        refuse_idle("warmup_start", self.warmup_start, None, asked, needs)
        refuse_idle("warmup_offset", self.warmup_offset, 1, asked, needs)

    @property
    def _asks_for_warmup(self) -> bool:
        return self.warmup_steps is not None or self.warmup_fraction is not None

    @property
    def warmup(self) -> int:
        """Warm-up in updates."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        if self.warmup_fraction is None:
            return 0
        return round_share(self.warmup_fraction, self._total())

    def _ramp(self, t: float) -> float:
        start = self.floor if self.warmup_start is None else self.warmup_start
        return start + (1 - start) * min(1.0, (t + self.warmup_offset) / self.warmup)

    def _multiplier(self, t: float) -> float:
        return self._ramp(t) if t < self.warmup else self._after_warmup(t)

    def _after_warmup(self, t: float) -> float:
        """Default: a curve over the rest of the run, in `p = (t - W) / (T - W)`."""
        rest = self._total() - self.warmup
        if rest <= 0:
            # A warm-up as long as the run has no curve after it.
            return self._curve(0.0) if t < self._total() else self._ramp(t - self.warmup_offset)
        return self._curve(min(1.0, (t - self.warmup) / rest))

    def _curve(self, p: float) -> float:
        raise NotImplementedError


def round_share(fraction: float, total: int) -> int:
    """Return `fraction` of `total`, rounded to the nearest whole number, halves up."""
    # The tolerance keeps 0.2 * 105 = 21.000000000000004 and its like on the side that the decimal number is on.
    return math.floor(fraction * total + 0.5 + 1e-9)


def decay_position(k: float, length: int, offset: DecayOffset) -> float:
    """
    Position in [0, 1] of step `k` of a decay of `length` updates.

    `"start"` is `k/D` (transformers): the first update is still at full LR. `"end"` is `(k+1)/D`: the last update is
    at the terminal value, wasted where that is 0. `"inside"` is `(k+1)/(D+1)`: neither.

    Example:
    ```python
    >>> [[decay_position(k, 4, offset) for k in (0, 3)] for offset in ("start", "end", "inside")]
    [[0.0, 0.75], [0.25, 1.0], [0.2, 0.8]]
    ```
    """
    if length == 0:
        return 1.0
    if offset == "start":
        return min(1.0, k / length)
    if offset == "end":
        return min(1.0, (k + 1) / length)
    return min(1.0, (k + 1) / (length + 1))
