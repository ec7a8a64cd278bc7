"""Schedules that go up and down: 1cycle, triangular, slow start and fast decay; and the table of a refined one."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ._checks import check_number, check_steps
from .base import Schedule, round_share


@dataclass(frozen=True, kw_only=True)
class one_cycle(Schedule):
    """
    1cycle: one ramp up, one ramp down, a short tail far below; momentum does the opposite.

    Formula: linear `1/div -> 1` over `up_fraction`, `1 -> 1/div` over `down_fraction`, `1/div -> 1/(div final_div)`
    over the rest. Momentum (`beta1` for Adam): high -> low -> high, high in the tail.
    Paper: Smith and Topin, Super-Convergence (1708.07120). The split of the phases is not published; ours is 45/45/10.

    Args:
        total_steps (`int`, *optional*): Updates of the run.
        up_fraction, down_fraction (`float`, *optional*, default to 0.45): Shares of the run, together at most 1.
        div (`float`, *optional*, defaults to 10.0): Peak / first LR, at least 1.
        final_div (`float`, *optional*, defaults to 100.0): First LR / last LR, at least 1.
        momentum_low, momentum_high (`float`, *optional*, default to 0.85 and 0.95): In [0, 1); both `None`: momentum
            is left alone.

    Example:
    ```python
    >>> schedule = one_cycle(10, up_fraction=0.4, down_fraction=0.4)
    >>> [round(schedule(t), 4) for t in range(11)]
    [0.1, 0.325, 0.55, 0.775, 1.0, 0.775, 0.55, 0.325, 0.1, 0.0505, 0.001]
    >>> [round(schedule.momentum(t), 3) for t in (0, 2, 4, 6, 8, 9)]
    [0.95, 0.9, 0.85, 0.9, 0.95, 0.95]
    ```
    """

    up_fraction: float = 0.45
    down_fraction: float = 0.45
    div: float = 10.0
    final_div: float = 100.0
    momentum_low: float | None = 0.85
    momentum_high: float | None = 0.95

    def _check(self) -> None:
        check_number("up_fraction", self.up_fraction, 0.0, 1.0)
        check_number("down_fraction", self.down_fraction, 0.0, 1.0)
        if self.up_fraction + self.down_fraction > 1 + 1e-12:
            raise ValueError(
                f"up_fraction={self.up_fraction} + down_fraction={self.down_fraction} is more than the run. Lower one."
            )
        check_number("div", self.div, 1.0, math.inf)
        check_number("final_div", self.final_div, 1.0, math.inf)
        if (self.momentum_low is None) != (self.momentum_high is None):
            raise ValueError("Pass both momentum_low and momentum_high, or None for both.")
        if self.momentum_low is not None and self.momentum_high is not None:
            check_number("momentum_high", self.momentum_high, 0.0, 1.0, high_open=True)
            check_number("momentum_low", self.momentum_low, 0.0, self.momentum_high)

    @property
    def floor(self) -> float:
        """Last and lowest multiplier."""
        return 1 / (self.div * self.final_div)

    def _phases(self) -> tuple[int, int]:
        up = round_share(self.up_fraction, self._total())
        return up, min(up + round_share(self.down_fraction, self._total()), self._total())

    def _height(self, t: float) -> float:
        """0 at both feet of the cycle and in the tail, 1 at the peak."""
        up, down = self._phases()
        if t < up:
            return t / up
        return (down - t) / (down - up) if t < down else 0.0

    def _multiplier(self, t: float) -> float:
        foot, (_, down) = 1 / self.div, self._phases()
        if t < down:
            return foot + (1 - foot) * self._height(t)
        tail = self._total() - down
        x = min(1.0, (t - down) / tail) if tail else 1.0
        return foot + (self.floor - foot) * x

    def momentum(self, step: float) -> float | None:
        """Return the momentum (or beta1) of the update after `step` finished ones; `None`: leave it alone."""
        if self.momentum_low is None or self.momentum_high is None:
            return None
        step = min(step, self._total())
        return self.momentum_high - (self.momentum_high - self.momentum_low) * self._height(step)


@dataclass(frozen=True, kw_only=True)
class triangular(Schedule):
    """
    Cyclical LR: a triangle wave between `low` and the peak.

    Formula: `k = floor(1 + t/(2s))`, `x = |t/s - 2k + 1|`, `m = low + (1-low) max(0, 1-x)`.
    Paper: Smith, Cyclical Learning Rates (1506.01186).

    Args:
        half_cycle_steps (`int`): s, updates of one ramp.
        low (`float`, *optional*, defaults to 0.1): Foot, in [0, 1].

    Example:
    ```python
    >>> [round(triangular(half_cycle_steps=2, low=0.2)(t), 2) for t in range(6)]
    [0.2, 0.6, 1.0, 0.6, 0.2, 0.6]
    ```
    """

    half_cycle_steps: int = 2000
    low: float = 0.1

    def _check(self) -> None:
        check_steps("half_cycle_steps", self.half_cycle_steps, 1)
        check_number("low", self.low, 0.0, 1.0)

    @property
    def floor(self) -> float:
        """Lowest multiplier."""
        return self.low

    @property
    def last_step(self) -> int | None:
        return None

    def _multiplier(self, t: float) -> float:
        k = math.floor(1 + t / (2 * self.half_cycle_steps))
        x = abs(t / self.half_cycle_steps - 2 * k + 1)
        return self.low + (1 - self.low) * max(0.0, 1 - x)


@dataclass(frozen=True, kw_only=True)
class slow_start_fast_decay(Schedule):
    """
    Slow start, fast decay: a geometric rise, then a faster geometric fall, for short adversarial fine-tuning.

    Formula: `start^(1 - t/U)` for t < U, then `floor^((t-U)/(T-U))`, U = `rise_fraction` T.
    Paper: Jeddi et al., A Simple Fine-tuning Is All You Need (2012.13628). Only the two phases are confirmed; the
    numbers are ours.

    Args:
        total_steps (`int`, *optional*): Updates of the run.
        rise_fraction (`float`, *optional*, defaults to 0.5): Share of the rise; 0: only decay, 1: only rise.
        start (`float`, *optional*, defaults to 0.1): First multiplier, in (0, 1].
        floor (`float`, *optional*, defaults to 0.01): Last multiplier, in (0, 1].

    Example:
    ```python
    >>> [round(slow_start_fast_decay(4)(t), 4) for t in range(5)]
    [0.1, 0.3162, 1.0, 0.1, 0.01]
    ```
    """

    rise_fraction: float = 0.5
    start: float = 0.1
    floor: float = 0.01

    def _check(self) -> None:
        check_number("rise_fraction", self.rise_fraction, 0.0, 1.0)
        check_number("start", self.start, 0.0, 1.0, low_open=True)
        check_number("floor", self.floor, 0.0, 1.0, low_open=True)

    def _multiplier(self, t: float) -> float:
        total = self._total()
        rise = round_share(self.rise_fraction, total)
        if t < rise:
            return self.start ** (1 - t / rise)
        return self.floor ** ((t - rise) / (total - rise)) if total > rise else 1.0


@dataclass(frozen=True, kw_only=True)
class table(Schedule):
    """
    A schedule given by its values, stretched to the length of the run.

    Formula: `values[t]` for a run of as many updates as values; otherwise linear interpolation at the same share of
    the run. After the last update the multiplier is `end`.

    Args:
        total_steps (`int`, *optional*): Updates of the run.
        values (`tuple[float, ...]`): Multipliers, each in [0, 1].
        end (`float`, *optional*, defaults to 0.0): Value after the run.

    Example:
    ```python
    >>> table(3, values=(0.5, 1.0, 0.0)).trace(), table(5, values=(0.5, 1.0, 0.0)).trace()
    ([0.5, 1.0, 0.0], [0.5, 0.75, 1.0, 0.5, 0.0])
    ```
    """

    values: tuple[float, ...] = ()
    end: float = 0.0

    def _check(self) -> None:
        object.__setattr__(self, "values", tuple(float(v) for v in self.values))
        if not self.values:
            raise ValueError("values is empty. Pass at least one multiplier.")
        for value in self.values:
            check_number("values", value, 0.0, 1.0)
        check_number("end", self.end, 0.0, 1.0)

    @property
    def floor(self) -> float:
        """Lowest multiplier."""
        return min(self.values)

    def _multiplier(self, t: float) -> float:
        total, last = self._total(), len(self.values) - 1
        if t >= total:
            return self.end
        x = t * last / (total - 1) if total > 1 else 0.0
        low = min(int(x), last)
        high = min(low + 1, last)
        return self.values[low] + (self.values[high] - self.values[low]) * (x - low) if x > low else self.values[low]
