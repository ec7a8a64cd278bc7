"""Schedules for training that goes on: infinite LR, re-warming per data set, and the power law of tokens seen."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Self

from ..options import refuse_idle
from ._checks import check_choice, check_number, check_one_of, check_steps
from .base import DecayOffset, _Warm, decay_position, round_share
from .shapes import check_shape, decay


@dataclass(frozen=True, kw_only=True)
class infinite(_Warm):
    """
    Infinite LR: warm-up, cooldown to a constant, constant as long as data comes, short anneal for a final model.

    Formula, with c = `constant_ratio`, x = position in the phase: cooldown cosine `c+(1-c)(1+cos(pi x))/2`,
    inverse-sqrt `1+(c-1)h(x)/h(1)`, `h = 1/sqrt(1+alpha x)-1`, linear `1-(1-c)x`; constant `c`; anneal
    `c (floor/c)^x`. Phases are given as lengths, here and in the paper's text; its code has absolute ends.
    Papers: Ibrahim et al., Simple and Scalable Strategies to Continually Pre-train (2403.08763); Beyond Cosine Decay
    (2503.02844).

    Args:
        total_steps (`int`, *optional*): Updates of the run, for a planned anneal.
        cooldown_steps, cooldown_fraction (*optional*): Length of the cooldown; neither: 0.1 of the run.
        anneal_steps, anneal_fraction (*optional*): Length of the anneal at the end; neither: 0.2 of the run.
        constant_ratio (`float`, *optional*, defaults to 0.1): Constant LR / peak LR, in (0, 1].
        floor (`float`, *optional*, defaults to 0.01): Final LR / peak LR, in (0, `constant_ratio`].
        cooldown (`str`, *optional*, defaults to `"cosine"`): `"cosine"`, `"inverse-sqrt"` or `"linear"`.
        alpha (`float`, *optional*, defaults to 10.0): Timescale of the inverse-sqrt cooldown, above 0.
        first_task (`bool`, *optional*, defaults to `True`): `False` starts in the constant phase, for the second and
            later data sets, resumed from the checkpoint before the anneal.
        open_ended (`bool`, *optional*, defaults to `False`): No anneal until [`~infinite.start_decay`].
        anneal_start (`int`, *optional*): Update at which the anneal starts; set by `start_decay`.

    Raises:
        ValueError: `floor` is 0 or above `constant_ratio`, phases that do not fit, a bad value.

    Example:
    ```python
    >>> schedule = infinite(1000, warmup_steps=50, cooldown_steps=100, anneal_steps=200)
    >>> [round(schedule(t), 6) for t in (50, 100, 150, 800, 900, 1000)]
    [1.0, 0.55, 0.1, 0.1, 0.031623, 0.01]
    ```
    """

    floor: float = 0.01
    cooldown_steps: int | None = None
    cooldown_fraction: float | None = None
    anneal_steps: int | None = None
    anneal_fraction: float | None = None
    constant_ratio: float = 0.1
    cooldown: str = "cosine"
    alpha: float = 10.0
    first_task: bool = True
    open_ended: bool = False
    anneal_start: int | None = None

    def _check(self) -> None:
        super()._check()
        check_one_of("cooldown_steps", self.cooldown_steps, "cooldown_fraction", self.cooldown_fraction)
        check_one_of("anneal_steps", self.anneal_steps, "anneal_fraction", self.anneal_fraction)
        check_choice("cooldown", self.cooldown, ("cosine", "inverse-sqrt", "linear"))
        check_number("alpha", self.alpha, 0.0, math.inf, low_open=True)
        needs = "with cooldown='inverse-sqrt'"
        refuse_idle("alpha", self.alpha, 10.0, self.cooldown == "inverse-sqrt", needs)
        check_number("constant_ratio", self.constant_ratio, 0.0, 1.0, low_open=True)
        check_number("floor", self.floor, 0.0, self.constant_ratio, low_open=True, fix="The anneal is exponential.")
        if self.anneal_start is not None:
            check_steps("anneal_start", self.anneal_start)
            if self.anneal_steps is None:
                raise ValueError("anneal_start needs anneal_steps. Use start_decay(at=..., decay_steps=...).")
        elif self.total_steps is not None and not self.open_ended:
            used = self.constant_from + self.anneal_length
            if used > self.total_steps:
                raise ValueError(
                    f"warm-up + cooldown ({self.constant_from}) + anneal ({self.anneal_length}) = {used} updates do "
                    f"not fit into total_steps={self.total_steps}. Shorten one of them."
                )

    @property
    def constant_from(self) -> int:
        """Update at which the constant phase begins."""
        if not self.first_task:
            return 0
        if self.cooldown_steps is not None:
            return self.warmup + self.cooldown_steps
        share = 0.1 if self.cooldown_fraction is None else self.cooldown_fraction
        return self.warmup + round_share(share, self._total())

    @property
    def anneal_length(self) -> int:
        """Length of the anneal in updates."""
        if self.anneal_steps is not None:
            return self.anneal_steps
        share = 0.2 if self.anneal_fraction is None else self.anneal_fraction
        return round_share(share, self._total())

    @property
    def anneal_begin(self) -> int | None:
        """Updates done when the anneal starts, or `None` while none is planned."""
        if self.anneal_start is not None:
            return self.anneal_start
        if self.open_ended or self.total_steps is None:
            return None
        return self.total_steps - self.anneal_length

    @property
    def last_step(self) -> int | None:
        begin = self.anneal_begin
        return None if begin is None else begin + self.anneal_length

    def start_decay(self, at: int, decay_steps: int | None = None) -> Self:
        """
        Return the schedule that anneals from update `at` on, over `decay_steps` updates (the planned length if
        `None`).

        Raises:
            ValueError: an anneal began before `at`, or the constant phase is not reached yet.
        """
        check_steps("at", at)
        begin = self.anneal_begin
        if begin is not None and at > begin:
            raise ValueError(f"at={at} is after the anneal has begun at {begin}. An anneal starts once.")
        if at < self.constant_from:
            raise ValueError(f"at={at} is before the constant phase, which begins at {self.constant_from}. Wait.")
        length = self.anneal_length if decay_steps is None else decay_steps
        return self.replace(anneal_start=at, anneal_steps=length, anneal_fraction=None)

    def _multiplier(self, t: float) -> float:
        c, begin = self.constant_ratio, self.anneal_begin
        if begin is not None and t >= begin:
            x = min(1.0, (t - begin) / self.anneal_length) if self.anneal_length else 0.0
            return c * (self.floor / c) ** x
        if self.first_task and t < self.warmup:
            return self._ramp(t)
        if t >= self.constant_from:
            return c
        x = (t - self.warmup) / (self.constant_from - self.warmup)
        if self.cooldown == "cosine":
            return c + (1 - c) * (1 + math.cos(math.pi * x)) / 2
        if self.cooldown == "linear":
            return 1 - (1 - c) * x
        return 1 + (c - 1) * (1 / math.sqrt(1 + self.alpha * x) - 1) / (1 / math.sqrt(1 + self.alpha) - 1)


_STEPS_OR_SHARES = "Pass one of data_fractions=(0.5, 0.5) and data_steps=(1000, 1000)."


@dataclass(frozen=True, kw_only=True)
class rewarm_redecay(_Warm):
    """
    One linear re-warm-up and one cosine re-decay for each data set of a continual pre-training run.

    Formula, in data set i of T_i updates: `floor + (peak_i - floor)(t+1)/W_i` for the first W_i updates, then
    `floor + (peak_i - floor)(1+cos(pi (t-W_i)/(T_i-W_i)))/2`.
    Papers: Gupta et al. (2308.04014); Ibrahim et al. (2403.08763). A larger peak adapts more and forgets more.

    Args:
        total_steps (`int`, *optional*): Updates over all data sets.
        data_fractions (`tuple[float, ...]`, *optional*): Share of the run of each data set; they add up to 1.
        data_steps (`tuple[int, ...]`, *optional*): The same in updates; they add up to the run. Pass one of both.
        peaks (`tuple[float, ...]`, *optional*): Peak multiplier of each data set, in [floor, 1]; all 1 if `None`.
        warmup_fraction (`float`, *optional*, defaults to 0.01): Warm-up as a share of each data set; `warmup_steps`
            instead is the same number of updates for each.
        floor (`float`, *optional*, defaults to 0.1): Lowest multiplier.

    Example:
    ```python
    >>> schedule = rewarm_redecay(8, data_steps=(4, 4), warmup_steps=1, floor=0.1, peaks=(1.0, 0.5))
    >>> [round(schedule(t), 3) for t in range(9)]
    [1.0, 1.0, 0.775, 0.325, 0.5, 0.5, 0.4, 0.2, 0.1]
    ```
    """

    floor: float = 0.1
    data_fractions: tuple[float, ...] | None = None
    data_steps: tuple[int, ...] | None = None
    peaks: tuple[float, ...] | None = None

    def _check(self) -> None:
        for name in ("data_fractions", "data_steps", "peaks"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if (self.data_fractions is None) == (self.data_steps is None):
            raise ValueError(_STEPS_OR_SHARES)
        count = self._check_shares() if self.data_steps is None else self._check_steps(self.data_steps)
        super()._check()
        if self.peaks is not None:
            if len(self.peaks) != count:
                raise ValueError(f"peaks has {len(self.peaks)} values for {count} data sets. Pass one for each.")
            for peak in self.peaks:
                check_number("peaks", peak, self.floor, 1.0)

    def _check_steps(self, data_steps: tuple[int, ...]) -> int:
        """Check the updates of each data set; return how many there are."""
        if not data_steps:
            raise ValueError("data_steps=() names no data set. Pass the updates of each, such as (1000, 1000).")
        for steps in data_steps:
            check_steps("data_steps", steps, 1)
        if self.total_steps is not None and sum(data_steps) != self.total_steps:
            raise ValueError(
                f"data_steps={data_steps} add up to {sum(data_steps)}, but total_steps is {self.total_steps}. "
                "Correct one, or use data_fractions."
            )
        return len(data_steps)

    def _check_shares(self) -> int:
        """Check the share of each data set; return how many there are."""
        shares = self._shares()
        for share in shares:
            check_number("data_fractions", share, 0.0, 1.0, low_open=True)
        if abs(sum(shares) - 1) > 1e-9:
            raise ValueError(f"data_fractions={shares} must add up to 1.")
        return len(shares)

    def _shares(self) -> tuple[float, ...]:
        if self.data_fractions is None:
            raise ValueError(_STEPS_OR_SHARES)
        return self.data_fractions

    def _check_idle(self) -> None:
        needs = "in other schedules: here every ramp starts from floor"
        refuse_idle("warmup_start", self.warmup_start, None, False, needs)

    def _ends(self) -> list[int]:
        if self.data_steps is not None:
            return [sum(self.data_steps[: i + 1]) for i in range(len(self.data_steps))]
        shares = self._shares()
        return [round_share(sum(shares[: i + 1]), self._total()) for i in range(len(shares))]

    @property
    def last_step(self) -> int | None:
        return sum(self.data_steps) if self.data_steps is not None else self.total_steps

    def _multiplier(self, t: float) -> float:
        start = 0
        for i, end in enumerate(self._ends()):
            if t < end:
                peak = 1.0 if self.peaks is None else self.peaks[i]
                return self._one(t - start, end - start, peak)
            start = end
        return self.floor

    def _one(self, k: float, length: int, peak: float) -> float:
        share = 0.01 if self.warmup_fraction is None else self.warmup_fraction
        warmup = self.warmup_steps if self.warmup_steps is not None else round_share(share, length)
        if k < warmup:
            return self.floor + (peak - self.floor) * min(1.0, (k + self.warmup_offset) / warmup)
        return self.floor + (peak - self.floor) * (1 + math.cos(math.pi * (k - warmup) / (length - warmup))) / 2


def power_lr(tokens: float, sequences: float, a: float = 4.0, b: float = -0.51, max_lr: float = 0.02) -> float:
    """
    Absolute LR of the power law: `min(max_lr, sequences * a * tokens ** b)`.

    Paper: Shen et al., Power Scheduler (2408.13359), eq. 7. Under muP the constants hold as they are, with the hidden
    matrices' LR divided by `d_model/256`; without muP divide `a` and `max_lr` by that yourself.

    Args:
        tokens (`float`): Tokens trained so far, at least 0; 0 gives `max_lr`.
        sequences (`float`): Batch size in sequences of 4096 tokens.

    Example:
    ```python
    >>> [round(power_lr(n, 1024, max_lr=1.0), 7) for n in (1e9, 1e10, 1e11, 1e12)]
    [0.1052834, 0.0325357, 0.0100545, 0.0031071]
    ```
    """
    check_number("tokens", tokens, 0.0, math.inf)
    check_number("sequences", sequences, 0.0, math.inf, low_open=True)
    check_number("a", a, 0.0, math.inf, low_open=True)
    check_number("b", b, -math.inf, 0.0, high_open=True, fix="The paper uses -0.51.")
    check_number("max_lr", max_lr, 0.0, math.inf, low_open=True)
    return max_lr if tokens == 0 else min(max_lr, sequences * a * tokens**b)


@dataclass(frozen=True, kw_only=True)
class power(_Warm):
    """
    Power scheduler: the LR is a power law of the tokens seen, the same for every horizon and batch size.

    Formula: `eta(n) = min(max_lr, beta a n^b)`; `(n/N_w) eta(N_w)` in the warm-up; in the last `D` updates
    `f(x) eta(N - N_d)` with f from 1 to 0. The multiplier is `eta / reference_lr`.
    Paper: Shen et al., Power Scheduler (2408.13359), eq. 7 and 8.

    Args:
        total_steps (`int`, *optional*): Updates of the run; without it there is no decay.
        tokens_per_step (`int`): Tokens in one optimizer update, over all processes.
        batch_changes (`tuple[tuple[int, int], ...]`, *optional*): Of a batch that changes during the run: pairs of
            finished updates, ascending, and the tokens of one update from there on. `n` is then the sum of what each
            update had and `beta` that of the update in hand, also in warm-up and decay, so the LR follows at once.
        max_lr (`float`, *optional*, defaults to 0.02), a (4.0), b (-0.51): Constants of the paper.
        sequence_length (`int`, *optional*, defaults to 4096): Tokens the paper's batch unit has;
            `beta = tokens_per_step / sequence_length`, derived here for other lengths.
        reference_lr (`float`, *optional*): The optimizer's LR; `max_lr` if `None`. LRScheduleCallback checks it.
        decay_steps, decay_fraction (*optional*): Final decay; neither: 0.1 of the run.
        shape (`str`, *optional*, defaults to `"affine-exponential"`), decay_offset: Decay to zero.

    Raises:
        ValueError: `tokens_per_step` is missing, phases that do not fit, changes that do not ascend, a bad value.

    Example:
    ```python
    >>> schedule = power(tokens_per_step=1024 * 4096)
    >>> [round(0.02 * schedule(n / (1024 * 4096)), 7) for n in (1e10, 1e11, 1e12)]
    [0.02, 0.0100545, 0.0031071]
    >>> grown = schedule.with_batch(100_000, 2048 * 4096)  # twice the batch after 100,000 updates
    >>> [round(0.02 * grown(t), 7) for t in (99_999, 100_000)]
    [0.0048396, 0.0096791]
    ```
    """

    absolute: ClassVar[bool] = True

    tokens_per_step: int | None = None
    batch_changes: tuple[tuple[int, int], ...] = ()
    max_lr: float = 0.02
    a: float = 4.0
    b: float = -0.51
    sequence_length: int = 4096
    reference_lr: float | None = None
    decay_steps: int | None = None
    decay_fraction: float | None = None
    shape: str = "affine-exponential"
    decay_offset: DecayOffset = "inside"

    def _check(self) -> None:
        check_steps("tokens_per_step", self._tokens(), 1)
        self._check_changes()
        check_steps("sequence_length", self.sequence_length, 1)
        object.__setattr__(self, "reference_lr", self._reference())
        check_number("reference_lr", self.reference_lr, 0.0, math.inf, low_open=True)
        power_lr(1.0, 1.0, self.a, self.b, self.max_lr)
        super()._check()
        check_one_of("decay_steps", self.decay_steps, "decay_fraction", self.decay_fraction)
        check_shape(self.shape, 0.0)
        check_choice("decay_offset", self.decay_offset, ("start", "end", "inside"))
        if self.total_steps is not None and self.warmup + self.decay_length > self.total_steps:
            raise ValueError(
                f"warm-up ({self.warmup}) + decay ({self.decay_length}) do not fit into total_steps="
                f"{self.total_steps}. Shorten one of them."
            )

    @property
    def decay_length(self) -> int:
        """Length of the final decay in updates."""
        if self.decay_steps is not None:
            return self.decay_steps
        return round_share(0.1 if self.decay_fraction is None else self.decay_fraction, self._total())

    def _tokens(self) -> int:
        if self.tokens_per_step is None:
            raise ValueError("power needs tokens_per_step=..., the tokens in one update over all processes.")
        return self.tokens_per_step

    def _reference(self) -> float:
        return self.max_lr if self.reference_lr is None else self.reference_lr

    def with_batch(self, at: int, tokens_per_step: int) -> Self:
        """
        Return the schedule of a run whose updates have another number of tokens after `at` finished ones.

        Raises:
            ValueError: a change after that update is planned already, or a bad value.
        """
        if self.batch_changes and at < self.batch_changes[-1][0]:
            raise ValueError(
                f"at={at} lies before the change of the batch at update {self.batch_changes[-1][0]}. Give all changes "
                "in their order, as batch_changes=."
            )
        kept = tuple(change for change in self.batch_changes if change[0] != at)
        if at == 0:
            return self.replace(tokens_per_step=tokens_per_step, batch_changes=kept)
        return self.replace(batch_changes=(*kept, (at, tokens_per_step)))

    def _check_changes(self) -> None:
        before = 0
        if not isinstance(self.batch_changes, (list, tuple)):
            raise ValueError(
                f"batch_changes={self.batch_changes!r} must be pairs such as ((1000, 8192), (2000, 16384))."
            )
        for change in self.batch_changes:
            if not isinstance(change, (list, tuple)) or len(change) != 2:
                raise ValueError(f"batch_changes has {change!r}, which is no pair of updates and tokens_per_step.")
            check_steps("the updates of a change in batch_changes", change[0], before + 1, "They ascend, from 1 on.")
            check_steps("the tokens of a change in batch_changes", change[1], 1)
            before = change[0]
        object.__setattr__(self, "batch_changes", tuple((at, tokens) for at, tokens in self.batch_changes))

    def _batch(self, t: float) -> int:
        """Return the tokens of the update after `t` finished ones."""
        tokens = self._tokens()
        for at, changed in self.batch_changes:
            tokens = changed if t >= at else tokens
        return tokens

    def _seen(self, t: float) -> float:
        """Return the tokens of the first `t` updates."""
        seen, since, tokens = 0.0, 0.0, self._tokens()
        for at, changed in self.batch_changes:
            if t <= at:
                break
            seen, since, tokens = seen + (at - since) * tokens, at, changed
        return seen + (t - since) * tokens

    def _eta(self, t: float, now: float) -> float:
        """Return the law at the tokens after `t` updates, for the batch of the update after `now`."""
        return power_lr(self._seen(t), self._batch(now) / self.sequence_length, self.a, self.b, self.max_lr)

    def _rise(self, t: float) -> float:
        if not self.batch_changes:
            return self._ramp(t)
        start = self.floor if self.warmup_start is None else self.warmup_start
        return start + (1 - start) * min(1.0, self._seen(t + self.warmup_offset) / self._seen(self.warmup))

    def _multiplier(self, t: float) -> float:
        if t < self.warmup:
            return self._rise(t) * self._eta(self.warmup, t) / self._reference()
        if self.total_steps is not None and t >= self.total_steps - self.decay_length:
            begin = self.total_steps - self.decay_length
            if self.decay_length == 0:
                return self._eta(t, t) / self._reference()
            position = decay_position(t - begin, self.decay_length, self.decay_offset)
            return max(self.floor, decay(self.shape, position, 0.0) * self._eta(begin, t) / self._reference())
        return max(self.floor, self._eta(t, t) / self._reference())
