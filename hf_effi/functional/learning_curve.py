"""Where a learning curve will end: a power law with an asymptote on growing prefixes, and how steady that is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import RefusedError

#: three constants, and two values more than that
FEWEST = 5
#: fits that an interval and a sign test are of
RECENT = 5
#: successive small moves of the asymptote that make it steady
STEADY = 3
_POWERS = (1e-3, 2.0)
#: of a search for the exponent: places at once, and rounds, each of which narrows it by an eighth of the places
_PLACES, _ROUNDS = 33, 16
#: falls up to this share of the values' size are rounding
_ROUNDING = 1e-12


@dataclass(frozen=True)
class PowerCurve:
    """
    A fitted curve `y(t) = a + b t^-c`.

    Args:
        asymptote (`float`): `a`, in units of the metric.
        scale (`float`): `b`; above 0 where the metric falls, below 0 where it rises.
        power (`float`): `c`, in `(0, 2]`.
        residual (`float`): Root mean square of what the curve misses.
        count (`int`): Values that it was fitted to.
        last (`float`): The last `t` of them.
    """

    asymptote: float
    scale: float
    power: float
    residual: float
    count: int
    last: float

    def __call__(self, t: float) -> float:
        """Return the value of the curve after `t` updates, above 0."""
        return self.asymptote + self.scale * t**-self.power


@dataclass(frozen=True)
class Forecast:
    """
    What [`forecast`] says, in units of the metric. A distance is positive where the metric will still improve.

    Args:
        step (`float`): The last `t` that was seen.
        asymptote (`float`): What the curve tends to.
        remaining, remaining_low, remaining_high (`float`): Distance from the curve at `step` to its asymptote, and the
            range of that over the last five fits.
        at_end, at_end_low, at_end_high (`float` or `None`): The value at the end that was asked for, and the range of
            the last five fits.
        is_steady (`bool`): Whether the prediction level is reached: three successive moves of the asymptote below the
            tolerance, and no constant sign of the last five errors one value ahead.
        curve ([`PowerCurve`]): The last fit.
    """

    step: float
    asymptote: float
    remaining: float
    remaining_low: float
    remaining_high: float
    at_end: float | None
    at_end_low: float | None
    at_end_high: float | None
    is_steady: bool
    curve: PowerCurve


def fit_power_curve(
    steps: Sequence[float], values: Sequence[float], *, greater_is_better: bool = False, skip_fraction: float = 0.0
) -> PowerCurve:
    """
    Fit `y = a + b t^-c` by least squares.

    For each exponent the best `a` and `b` are known, so that only `c` in `(0, 2]` is searched. Values that are not
    finite are left out.

    Args:
        steps (`Sequence[float]`): Finished updates (or tokens, any unit) of each value: above 0 and rising.
        values (`Sequence[float]`): The metric.
        greater_is_better (`bool`, *optional*, defaults to `False`): Whether a better value is a higher one.
        skip_fraction (`float`, *optional*, defaults to 0.0): Values up to this share of the last step are left out:
            the start of a run follows another curve. In `[0, 1)`.

    Raises:
        ValueError: steps that do not rise or are not above 0, unequal lengths, or a share out of range.
        RefusedError: fewer than 5 finite values, values that are all equal, get worse, or have no asymptote within
            reach.

    Example:
    ```python
    >>> curve = fit_power_curve([1, 2, 4, 8, 16], [2 + 3 * t**-0.5 for t in (1, 2, 4, 8, 16)])
    >>> round(curve.asymptote, 10), round(curve.scale, 10), round(curve.power, 10)
    (2.0, 3.0, 0.5)
    ```
    """
    points = _usable(steps, values, skip_fraction)
    return _fit(points, greater_is_better)


def _usable(steps: Sequence[float], values: Sequence[float], skip_fraction: float) -> list[tuple[float, float]]:
    if len(steps) != len(values):
        raise ValueError(f"{len(steps)} steps but {len(values)} values. Pass one value for each step.")
    if not 0 <= skip_fraction < 1:
        raise ValueError(f"skip_fraction={skip_fraction!r} must be at least 0 and below 1.")
    if any(not math.isfinite(t) or t <= 0 for t in steps):
        raise ValueError("Steps must be finite and above 0. Leave an evaluation before the first update out.")
    if any(later <= earlier for earlier, later in zip(steps, steps[1:], strict=False)):
        raise ValueError("Steps must rise. Sort them, and pass one value for each.")
    least = skip_fraction * steps[-1] if steps else 0.0
    return [(float(t), float(y)) for t, y in zip(steps, values, strict=True) if math.isfinite(y) and t > least]


def _fit(points: Sequence[tuple[float, float]], greater_is_better: bool) -> PowerCurve:
    if len(points) < FEWEST:
        raise RefusedError(f"{len(points)} finite values are fewer than the {FEWEST} that a curve needs. Add some.")
    t, y = torch.tensor(points, dtype=torch.float64).T
    size = float(y.abs().max())
    if float(y.max() - y.min()) <= _ROUNDING * size:
        raise RefusedError("all values are equal, so that they tell no curve. Wait for more.")
    unit = float(t[-1])
    logs = (t / unit).log()  # of numbers up to 1, so that the powers stay in range
    low, high = _POWERS
    powers = torch.linspace(low, high, _PLACES, dtype=torch.float64)
    for _ in range(_ROUNDS):
        errors = _solve(powers, logs, y)[2]
        best = int(errors.argmin())
        low, high = float(powers[max(best - 2, 0)]), float(powers[min(best + 2, _PLACES - 1)])
        powers = torch.linspace(low, high, _PLACES, dtype=torch.float64)
    a, b, errors = _solve(powers, logs, y)
    best = int(errors.argmin())
    power, slope = float(powers[best]), float(b[best])
    if (slope < 0) != greater_is_better or abs(slope) <= _ROUNDING * size:
        raise RefusedError("the values get worse, so that there is no best one ahead. See greater_is_better.")
    if power <= _POWERS[0] * 1.01:
        raise RefusedError("the values go on like a logarithm, so that they tell no asymptote yet. Wait for more.")
    residual = math.sqrt(max(float(errors[best]), 0.0) / len(points))
    return PowerCurve(float(a[best]), slope * unit**power, power, residual, len(points), unit)


def _solve(powers: Tensor, logs: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best `a`, `b` and the sum of squares for each exponent; `(powers,)` each."""
    x = torch.exp(-powers[:, None] * logs)  # (powers, points)
    centred, around = x - x.mean(-1, keepdim=True), y - y.mean()
    b = (centred * around).sum(-1) / centred.square().sum(-1).clamp_min(1e-300)
    errors = (around - b[:, None] * centred).square().sum(-1)
    return y.mean() - b * x.mean(-1), b, errors


