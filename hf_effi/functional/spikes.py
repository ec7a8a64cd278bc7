"""Whether a loss is a spike: the robust z-score over the losses before it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .schedules._checks import check_number

#: median absolute deviation of a normal distribution, in standard deviations
NORMAL_MAD = 0.6745
#: of |median|: the smallest deviation that counts, so that a window of nearly equal losses makes no spike of rounding
FLOOR = 1e-3


def robust_z(loss: float, window: Sequence[float]) -> float:
    """
    Return how far a loss lies above the losses before it, in robust standard deviations.

    Formula: `z = 0.6745 (x - m) / max(MAD, 0.001 |m|)`, with `m = median(w)` and `MAD = median(|w_i - m|)`. Median and
    MAD do not move with a few outliers in the window, as mean and standard deviation do. 0.6745 makes `z` a number of
    standard deviations where losses are normal (Iglewicz and Hoaglin, 1993).

    Args:
        loss (`float`): `x`. What is not finite gives infinity.
        window (`Sequence[float]`): `w`, finite losses, at least one.

    Raises:
        ValueError: the window is empty or holds a loss that is not finite.

    Example:
    ```python
    >>> round(robust_z(3.0, [1.0, 1.2, 0.9, 1.1, 1.0]), 2)
    13.49
    >>> robust_z(float("nan"), [1.0])
    inf
    ```
    """
    if not window or not all(math.isfinite(value) for value in window):
        raise ValueError(f"window={list(window)!r} must hold at least one loss, and finite ones only.")
    if not math.isfinite(loss):
        return math.inf
    middle = _median(window)
    deviation = _median([abs(value - middle) for value in window])
    scale = max(deviation, FLOOR * abs(middle))
    if scale == 0.0:
        return 0.0 if loss <= middle else math.inf
    return NORMAL_MAD * (loss - middle) / scale


def is_spike(loss: float, window: Sequence[float], threshold: float = 6.0, least: int = 20) -> bool:
    """
    Return whether a loss is a spike: `robust_z(loss, window) > threshold`, once the window has `least` losses.

    A loss far below the others is none. A loss that is not finite always is.

    Args:
        loss (`float`): Of the update in question.
        window (`Sequence[float]`): Losses of the updates before it.
        threshold (`float`, *optional*, defaults to 6.0): Above 0. In a normal distribution 6 is passed once in a
            thousand million updates; losses of small batches have longer tails.
        least (`int`, *optional*, defaults to 20): Losses without which nothing but a loss that is not finite is a
            spike, at least 1.

    Raises:
        ValueError: an argument out of range.

    Example:
    ```python
    >>> losses = [1.0, 1.1, 0.9, 1.0]
    >>> is_spike(5.0, losses, least=4), is_spike(5.0, losses), is_spike(0.1, losses, least=4)
    (True, False, False)
    ```
    """
    check_number("threshold", threshold, 0.0, math.inf, low_open=True)
    if isinstance(least, bool) or not isinstance(least, int) or least < 1:
        raise ValueError(f"least={least!r} must be an integer of at least 1.")
    if not math.isfinite(loss):
        return True
    return len(window) >= least and robust_z(loss, window) > threshold


def _median(values: Sequence[float]) -> float:
    ordered, middle = sorted(values), len(values) // 2
    return ordered[middle] if len(values) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
