"""Which logged metric tells the runs of a sweep apart early, and how surely."""

from __future__ import annotations

import math
import statistics
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

#: fewer runs have so few pairs that a rank correlation says nothing
FEWEST_RUNS = 5
#: fewer values of a run are no curve
FEWEST_VALUES = 5
#: E2LM's weights of signal quality, ranking consistency, and domain compliance, which no log can tell
WEIGHT_QUALITY, WEIGHT_RANKING, WEIGHT_DOMAIN = 0.5, 0.1, 0.4
#: Kendall's tau from which on an early order counts as the final one
AGREES = 0.8
_FRACTIONS = tuple(round(0.05 * i, 2) for i in range(1, 20))

#: step -> value of one metric in one run
Series = Mapping[float, float]


@dataclass(frozen=True)
class Tau:
    """
    A rank correlation over runs.

    Args:
        value (`float` or `None`): Kendall's tau-b in `[-1, 1]`; `None` with fewer than 5 runs, or where all are equal.
        low, high (`float` or `None`): 95 % interval over runs that are drawn again.
    """

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class MetricSignal:
    """
    What [`rank_metrics`] says of one metric. No number here knows whether higher is better.

    Args:
        name (`str`): As it is logged.
        monotonicity (`float`): `|mean over runs of Spearman(t, m_t)|`, in `[0, 1]`; 0 where it is constant.
        signal_to_noise (`float`): Median over runs of `|m_T - m_0| / sd(first differences of the detrended curve)`.
        spread (`float`): Sd between runs over the noise within one, at the early fraction.
        ranking ([`Tau`]): Order of the runs at the early fraction against their order at the end.
        earliest (`float` or `None`): First fraction from which on tau is at least 0.8 until the end.
        earliest_surely (`float` or `None`): The same for the lower end of its interval.
        to_target ([`Tau`]): Order by this metric at the early fraction against the order by the target at the end.
        quality (`float`): Ours, in `[0, 1]`: mean of monotonicity and `s / (1 + s)`, `s` the signal to noise.
        score (`float` or `None`): `0.5 quality + 0.1 max(tau, 0)`, of 0.6: E2LM's without its third part.
    """

    name: str
    monotonicity: float
    signal_to_noise: float
    spread: float
    ranking: Tau
    earliest: float | None
    earliest_surely: float | None
    to_target: Tau
    quality: float
    score: float | None

    @property
    def has_signal(self) -> bool:
        """Whether the metric moves at all."""
        return self.signal_to_noise > 0 or self.monotonicity > 0


def ranks(values: Sequence[float]) -> list[float]:
    """
    Return ranks from 1; equal values share the mean of theirs.

    Example:
    ```python
    >>> ranks([0.3, 0.1, 0.3])
    [2.5, 1.0, 2.5]
    ```
    """
    order = sorted(values)
    return [(bisect_right(order, value) + 1 + sum(other < value for other in order)) / 2 for value in values]


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """
    Return Spearman's rank correlation, 0 where a side is constant or has fewer than 2 values.

    Raises:
        ValueError: unequal lengths, or a value that is not finite.

    Example:
    ```python
    >>> round(spearman(range(5), [0.1, 0.12, 0.11, 0.2, 0.3]), 10)
    0.9
    ```
    """
    _check_pairs(x, y)
    if len(set(x)) < 2 or len(set(y)) < 2:
        return 0.0
    return statistics.correlation(ranks(x), ranks(y))


def kendall(x: Sequence[float], y: Sequence[float]) -> float:
    """
    Return Kendall's tau-b, 0 where a side is constant or has fewer than 2 values.

    Formula: `(concordant - discordant) / sqrt((pairs - ties in x) (pairs - ties in y))`.

    Raises:
        ValueError: unequal lengths, or a value that is not finite.

    Example:
    ```python
    >>> round(kendall(range(5), [0.1, 0.12, 0.11, 0.2, 0.3]), 10)
    0.8
    ```
    """
    _check_pairs(x, y)
    return _kendall(x, y) or 0.0