def asymptote_trace(
    steps: Sequence[float],
    values: Sequence[float],
    *,
    greater_is_better: bool = False,
    skip_fraction: float = 0.0,
    last: int | None = None,
) -> list[PowerCurve | None]:
    """
    Fit each prefix of the values, from five of them on.

    Args:
        steps, values, greater_is_better, skip_fraction: As in [`fit_power_curve`]; the share is of each prefix's own
            last step.
        last (`int`, *optional*): Only the so many longest prefixes, at least 1; all if `None`.

    Returns:
        One curve for each prefix that ends in a finite value, `None` where it tells none.

    Raises:
        ValueError: as [`fit_power_curve`].

    Example:
    ```python
    >>> steps = [1, 2, 4, 8, 16, 32]
    >>> trace = asymptote_trace(steps, [2 + 3 * t**-0.5 for t in steps])
    >>> [round(curve.asymptote, 8) for curve in trace]
    [2.0, 2.0]
    ```
    """
    if last is not None and (isinstance(last, bool) or not isinstance(last, int) or last < 1):
        raise ValueError(f"last={last!r} must be a whole number of at least 1, or None for all prefixes.")
    finite = _usable(steps, values, 0.0)
    _usable(steps, values, skip_fraction)  # checks the range
    first = FEWEST if last is None else max(FEWEST, len(finite) - last + 1)
    found: list[PowerCurve | None] = []
    for count in range(first, len(finite) + 1):
        least = skip_fraction * finite[count - 1][0]
        try:
            found.append(_fit([point for point in finite[:count] if point[0] > least], greater_is_better))
        except RefusedError:
            found.append(None)
    return found


def prediction_level(
    trace: Sequence[PowerCurve | None], steps: Sequence[float], values: Sequence[float], tolerance: float
) -> int | None:
    """
    Return the first place of a trace at which its asymptote is steady, or `None`.

    Steady: three successive `|a_i - a_(i-1)| < tolerance`, and the errors that the last five curves made on the value
    after them, one ahead, are not all of one sign (an error of 0 has none). A curve that is always passed on one side
    still moves, however slowly. The sign test is our reading of the paper's condition.

    Args:
        trace (`Sequence`): From [`asymptote_trace`], of the longest prefixes of these values.
        steps, values (`Sequence[float]`): The values that the trace is of.
        tolerance (`float`): In units of the metric, above 0.

    Raises:
        ValueError: a tolerance that is not above 0.

    Example:
    ```python
    >>> steps = [2.0**i for i in range(9)]
    >>> values = [2 + 3 * t**-0.5 for t in steps]
    >>> prediction_level(asymptote_trace(steps, values), steps, values, 0.01)
    3
    ```
    """
    if not tolerance > 0:
        raise ValueError(f"tolerance={tolerance!r} must be above 0, in units of the metric.")
    finite = [(t, y) for t, y in zip(steps, values, strict=True) if math.isfinite(y)]
    return next((place for place in range(len(trace)) if _is_steady(trace, finite, place, tolerance)), None)


