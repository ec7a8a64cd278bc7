"""Schedules made of schedules: one after the other, scaled, and indexed by tokens instead of steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from ...errors import MismatchError
from ._checks import check_number, check_steps
from .base import Schedule, start_decay


def _need_schedule(name: str, value: object) -> Schedule:
    if not isinstance(value, Schedule):
        raise ValueError(f"{name}={value!r} is not a Schedule. Pass one, e.g. linear(100).")
    return value


@dataclass(frozen=True, kw_only=True)
class join(Schedule):
    """
    One schedule after the other, each counting from 0.

    Formula: `m(t) = schedules[i](t - b_i)` for `b_i <= t < b_{i+1}`, `b_0 = 0`.

    Args:
        total_steps (`int`, *optional*): Updates of the run; the last schedule gets what is left.
        schedules (`tuple[Schedule, ...]`): The parts. Those that do not know their length get the length of their
            part.
        boundaries (`tuple[int, ...]`): Updates at which the next part begins, rising, one fewer than the parts.

    Example:
    ```python
    >>> from hf_effi.functional.schedules import constant, linear
    >>> join(6, schedules=(constant(), linear()), boundaries=(2,)).trace()
    [1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    ```
    """

    schedules: tuple[Schedule, ...] = ()
    boundaries: tuple[int, ...] = ()

    def _check(self) -> None:
        parts, cuts = list(self.schedules), tuple(self.boundaries)
        for part in parts:
            _need_schedule("schedules", part)
        if len(cuts) != len(parts) - 1:
            raise ValueError(f"{len(parts)} schedules need {max(0, len(parts) - 1)} boundaries, not {len(cuts)}.")
        for cut in cuts:
            check_steps("boundaries", cut, 1)
        edges = [0, *cuts] + ([self.total_steps] if self.total_steps is not None else [])
        if any(a >= b for a, b in zip(edges, edges[1:], strict=False)):
            raise ValueError(f"boundaries={cuts} must rise strictly and lie inside total_steps={self.total_steps}.")
        for i in range(len(edges) - 1):
            if parts[i].total_steps is None:
                parts[i] = parts[i].bind(edges[i + 1] - edges[i])
        object.__setattr__(self, "schedules", tuple(parts))
        object.__setattr__(self, "boundaries", cuts)

    @property
    def last_step(self) -> int | None:
        if self.total_steps is not None:
            return self.total_steps
        end = self.schedules[-1].last_step
        return None if end is None else end + (self.boundaries[-1] if self.boundaries else 0)

    @property
    def floor(self) -> float:
        """Lowest value among the parts."""
        return min(getattr(part, "floor", 0.0) for part in self.schedules)

    def _multiplier(self, t: float) -> float:
        i = sum(t >= cut for cut in self.boundaries)
        local = t - (self.boundaries[i - 1] if i else 0)
        end = self.schedules[i].last_step
        return self.schedules[i](local if end is None else min(local, end))


@dataclass(frozen=True, kw_only=True)
class _Around(Schedule):
    """Shared by the schedules around one other, which end with it and know as much of the run's length."""

    schedule: Schedule | None = None

    @property
    def _inner(self) -> Schedule:
        return _need_schedule("schedule", self.schedule)

    def _check(self) -> None:
        if self.total_steps is not None and self._inner.total_steps is None:
            object.__setattr__(self, "schedule", self._inner.bind(self.total_steps))
        if self.total_steps is None and self._inner.total_steps is not None:
            object.__setattr__(self, "total_steps", self._inner.total_steps)

    @property
    def last_step(self) -> int | None:
        return self._inner.last_step


@dataclass(frozen=True, kw_only=True)
class scale(_Around):
    """
    A schedule times a factor.

    Args:
        schedule (`Schedule`): What to scale.
        factor (`float`, *optional*, defaults to 1.0): Above 0.

    Example:
    ```python
    >>> from hf_effi.functional.schedules import linear
    >>> scale(schedule=linear(4), factor=0.5).trace(4)
    [0.5, 0.375, 0.25, 0.125]
    ```
    """

    factor: float = 1.0

    def _check(self) -> None:
        super()._check()
        check_number("factor", self.factor, 0.0, math.inf, low_open=True)

    @property
    def floor(self) -> float:
        """Lowest multiplier."""
        return self.factor * getattr(self.schedule, "floor", 0.0)

    def start_decay(self, at: int, decay_steps: int | None = None, **kwargs: Any) -> Self:
        """Start the decay of the scaled schedule."""
        return self.replace(schedule=start_decay(self._inner, at, decay_steps, **kwargs), total_steps=None)

    def _multiplier(self, t: float) -> float:
        return self.factor * self._inner._multiplier(t)


@dataclass(frozen=True, kw_only=True)
class token_indexed(_Around):
    """
    A schedule over tokens (or layer-tokens) consumed, in units of a full step.

    Formula: `m = schedule(consumed / full_step)`. With nothing dropped it is the plain schedule; where a method drops
    half of the layer-tokens of each step, the schedule runs half as fast.
    Paper: Yao et al., Random-LTD (2211.11586), the LayerToken LR; also for length curricula and batch ramps.

    Args:
        schedule (`Schedule`): Its steps are full steps.

    Example:
    ```python
    >>> from hf_effi.functional.schedules import TokenCounter, linear
    >>> schedule, counter = token_indexed(schedule=linear(4)), TokenCounter(full_step=100)
    >>> for _ in range(2):
    ...     counter.add(50)
    >>> schedule(counter())
    0.75
    ```
    """

    needs_counter: ClassVar[bool] = True

    @property
    def floor(self) -> float:
        """Lowest multiplier."""
        return getattr(self.schedule, "floor", 0.0)

    def _multiplier(self, t: float) -> float:
        return self._inner._multiplier(t)


class TokenCounter:
    """
    Counts consumed tokens and returns the progress in full steps; whole numbers, so nothing is lost on resume.

    Args:
        full_step (`int`): Tokens (or layer-tokens: tokens x layers) of a step in which nothing is dropped, over all
            processes.

    Example:
    ```python
    >>> counter = TokenCounter(full_step=8 * 128 * 12)
    >>> counter.add(8 * (64 * 10 + 128 * 2))  # 10 of 12 layers see half of the 128 tokens
    >>> round(counter(), 4)
    0.5833
    ```
    """

    def __init__(self, full_step: int) -> None:
        check_steps("full_step", full_step, 1)
        self.full_step = full_step
        self.consumed = 0

    def add(self, tokens: int) -> None:
        """Count `tokens` more; the sum over all processes, the same on each."""
        check_steps("tokens", tokens)
        self.consumed += int(tokens)

    def __call__(self) -> float:
        return self.consumed / self.full_step

    def state_dict(self) -> dict[str, int]:
        """Return the counter as JSON."""
        return {"consumed": self.consumed, "full_step": self.full_step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """
        Restore the counter.

        Raises:
            MismatchError: a full step has another size than in the checkpoint.
        """
        if state["full_step"] != self.full_step:
            raise MismatchError(
                f"The checkpoint counts full steps of {state['full_step']} tokens, this run of {self.full_step}. "
                "Build the TokenCounter with the old size."
            )
        self.consumed = state["consumed"]