def _check_pairs(x: Sequence[float], y: Sequence[float]) -> None:
    if len(x) != len(y):
        raise ValueError(f"{len(x)} and {len(y)} values cannot be paired. Pass one of each for every run.")
    if not all(map(math.isfinite, (*x, *y))):
        raise ValueError("Values must be finite. Leave runs out that have none.")


def _kendall(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Return tau-b, `None` where a side is constant."""
    total = in_x = in_y = 0
    for i in range(len(x)):
        for j in range(i):
            a, b = (x[i] > x[j]) - (x[i] < x[j]), (y[i] > y[j]) - (y[i] < y[j])
            total, in_x, in_y = total + a * b, in_x + abs(a), in_y + abs(b)
    return total / math.sqrt(in_x * in_y) if in_x and in_y else None


def tau_with_interval(x: Sequence[float], y: Sequence[float], draws: int = 500, seed: int = 0) -> Tau:
    """
    Return Kendall's tau of two orders of the same runs, with a 95 % interval over runs that are drawn again.

    Args:
        x, y (`Sequence[float]`): One value of each run.
        draws (`int`, *optional*, defaults to 500): At least 20.
        seed (`int`, *optional*, defaults to 0): Of the draws.

    Raises:
        ValueError: unequal lengths, a value that is not finite, or too few draws.

    Example:
    ```python
    >>> tau_with_interval([1, 2, 3, 4], [1, 2, 3, 4])  # four runs have six pairs: that says nothing
    Tau(value=None, low=None, high=None)
    >>> tau_with_interval([1, 2, 3, 4, 5], [1, 2, 3, 4, 5])
    Tau(value=1.0, low=1.0, high=1.0)
    ```
    """
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 20:
        raise ValueError(f"draws={draws!r} must be a whole number of at least 20.")
    _check_pairs(x, y)
    value = _kendall(x, y) if len(x) >= FEWEST_RUNS else None
    if value is None:
        return Tau(None)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, len(x), (draws, len(x)), generator=generator).tolist()
    found = sorted(tau for row in drawn if (tau := _kendall([x[i] for i in row], [y[i] for i in row])) is not None)
    return Tau(value, found[int(0.025 * (len(found) - 1))], found[math.ceil(0.975 * (len(found) - 1))])


def noise_of(series: Series) -> float:
    """
    Return the standard deviation of the first differences of a curve, less its straight line; 0 with fewer than 3.

    Example:
    ```python
    >>> noise_of({1: 1.0, 2: 2.0, 3: 3.0}), round(noise_of({1: 0.0, 2: 1.0, 3: 0.0}), 6)
    (0.0, 1.414214)
    ```
    """
    if len(series) < 3:
        return 0.0
    steps = sorted(series)
    values = [series[step] for step in steps]
    slope, offset = statistics.linear_regression(steps, values)
    left = [value - slope * step - offset for step, value in zip(steps, values, strict=True)]
    noise = statistics.stdev(after - before for before, after in zip(left, left[1:], strict=False))
    return noise if noise > 1e-9 * max(map(abs, values)) else 0.0


def value_at(series: Series, fraction: float) -> float | None:
    """
    Return the last value up to a fraction of a run, whose last logged step is its end; `None` before the first.

    Example:
    ```python
    >>> value_at({10: 3.0, 50: 2.0, 100: 1.0}, 0.5), value_at({10: 3.0, 100: 1.0}, 0.05)
    (2.0, None)
    ```
    """
    steps = sorted(series)
    place = bisect_right(steps, fraction * steps[-1] * (1 + 1e-9))
    return series[steps[place - 1]] if place else None


def rank_metrics(
    runs: Sequence[Mapping[str, Series]],
    early: float = 0.1,
    target: str = "eval_loss",
    draws: int = 500,
    seed: int = 0,
) -> list[MetricSignal]:
    """
    Say of each metric how early it orders the runs as their end does, the best first.

    The metrics are those that each run logged at least five times, and by the early fraction. It orders, and stops
    nothing: an early signal was shown among variants of one setting only. Paper of the weights: E2LM, as far as its
    parts can be computed here.

    Args:
        runs (`Sequence[Mapping]`): For each run, metric -> step -> value, from beginning to end; values that are not
            finite count as not logged.
        early (`float`, *optional*, defaults to 0.1): Fraction of a run at which it is judged, in `(0, 1)`.
        target (`str`, *optional*, defaults to `"eval_loss"`): The metric whose end counts.
        draws (`int`, *optional*, defaults to 500): Of [`tau_with_interval`].
        seed (`int`, *optional*, defaults to 0): Of the draws.

    Raises:
        ValueError: fewer than 2 runs, a fraction out of range, no common metric, or a target that a run never logged.

    Example:
    ```python
    >>> curves = [{"eval_loss": {t: 1 + run + 1 / t for t in range(1, 21)}} for run in range(6)]
    >>> (found,) = rank_metrics(curves)
    >>> found.ranking.value, found.earliest, found.monotonicity
    (1.0, 0.05, 1.0)
    ```
    """
    if len(runs) < 2:
        raise ValueError(f"{len(runs)} runs cannot be ordered. Give at least 2, better {FEWEST_RUNS} or more.")
    if not 0 < early < 1:
        raise ValueError(f"early={early!r} must lie between 0 and 1, e.g. 0.1.")
    kept = [{name: _finite(series) for name, series in run.items()} for run in runs]
    if any(not run.get(target) for run in kept):
        raise ValueError(f"A run never logged {target!r}. Choose a target that all of them have.")
    names = [
        name
        for name in kept[0]
        if all(len(run.get(name, ())) >= FEWEST_VALUES and value_at(run[name], early) is not None for run in kept)
    ]
    if not names:
        raise ValueError(
            f"No metric was logged {FEWEST_VALUES} times in every run, and by {early:.0%} of it. Log more often."
        )
    ends = [value for run in kept if (value := value_at(run[target], 1.0)) is not None]
    found = [_signal(name, [run[name] for run in kept], early, ends, draws, seed) for name in names]
    return sorted(found, key=lambda one: (-(one.score if one.score is not None else 0.5 * one.quality), one.name))


def _finite(series: Series) -> dict[float, float]:
    return {step: float(value) for step, value in series.items() if math.isfinite(value)}


def _values_at(curves: Sequence[Series], fraction: float) -> list[float] | None:
    found = [value_at(curve, fraction) for curve in curves]
    values = [value for value in found if value is not None]
    return values if len(values) == len(found) else None


def _signal(
    name: str, curves: Sequence[Series], early: float, target: Sequence[float], draws: int, seed: int
) -> MetricSignal:
    orders = [spearman(sorted(curve), [curve[step] for step in sorted(curve)]) for curve in curves]
    monotonicity = abs(statistics.fmean(orders))
    noises = [noise_of(curve) for curve in curves]
    gains = [abs(curve[max(curve)] - curve[min(curve)]) for curve in curves]
    ratio = statistics.median(
        gain / noise if noise else (math.inf if gain else 0.0) for gain, noise in zip(gains, noises, strict=True)
    )
    now, end = _values_at(curves, early) or [], _values_at(curves, 1.0) or []
    between, within = statistics.stdev(now), statistics.fmean(noises)
    ranking = tau_with_interval(now, end, draws, seed)
    quality = (monotonicity + (1.0 if math.isinf(ratio) else ratio / (1 + ratio))) / 2
    taus = {
        fraction: tau_with_interval(values, end, draws, seed)
        for fraction in _FRACTIONS
        if (values := _values_at(curves, fraction)) is not None
    }
    return MetricSignal(
        name,
        monotonicity,
        ratio,
        between / within if within else (math.inf if between else 0.0),
        ranking,
        _earliest({fraction: tau.value for fraction, tau in taus.items()}),
        _earliest({fraction: tau.low for fraction, tau in taus.items()}),
        tau_with_interval(now, target, draws, seed),
        quality,
        None if ranking.value is None else WEIGHT_QUALITY * quality + WEIGHT_RANKING * max(ranking.value, 0.0),
    )


def _earliest(taus: Mapping[float, float | None]) -> float | None:
    """Return the first fraction from which on all are high enough."""
    found = None
    for fraction in sorted(taus, reverse=True):
        tau = taus[fraction]
        if tau is None or tau < AGREES:
            break
        found = fraction
    return found