def _is_steady(
    trace: Sequence[PowerCurve | None], finite: Sequence[tuple[float, float]], place: int, tolerance: float
) -> bool:
    recent = [curve.asymptote for curve in trace[max(place - STEADY, 0) : place + 1] if curve is not None]
    moves = [abs(after - before) for before, after in zip(recent, recent[1:], strict=False)]
    return len(moves) == STEADY and max(moves) < tolerance and not _one_sided(trace, finite, place)


def _one_sided(trace: Sequence[PowerCurve | None], finite: Sequence[tuple[float, float]], place: int) -> bool:
    """Whether the last five errors one value ahead all have one sign."""
    offset = len(finite) - len(trace)  # prefix `i` of the trace ends in value `offset + i`
    errors = []
    for before in range(max(place - RECENT, 0), place):
        curve = trace[before]
        if curve is not None:
            t, y = finite[offset + before + 1]
            error = y - curve(t)
            errors.append(0.0 if abs(error) <= 1e-9 * abs(y) else error)
    return len(errors) == RECENT and (all(error > 0 for error in errors) or all(error < 0 for error in errors))


def forecast(
    steps: Sequence[float],
    values: Sequence[float],
    *,
    end: float | None = None,
    greater_is_better: bool = False,
    skip_fraction: float = 0.0,
    tolerance: float = 0.01,
) -> Forecast:
    """
    Say where a curve tends to, how far that is, and how sure: the range of the last five fits.

    It extrapolates the curve as it is. While the learning rate falls or is still going to, the loss follows another
    law ([`~hf_effi.functional.schedules.planner_loss.fit_annealing_law`], `hf-effi plan lr predict`). Paper: Vilares
    Ferro et al., Modeling of learning curves with applications to POS tagging.

    Formula: `y = a + b t^-c`; `remaining = b t^-c` at the last `t`: the distance of the curve, and not of the last
    noisy value, to its asymptote.

    Args:
        steps, values, greater_is_better, skip_fraction: As in [`fit_power_curve`].
        end (`float`, *optional*): A later step whose value is wanted.
        tolerance (`float`, *optional*, defaults to 0.01): Of [`prediction_level`], in units of the metric.

    Raises:
        ValueError: an argument out of range, or an end that lies before the last step.
        RefusedError: as [`fit_power_curve`], on all values.

    Example:
    ```python
    >>> steps = [2.0**i for i in range(9)]
    >>> found = forecast(steps, [2 + 3 * t**-0.5 for t in steps], end=1024)
    >>> round(found.asymptote, 8), round(found.remaining, 8), round(found.at_end, 8), found.is_steady
    (2.0, 0.1875, 2.09375, True)
    ```
    """
    curve = fit_power_curve(steps, values, greater_is_better=greater_is_better, skip_fraction=skip_fraction)
    if end is not None and not end >= curve.last:
        raise ValueError(f"end={end!r} lies before the last step {curve.last:g}. Pass a later one, or None.")
    trace = asymptote_trace(
        steps, values, greater_is_better=greater_is_better, skip_fraction=skip_fraction, last=RECENT + STEADY
    )
    if not tolerance > 0:
        raise ValueError(f"tolerance={tolerance!r} must be above 0, in units of the metric.")
    finite = [(t, y) for t, y in zip(steps, values, strict=True) if math.isfinite(y)]
    recent = [one for one in trace[-RECENT:] if one is not None]
    sign = -1.0 if greater_is_better else 1.0
    left = [sign * one.scale * curve.last**-one.power for one in recent]
    ends = [] if end is None else [one(end) for one in recent]
    return Forecast(
        step=curve.last,
        asymptote=curve.asymptote,
        remaining=sign * curve.scale * curve.last**-curve.power,
        remaining_low=min(left),
        remaining_high=max(left),
        at_end=None if end is None else curve(end),
        at_end_low=min(ends, default=None),
        at_end_high=max(ends, default=None),
        is_steady=_is_steady(trace, finite, len(trace) - 1, tolerance),
        curve=curve,
    )
