"""How deep a metric dips after training on new data begins, and when it is back."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Dip:
    """
    What [`stability_dip`] found.

    Args:
        depth (`float`): Largest loss against the first value, at least 0, in units of the metric.
        lowest (`int`): Place of the worst value.
        recovered (`int`, *optional*): First place after it that is as good as the start; `None` if there is none.
    """

    depth: float
    lowest: int
    recovered: int | None


def stability_dip(values: Sequence[float], higher_is_better: bool = True) -> Dip:
    """
    Return the stability gap of a metric: its largest drop against the start, and where it has recovered.

    Args:
        values (`Sequence[float]`): The metric before training on the new data, then at each evaluation.
        higher_is_better (`bool`, *optional*, defaults to `True`): `False` for a loss.

    Raises:
        ValueError: no value, or one that is not finite.

    Example:
    ```python
    >>> stability_dip([0.5, 0.25, 0.375, 0.5, 0.75])
    Dip(depth=0.25, lowest=1, recovered=3)
    ```
    """
    if not len(values) or not all(math.isfinite(value) for value in values):
        raise ValueError(f"values={list(values)!r} must be finite numbers, the first from before the new data.")
    gains = [value - values[0] if higher_is_better else values[0] - value for value in values]
    lowest = gains.index(min(gains))
    recovered = next((place for place in range(lowest, len(gains)) if gains[place] >= 0), None)
    return Dip(-gains[lowest] or 0.0, lowest, recovered)


@dataclass(frozen=True)
class StabilityGap:
    """
    What [`measure_gap`] found; steps are those of the evaluations.

    Args:
        depth (`float`): Largest loss against the first value, at least 0, in units of the metric.
        behind (`float`): What of it is left at the last evaluation, at least 0.
        began (`int`, *optional*): First step of the dip that the worst value is in; `None` where nothing dips.
        lowest (`int`): Step of the worst value.
        recovered (`int`, *optional*): First step after it that is as good as the start; `None` if there is none.
        duration (`int`): Steps from `began` to `recovered`, or to the last evaluation where it has not recovered.
    """

    depth: float
    behind: float
    began: int | None
    lowest: int
    recovered: int | None
    duration: int


def measure_gap(
    steps: Sequence[int], values: Sequence[float], higher_is_better: bool = True, tolerance: float = 0.0
) -> StabilityGap:
    """
    Return depth and duration of the deepest dip of a metric below its first value.

    Formula: `fall_i = values_0 - values_i` (the other way round for a loss); the dip is the run of evaluations with
    `fall > tolerance` around the largest fall. Between two evaluations nothing is known, so that a duration is right
    to one interval of evaluation.

    Args:
        steps (`Sequence[int]`): Finished updates at each evaluation, rising; the first from before the new data.
        values (`Sequence[float]`): The metric at each.
        higher_is_better (`bool`, *optional*, defaults to `True`): `False` for a loss.
        tolerance (`float`, *optional*, defaults to 0.0): Falls up to this one are noise, in units of the metric.

    Raises:
        ValueError: no value, one that is not finite, steps that do not rise or are of another number, a tolerance
            below 0.

    Example:
    ```python
    >>> measure_gap([0, 10, 20, 30, 40], [2.0, 2.25, 2.5, 2.0, 1.5], higher_is_better=False)
    StabilityGap(depth=0.5, behind=0.0, began=10, lowest=20, recovered=30, duration=20)
    ```
    """
    dip = stability_dip(values, higher_is_better)
    if len(steps) != len(values) or any(later <= earlier for earlier, later in itertools.pairwise(steps)):
        raise ValueError(f"steps={list(steps)!r} must rise, one for each of the {len(values)} values.")
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance={tolerance!r} must be a number of at least 0.")
    falls = [values[0] - value if higher_is_better else value - values[0] for value in values]
    behind = max(falls[-1], 0.0)
    if dip.depth <= tolerance:
        return StabilityGap(dip.depth, behind, None, steps[dip.lowest], None, 0)
    first = last = dip.lowest
    while falls[first - 1] > tolerance:  # ends at the start, whose fall is 0
        first -= 1
    while last < len(falls) and falls[last] > tolerance:
        last += 1
    end = steps[min(last, len(steps) - 1)]
    return StabilityGap(
        dip.depth,
        behind,
        steps[first],
        steps[dip.lowest],
        end if last < len(steps) else None,
        end - steps[first],
    )
