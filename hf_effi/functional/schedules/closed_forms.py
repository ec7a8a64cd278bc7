"""Whole-run curves: linear, cosine, inverse square root, REX, UBA, cosine power annealing, damped cosine, constant."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..options import refuse_idle
from ._checks import check_number, check_steps
from .base import _Warm


@dataclass(frozen=True, kw_only=True)
class constant(_Warm):
    """
    Constant LR after the warm-up.

    Formula: `m(t) = 1`. Also half of "constant LR + weight averaging", see `hf_effi.functional.averaging`.

    Example:
    ```python
    >>> constant(4, warmup_steps=2).trace()
    [0.5, 1.0, 1.0, 1.0]
    ```
    """

    def _check(self) -> None:
        super()._check()
        acts = self._asks_for_warmup and self.warmup_start is None
        refuse_idle("floor", self.floor, 0.0, acts, "as the start of a warm-up without warmup_start")

    def _after_warmup(self, t: float) -> float:
        return 1.0


@dataclass(frozen=True, kw_only=True)
class linear(_Warm):
    """
    Linear decay to `floor`, the worst-case-optimal schedule for the last iterate.

    Formula: `m = floor + (1-floor)(1-p)`, `p = (t-W)/(T-W)`.
    Paper: Defazio et al., When, Why and How Much? (2310.07831).

    Args:
        total_steps (`int`, *optional*): Updates of the run; `None` to have it inferred.
        floor (`float`, *optional*, defaults to 0.0): Multiplier after the last update, in [0, 1].
        warmup_steps, warmup_fraction, warmup_start, warmup_offset: Linear warm-up, default none.

    Example:
    ```python
    >>> linear(4).trace()
    [1.0, 0.75, 0.5, 0.25]
    ```
    """

    def _curve(self, p: float) -> float:
        return self.floor + (1 - self.floor) * (1 - p)


@dataclass(frozen=True, kw_only=True)
class cosine(_Warm):
    """
    Half a cosine from the peak to `floor`.

    Formula: `m = floor + (1-floor)(1+cos(pi p))/2`, `p = (t-W)/(T-W)`.
    Paper: Loshchilov and Hutter, SGDR (1608.03983), without restarts.

    Args: as [`linear`].

    Example:
    ```python
    >>> [round(m, 6) for m in cosine(4, floor=0.1).trace()]
    [1.0, 0.868198, 0.55, 0.231802]
    ```
    """

    def _curve(self, p: float) -> float:
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * p)) / 2


@dataclass(frozen=True, kw_only=True)
class inverse_sqrt(_Warm):
    """
    Inverse square root of the step, with a lowest value; needs no length of the run.

    Formula: `m = max(floor, sqrt(s / (t - W + s)))`, `s = timescale_steps`.
    Paper: Zhai et al., Scaling Vision Transformers (2106.04560); with `s = W` it is Vaswani et al. (1706.03762).

    Args:
        timescale_steps (`int`, *optional*): Steps after which the curve has fallen to `1/sqrt(2)`. `None`: the warm-up
            length, or 10000 without a warm-up (as transformers does).
        total_steps, floor, warmup_*: as [`linear`].

    Example:
    ```python
    >>> [round(inverse_sqrt(timescale_steps=100)(t), 6) for t in (0, 100, 300)]
    [1.0, 0.707107, 0.5]
    ```
    """

    timescale_steps: int | None = None

    def _check(self) -> None:
        super()._check()
        if self.timescale_steps is not None:
            check_steps("timescale_steps", self.timescale_steps, 1)

    def _after_warmup(self, t: float) -> float:
        scale = self.timescale_steps or self.warmup or 10_000
        return max(self.floor, math.sqrt(scale / (t - self.warmup + scale)))


@dataclass(frozen=True, kw_only=True)
class rex(_Warm):
    """
    REX, the reflected exponential: holds the LR high for long and falls late.

    Formula: `m = floor + (1-floor) z / ((1-kappa) + kappa z)`, `z = 1-p`.
    Paper: Chen et al., REX: Revisiting Budgeted Training (2107.04197), where kappa = 1/2. A widely copied port uses
    0.9, which is much flatter; pass `kappa=0.9` to reproduce it.

    Args:
        kappa (`float`, *optional*, defaults to 0.5): Bend, in [0, 1). 0 is linear decay.
        total_steps, floor, warmup_*: as [`linear`].

    Example:
    ```python
    >>> [round(rex(100)(t), 6) for t in (25, 50, 75, 90)]
    [0.857143, 0.666667, 0.4, 0.181818]
    ```
    """

    kappa: float = 0.5

    def _check(self) -> None:
        super()._check()
        check_number("kappa", self.kappa, 0.0, 1.0, high_open=True, fix="The paper uses 0.5; a common port 0.9.")

    def _curve(self, p: float) -> float:
        z = 1 - p
        return self.floor + (1 - self.floor) * z / ((1 - self.kappa) + self.kappa * z)


@dataclass(frozen=True, kw_only=True)
class uba(_Warm):
    """
    UBA, the unified budget-aware schedule: one knob from "hold, then drop" to "decay early".

    Formula: `m = floor + (1-floor) 2(1+c) / (2 phi + (2-phi)(1+c))`, `c = cos(pi p)`. `phi = 2` is cosine.
    Paper: Tang et al., Stepsize anything: a unified learning rate schedule for budgeted-iteration training
    (2505.24452). The `(1-p)^phi` of other ports is another curve.

    Args:
        phi (`float`, *optional*, defaults to 1.0): Above 0; larger decays earlier. Our default, not the paper's.
        total_steps, floor, warmup_*: as [`linear`].

    Raises:
        ValueError: `phi` is not above 0 (the curve would be 0/0 at the end).

    Example:
    ```python
    >>> [round(uba(100, phi=0.5)(t), 4) for t in (25, 50, 75, 90)]
    [0.9589, 0.8, 0.407, 0.0912]
    ```
    """

    phi: float = 1.0

    def _check(self) -> None:
        super()._check()
        check_number("phi", self.phi, 0.0, math.inf, low_open=True, fix="phi=2 is cosine; smaller holds longer.")

    def _curve(self, p: float) -> float:
        u = 1 + math.cos(math.pi * p)
        return self.floor + (1 - self.floor) * 2 * u / (2 * self.phi + (2 - self.phi) * u)


@dataclass(frozen=True, kw_only=True)
class cosine_power(_Warm):
    """
    Cosine power annealing: a cosine on an exponential scale, so that it falls faster at first.

    Formula: `q = (b^{c+1} - b) / (b^2 - b)` with `c = (1+cos(pi p))/2` and base `b`; `q = c` for b = 1;
    `m = floor + (1-floor) q`.
    Paper: Hundt et al., sharpDARTS (1903.09900).

    Args:
        base (`float`, *optional*, defaults to 2.0): At least 1; 1 is cosine (paper: 2 on CIFAR-10, 10 on ImageNet).
        spread (`bool`, *optional*, defaults to `False`): Reach `floor` in the last update instead of after it:
            `p = (t-W)/(T-W-1)`, with the reference's rescaling so that the first update is at the peak.
        total_steps, floor, warmup_*: as [`linear`].

    Raises:
        ValueError: `base` below 1.

    Example:
    ```python
    >>> [round(cosine_power(10, base=10)(t), 5) for t in (0, 2, 5, 9)]
    [1.0, 0.78069, 0.24025, 0.00644]
    >>> [round(m, 5) for m in cosine_power(10, base=10, spread=True).trace()][1:4]
    [0.83129, 0.61777, 0.41569]
    ```
    """

    base: float = 2.0
    spread: bool = False

    def _check(self) -> None:
        super()._check()
        check_number("base", self.base, 1.0, math.inf, fix="base=1 is cosine; the paper uses 2 and 10.")

    def _raw(self, p: float) -> float:
        c = (1 + math.cos(math.pi * p)) / 2
        if self.base == 1:
            return c
        # (b^{c+1} - b) / (b^2 - b) with one power of b cancelled, so that a large base does not overflow.
        return math.expm1(c * math.log(self.base)) / (self.base - 1)

    def _curve(self, p: float) -> float:
        if self.spread:
            n = self._total() - self.warmup
            if n <= 1:
                return 1.0 if p < 1 else self.floor
            # Updates 1..n are evaluated at p = 1/n..1 and rescaled to begin at exactly 1.
            q = self._raw(min(1.0, p + 1 / n)) / self._raw(1 / n)
        else:
            q = self._raw(p)
        return self.floor + (1 - self.floor) * q


@dataclass(frozen=True, kw_only=True)
class damped_cosine(_Warm):
    """
    Cosine cycles between two falling envelopes.

    Formula: peak `P = 1-(1-gamma)p`, valley `V = (1-p)/2 + floor p`,
    `m = (P+V)/2 + (P-V)/2 cos(pi (2N-1) p)`, clamped to [floor, 1]; `m = floor` at the end whatever gamma.
    Paper: Chinese ModernBERT with Whole-Word Masking (2510.12285), section 3.3; N and gamma of the paper could not be
    confirmed.

    Args:
        cycles (`int`, *optional*, defaults to 1): N, at least 1.
        gamma (`float`, *optional*, defaults to 0.0): Height of the last peak, in [0, 1].
        total_steps, floor, warmup_*: as [`linear`].

    Example:
    ```python
    >>> [round(damped_cosine(10, cycles=3, gamma=0.1, floor=0.1)(t), 3) for t in (0, 1, 2, 4, 10)]
    [1.0, 0.685, 0.42, 0.64, 0.1]
    ```
    """

    cycles: int = 1
    gamma: float = 0.0

    def _check(self) -> None:
        super()._check()
        check_steps("cycles", self.cycles, 1)
        check_number("gamma", self.gamma, 0.0, 1.0)
        if self.floor > 0.5:
            raise ValueError(f"floor={self.floor!r} is above 0.5, where the valley envelope would rise. Lower it.")

    def _curve(self, p: float) -> float:
        peak, valley = 1 - (1 - self.gamma) * p, (1 - p) / 2 + self.floor * p
        value = (peak + valley) / 2 + (peak - valley) / 2 * math.cos(math.pi * (2 * self.cycles - 1) * p)
        return min(1.0, max(self.floor, value))
