"""How deep a metric dips after training on new data begins, and when it is back."""

from __future__ import annotations

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
