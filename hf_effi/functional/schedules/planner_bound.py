"""Plan a schedule before training: the convex last-iterate bound, evaluated on the actual learning rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ._checks import as_numbers, check_number, check_steps


@dataclass(frozen=True)
class Bound:
    """
    The three terms of the bound for one schedule at base LR 1.

    Args:
        distance (`float`): `D^2 / (2 H)`; divided by the base LR.
        noise (`float`): `sum eta^2 G^2 / (2 H)`; times the base LR.
        last (`float`): The price of taking the last iterate; times the base LR.
    """

    distance: float
    noise: float
    last: float

    def at(self, base_lr: float) -> float:
        """Value of the bound at a base LR."""
        return self.distance / base_lr + base_lr * (self.noise + self.last)

    @property
    def best_lr(self) -> float:
        """Base LR at which the bound is lowest."""
        return math.sqrt(self.distance / (self.noise + self.last))

    @property
    def best(self) -> float:
        """Lowest value of the bound over the base LR."""
        return 2 * math.sqrt(self.distance * (self.noise + self.last))


def omega(etas: Sequence[float], gradient_norms: Sequence[float] | None = None, distance: float = 1.0) -> Bound:
    """
    Bound on the suboptimality of the last iterate for learning rates `eta_1..eta_T`.

    Formula, with `S_k = sum_{t>=k} eta_t` and `Q_k = sum_{t>=k} eta_t^2 G_t^2`:
    `D^2/(2 S_1) + Q_1/(2 S_1) + 1/2 sum_{k<T} eta_k/S_{k+1} Q_k/S_k`.
    Paper: Schaipp et al., The Surprising Agreement Between Convex Optimization Theory and Learning-Rate Scheduling for
    Large Model Training (2501.18965); theorem 10 of 2310.07831.

    Args:
        etas (`Sequence[float]`): Learning rates, one per update; trailing zeros are dropped.
        gradient_norms (`Sequence[float]`, *optional*): G_t, all 1 if `None`.
        distance (`float`, *optional*, defaults to 1.0): D.

    Raises:
        ValueError: a negative or NaN LR, all zero, or lengths that differ.

    Example:
    ```python
    >>> bound = omega([1 - t / 400 for t in range(400)])
    >>> round(bound.best_lr, 6), round(bound.best, 6)
    (0.049563, 0.10063)
    ```
    """
    fix = "For a schedule object pass its trace()."
    eta = torch.tensor(as_numbers("etas", etas, fix), dtype=torch.float64)
    if len(eta) == 0 or not bool(torch.isfinite(eta).all()) or bool((eta < 0).any()) or eta.sum() == 0:
        raise ValueError("Learning rates must be finite, at least 0 and not all 0. Check the schedule's trace().")
    check_number("distance", distance, 0.0, math.inf, low_open=True)
    norms = (
        torch.ones_like(eta)
        if gradient_norms is None
        else torch.tensor(as_numbers("gradient_norms", gradient_norms), dtype=torch.float64)
    )
    if len(norms) != len(eta):
        raise ValueError(f"{len(norms)} gradient norms for {len(eta)} learning rates. Pass one for each.")
    last = int(eta.nonzero().max()) + 1
    eta, norms = eta[:last], norms[:last]
    tail = eta.flip(0).cumsum(0).flip(0)
    noise = (eta * norms).square().flip(0).cumsum(0).flip(0)
    final = 0.5 * (eta[:-1] / tail[1:] * noise[:-1] / tail[:-1]).sum() if last > 1 else torch.zeros(())
    return Bound(float(distance**2 / (2 * tail[0])), float(noise[0] / (2 * tail[0])), float(final))


def omega_curve(etas: Sequence[float], base_lr: float, points: int = 50) -> list[tuple[int, float]]:
    """Return `(t, bound after t updates)` at about `points` prefixes: the predicted shape of the loss curve."""
    check_steps("points", points, 1)
    total = len(etas)
    steps = sorted({max(1, round(total * (i + 1) / points)) for i in range(points)})
    return [(t, omega(etas[:t]).at(base_lr)) for t in steps if any(etas[:t])]


def wsd_shape(total: int, fraction: float) -> list[float]:
    """
    Plateau and linear cooldown as the bound's authors write it: cooldown point k is `1-(k+1)/D`, without the last 0.

    Example:
    ```python
    >>> wsd_shape(4, 0.5)
    [1.0, 1.0, 1.0, 0.5]
    ```
    """
    length = round(fraction * (total + 1))
    plateau = total + 1 - length
    return ([1.0] * plateau + [1 - (k + 1) / length for k in range(length)])[:total] if length else [1.0] * total


def lr_transfer(from_shape: Sequence[float], to_shape: Sequence[float]) -> float:
    """
    Factor by which a tuned peak LR changes when the shape of the schedule does.

    Formula: `gamma*(to) / gamma*(from)`, the ratio of the bound's best base LRs.

    Example:
    ```python
    >>> linear = [1 - t / 400 for t in range(400)]
    >>> round(lr_transfer(linear, wsd_shape(400, 0.2)), 2)
    0.51
    ```
    """
    return omega(to_shape).best_lr / omega(from_shape).best_lr


def _golden_section(function: Callable[[float], float], low: float, high: float, tolerance: float = 1e-4) -> float:
    ratio = (math.sqrt(5) - 1) / 2
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    fa, fb = function(a), function(b)
    while high - low > tolerance:
        if fa <= fb:
            high, b, fb = b, a, fa
            a = high - ratio * (high - low)
            fa = function(a)
        else:
            low, a, fa = a, b, fb
            b = low + ratio * (high - low)
            fb = function(b)
    return (low + high) / 2


def best_cooldown_fraction(total: int, base_lr: float | None = None) -> float:
    """
    Cooldown length of WSD that the bound likes best.

    Args:
        total (`int`): Updates.
        base_lr (`float`, *optional*): Plateau LR in the units of [`omega`] when it is not re-tuned for each length;
            `None` re-tunes it, and the answer tends to 1: the longer the better, little gained past 0.6.

    Example:
    ```python
    >>> tuned_for_20_percent = omega(wsd_shape(400, 0.2)).best_lr
    >>> round(best_cooldown_fraction(400, 1.5 * tuned_for_20_percent), 1)
    0.7
    ```
    """

    def value(fraction: float) -> float:
        bound = omega(wsd_shape(total, fraction))
        return bound.best if base_lr is None else bound.at(base_lr)

    return _golden_section(value, 0.02, 1.0, 1e-3)


def _crossing(function: Callable[[float], float], low: float, high: float, tolerance: float = 1e-4) -> float:
    """Where a rising function crosses 0; the nearer end where it does not."""
    if function(low) >= 0:
        return low
    if function(high) <= 0:
        return high
    while high - low > tolerance:
        middle = (low + high) / 2
        low, high = (low, middle) if function(middle) >= 0 else (middle, high)
    return (low + high) / 2


@dataclass(frozen=True)
class ExtensionPlan:
    """
    How to go on with a WSD run that was planned for fewer updates, at its old peak LR.

    Args:
        old_steps, new_steps (`int`): Length planned and length wanted.
        plateau_factor (`float`): Either: lower the plateau to this from the old cooldown start on.
        cooldown_fraction (`float`): Or: keep the plateau and make the cooldown this share of the new run.
        gain_plateau, gain_cooldown (`float`): Predicted bound relative to the old cooldown share at the old LR (below
            1 is better).
    """

    old_steps: int
    new_steps: int
    plateau_factor: float
    cooldown_fraction: float
    gain_plateau: float
    gain_cooldown: float


def plan_extension(old_steps: int, new_steps: int, cooldown_fraction: float = 0.2) -> ExtensionPlan:
    """
    Plan the extension of a WSD run whose peak LR was tuned for `old_steps`.

    Both remedies are chosen such that the old peak LR is again the one the bound likes best. Minimising the bound at
    the old LR instead gives slightly stronger remedies with nearly the same value.

    Example:
    ```python
    >>> plan = plan_extension(4000, 8000)
    >>> round(plan.plateau_factor, 2), round(plan.cooldown_fraction, 2)
    (0.53, 0.63)
    ```
    """
    check_steps("old_steps", old_steps, 2)
    check_steps("new_steps", new_steps, old_steps, "An extension is not shorter than the run.")
    check_number("cooldown_fraction", cooldown_fraction, 0.0, 1.0, low_open=True)
    base = omega(wsd_shape(old_steps, cooldown_fraction)).best_lr
    naive_shape = wsd_shape(new_steps, cooldown_fraction)
    naive = omega(naive_shape).at(base)
    kept = old_steps - round(cooldown_fraction * (old_steps + 1)) + 1

    def lowered(factor: float) -> list[float]:
        return [e * (1.0 if t < kept else factor) for t, e in enumerate(naive_shape)]

    def longer(fraction: float) -> list[float]:
        return wsd_shape(new_steps, fraction)

    # A lower plateau and a longer cooldown both raise the best base LR of the shape, up to the one the run has.
    factor = _crossing(lambda x: base - omega(lowered(x)).best_lr, 0.02, 1.0)
    fraction = _crossing(lambda x: omega(longer(x)).best_lr - base, cooldown_fraction, 1.0)
    gain_plateau, gain_cooldown = omega(lowered(factor)).at(base) / naive, omega(longer(fraction)).at(base) / naive
    return ExtensionPlan(old_steps, new_steps, factor, fraction, gain_plateau, gain_cooldown)
