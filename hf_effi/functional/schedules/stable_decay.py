"""Plateau-and-decay schedules: WSD, WSD-S (several budgets in one run) and WSDC (a constant tail)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from ..options import refuse_idle
from ._checks import check_choice, check_number, check_one_of, check_steps
from .base import DecayOffset, _Warm, decay_position, round_share
from .shapes import check_shape, decay, half_life


# Schedules are classes so that they can be stored and compared, and lower case because they are used as functions.
@dataclass(frozen=True, kw_only=True)
class wsd(_Warm):
    """
    Warm-up, stable, decay: `t/W` up, 1 on the plateau, then `shape(x)` down to `floor` over the last `D` updates.

    Formula: `m(t) = (t+1)/W` for t < W; 1 for W <= t < T_s; `f(x)`, `x = (t-T_s+1)/(D+1)`, for t >= T_s.
    Paper: Hu et al., MiniCPM (2404.06395), eq. 1; the 1-sqrt shape is from Haegele et al. (2405.18392).

    With `open_ended=True`, or while the length of the run is unknown, the plateau has no end until
    [`~wsd.start_decay`] names one. The best plateau LR is about half of the best cosine peak.

    Args:
        total_steps (`int`, *optional*): Updates of the run; `None` to have it inferred.
        decay_steps (`int`, *optional*): Length of the decay in updates. 0 is a constant LR.
        decay_fraction (`float`, *optional*): The same as a fraction of the run, in [0, 1]. Neither: 0.2 (MiniCPM: 10 %
            is enough, 2.5 % is not; Haegele et al.: 20 %).
        shape (`str`, *optional*, defaults to `"1-sqrt"`): A name of [`decay`], or `"half-life"`.
        power (`float`, *optional*, defaults to 1.0): Exponent of `shape="power"`.
        half_life_steps (`float`, *optional*): Needed by, and only by, `shape="half-life"` (MiniCPM: 5000).
        decay_offset (`str`, *optional*, defaults to `"inside"`): See [`decay_position`].
        open_ended (`bool`, *optional*, defaults to `False`): No decay until `start_decay`.
        decay_start (`int`, *optional*): Update at which the decay starts; set by `start_decay`.
        warmup_steps, warmup_fraction, warmup_start, warmup_offset, floor: Warm-up (default none) and lowest value
            (default 0). The ramp starts from `floor` unless `warmup_start` says otherwise.

    Raises:
        ValueError: `W + D > T`, unknown shape, a bad value.

    Example:
    ```python
    >>> schedule = wsd(10, warmup_steps=2, decay_steps=3, shape="linear")
    >>> [round(schedule(t), 3) for t in range(11)]
    [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    >>> wsd(warmup_steps=2)(10**9)  # no length yet: the plateau has no end
    1.0
    >>> wsd(warmup_steps=2).start_decay(at=500, decay_steps=99, shape="linear")(549)
    0.5
    ```
    """

    decay_steps: int | None = None
    decay_fraction: float | None = None
    shape: str = "1-sqrt"
    power: float = 1.0
    half_life_steps: float | None = None
    decay_offset: DecayOffset = "inside"
    open_ended: bool = False
    decay_start: int | None = None

    def _check(self) -> None:
        super()._check()
        refuse_idle("power", self.power, 1.0, self.shape == "power", "with shape='power'")
        check_one_of("decay_steps", self.decay_steps, "decay_fraction", self.decay_fraction)
        check_choice("decay_offset", self.decay_offset, ("start", "end", "inside"))
        self._check_shape()
        if self.decay_start is not None:
            check_steps("decay_start", self.decay_start)
            if self.decay_steps is None:
                raise ValueError(
                    f"decay_start={self.decay_start} needs decay_steps, the length of that decay. "
                    "Use start_decay(at=..., decay_steps=...)."
                )
        elif self.total_steps is not None and not self.open_ended:
            if self.warmup + self.decay_length > self.total_steps:
                raise ValueError(
                    f"warm-up ({self.warmup}) + decay ({self.decay_length}) = {self.warmup + self.decay_length} "
                    f"updates do not fit into total_steps={self.total_steps}. Shorten one of them."
                )

    def _check_shape(self) -> None:
        if self.shape == "half-life":
            if self.half_life_steps is None:
                raise ValueError("shape='half-life' needs half_life_steps, for example 5000 as in MiniCPM.")
            half_life(0, self.half_life_steps)
            return
        if self.half_life_steps is not None:
            raise ValueError(f"half_life_steps={self.half_life_steps!r} only acts with shape='half-life'.")
        check_shape(self.shape, self.floor, self.power)

    @property
    def decay_length(self) -> int:
        """Length of the decay in updates."""
        if self.decay_steps is not None:
            return self.decay_steps
        share = 0.2 if self.decay_fraction is None else self.decay_fraction
        # A decay that was asked for has at least one update, also in a run of one.
        return max(1, round_share(share, self._total())) if share > 0 else 0

    @property
    def decay_begin(self) -> int | None:
        """Updates done when the decay starts, or `None` while the plateau has no end."""
        if self.decay_start is not None:
            return self.decay_start
        if self.open_ended or self.total_steps is None:
            return None
        return self.total_steps - self.decay_length

    @property
    def last_step(self) -> int | None:
        begin = self.decay_begin
        return None if begin is None else begin + self.decay_length

    def start_decay(
        self, at: int, decay_steps: int | None = None, shape: str | None = None, power: float | None = None
    ) -> Self:
        """
        Return the schedule that decays from update `at` on, over `decay_steps` updates.

        Args:
            at (`int`): Finished updates when the decay begins.
            decay_steps (`int`, *optional*): Its length; the planned one if `None`.
            shape, power (*optional*): Another shape.

        Raises:
            ValueError: a decay has already begun before `at`, or `at` is negative.
        """
        check_steps("at", at)
        begin = self.decay_begin
        if begin is not None and at > begin:
            raise ValueError(f"at={at} is after the decay has begun at {begin}. A decay starts once.")
        if power is None:
            power = self.power if shape in (None, self.shape) else 1.0  # the exponent belongs to the shape
        return self.replace(
            decay_start=at,
            decay_steps=self.decay_length if decay_steps is None else decay_steps,
            decay_fraction=None,
            shape=self.shape if shape is None else shape,
            power=power,
        )

    def _multiplier(self, t: float) -> float:
        begin = self.decay_begin
        if begin is None or t < begin:
            return self._ramp(t) if t < self.warmup else 1.0
        # A decay started inside the warm-up goes down from where the ramp was.
        peak = self._ramp(begin) if begin < self.warmup else 1.0
        return max(self.floor, peak * self._fall(t - begin, self.decay_length))

    def _fall(self, k: float, length: int) -> float:
        if self.half_life_steps is not None:  # with shape="half-life", and with no other
            # No position in [0, 1] here: the rate counts steps, so "start" and the others differ by one step.
            return max(self.floor, half_life(k + (self.decay_offset != "start"), self.half_life_steps))
        if length == 0:
            return 1.0
        return decay(self.shape, decay_position(k, length, self.decay_offset), self.floor, self.power)


@dataclass(frozen=True, kw_only=True)
class wsdc(wsd):
    """
    WSD with a constant tail: after the decay the LR stays at `floor` for a last data phase.

    Formula: as [`wsd`] with the decay ending `constant_steps` before the end of the run, then `floor`.
    Paper: PLM (order of the phases only; lengths are not published, so the defaults are placeholders).

    Args:
        constant_steps (`int`, *optional*): Length of the tail in updates.
        constant_fraction (`float`, *optional*): The same as a fraction of the run. Neither: 0.05.
        floor (`float`, *optional*, defaults to 0.1): Must be above 0, or the tail would not train.
        The others: see [`wsd`]; `decay_fraction` defaults to 0.1 here.

    Raises:
        ValueError: `floor` is 0; the phases do not fit; a bad value.

    Example:
    ```python
    >>> schedule = wsdc(10, decay_steps=3, constant_steps=2, shape="linear", floor=0.2)
    >>> [round(schedule(t), 3) for t in range(10)]
    [1.0, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2]
    ```
    """

    floor: float = 0.1
    decay_fraction: float | None = None
    constant_steps: int | None = None
    constant_fraction: float | None = None

    def _check(self) -> None:
        check_one_of("constant_steps", self.constant_steps, "constant_fraction", self.constant_fraction)
        check_number("floor", self.floor, 0.0, 1.0, low_open=True, fix="With 0 the constant phase would not train.")
        super()._check()
        if self.total_steps is not None and self.decay_start is None and not self.open_ended:
            used = self.warmup + self.decay_length + self.constant_length
            if used > self.total_steps:
                raise ValueError(
                    f"warm-up ({self.warmup}) + decay ({self.decay_length}) + constant ({self.constant_length}) = "
                    f"{used} updates do not fit into total_steps={self.total_steps}. Shorten one of them."
                )

    @property
    def decay_length(self) -> int:
        if self.decay_steps is None and self.decay_fraction is None:
            return max(1, round_share(0.1, self._total()))
        return super().decay_length

    @property
    def constant_length(self) -> int:
        """Length of the tail in updates."""
        if self.constant_steps is not None:
            return self.constant_steps
        share = 0.05 if self.constant_fraction is None else self.constant_fraction
        return round_share(share, self._total())

    @property
    def decay_begin(self) -> int | None:
        begin = super().decay_begin
        if begin is None or self.decay_start is not None:
            return begin
        return begin - self.constant_length

    @property
    def last_step(self) -> int | None:
        begin = self.decay_begin
        return None if begin is None else begin + self.decay_length + self.constant_length


@dataclass(frozen=True, kw_only=True)
class wsd_s(_Warm):
    """
    WSD-S: one run with a finished model at each of several budgets, going on from the decayed weights.

    Formula: with budgets `T_1 < ... < T_n` and `T_0 = 0`, period i is a plateau on `[T_{i-1}, T_i - D_i)` and a decay
    on `[T_i - D_i, T_i)`; at `T_i` the LR is back at the peak. `f(x) = 1/(x/floor + 1 - x)` by default.
    Paper: Wen et al., Understanding Warmup-Stable-Decay Learning Rates (2410.05192).

    Args:
        total_steps (`int`, *optional*): Updates of the run = the last budget.
        budgets (`tuple[float, ...]`, *optional*, defaults to `(0.25, 0.5, 1.0)`): Ends of the periods as fractions of
            the run, rising, the last one 1.
        decay_fraction (`float`, *optional*, defaults to 0.1): Decay of each period as a fraction of that period.
        shape (`str`, *optional*, defaults to `"reciprocal"`), power, decay_offset: See [`wsd`].
        rewarm_steps (`int`, *optional*, defaults to 0): Linear way back to the peak after each decay.
        floor (`float`, *optional*, defaults to 0.1): Terminal multiplier; above 0 for the default shape.
        warmup_steps, warmup_fraction, warmup_start, warmup_offset: The first warm-up.

    Raises:
        ValueError: budgets not rising or not ending at 1, phases that do not fit, a bad value.

    Example:
    ```python
    >>> schedule = wsd_s(8, budgets=(0.5, 1.0), decay_fraction=0.5, shape="linear", floor=0.1)
    >>> [round(schedule(t), 2) for t in range(9)]
    [1.0, 1.0, 0.7, 0.4, 1.0, 1.0, 0.7, 0.4, 0.1]
    ```
    """

    floor: float = 0.1
    budgets: tuple[float, ...] = (0.25, 0.5, 1.0)
    decay_fraction: float = 0.1
    shape: str = "reciprocal"
    power: float = 1.0
    decay_offset: DecayOffset = "inside"
    rewarm_steps: int = 0

    def _check(self) -> None:
        object.__setattr__(self, "budgets", tuple(self.budgets))
        super()._check()
        check_shape(self.shape, self.floor, self.power)
        refuse_idle("power", self.power, 1.0, self.shape == "power", "with shape='power'")
        check_choice("decay_offset", self.decay_offset, ("start", "end", "inside"))
        check_number("decay_fraction", self.decay_fraction, 0.0, 1.0)
        check_steps("rewarm_steps", self.rewarm_steps)
        refuse_idle("rewarm_steps", self.rewarm_steps, 0, len(self.budgets) > 1, "between two budgets")
        for budget in self.budgets:
            check_number("budgets", budget, 0.0, 1.0, low_open=True, fix="Budgets are fractions of the run.")
        rising = all(a < b for a, b in zip(self.budgets, self.budgets[1:], strict=False))
        if not self.budgets or not rising or self.budgets[-1] != 1:
            raise ValueError(f"budgets={self.budgets!r} must rise strictly and end at 1.0, e.g. (0.25, 0.5, 1.0).")
        if self.total_steps is not None:
            self._check_periods()

    def _check_periods(self) -> None:
        for start, end, length in self.periods:
            lead = self.warmup if start == 0 else self.rewarm_steps
            if end <= start or lead + length > end - start:
                raise ValueError(
                    f"The period from {start} to {end} is too short for a warm-up of {lead} and a decay of {length} "
                    f"updates. Use fewer budgets, or a longer run than total_steps={self.total_steps}."
                )

    @property
    def periods(self) -> list[tuple[int, int, int]]:
        """`(start, end, decay_steps)` of each period in updates."""
        ends = [max(1, round_share(budget, self._total())) for budget in self.budgets]
        starts = [0, *ends[:-1]]
        return [(a, b, round_share(self.decay_fraction, b - a)) for a, b in zip(starts, ends, strict=True)]

    def _multiplier(self, t: float) -> float:
        for start, end, length in self.periods:
            if t < end:
                if t >= end - length:
                    position = decay_position(t - (end - length), length, self.decay_offset)
                    return decay(self.shape, position, self.floor, self.power)
                if start == 0:
                    return self._ramp(t) if t < self.warmup else 1.0
                done = (t - start + 1) / self.rewarm_steps if t - start < self.rewarm_steps else 1.0
                return self.floor + (1 - self.floor) * min(1.0, done)
        return self.floor
