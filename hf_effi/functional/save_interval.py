"""How often to save: what a save costs against what a failure loses."""

from __future__ import annotations

import math


def save_interval(stall_seconds: float, seconds_between_failures: float) -> float:
    """
    Return the seconds between two saves that lose the least time.

    `T = sqrt(2 s F)` with `s` the seconds that a save holds up the training and `F` the mean time between failures.
    It is the minimum of [`lost_fraction`] over `T`, for `s` well below `F`.

    Source: Young, A first order approximation to the optimum checkpoint interval (1974); Daly, A higher order
    estimate of the optimum checkpoint interval for restart dumps (2006), its first-order form.

    Args:
        stall_seconds (`float`): Above 0. `SafeCheckpointer.stalls` has it of each save.
        seconds_between_failures (`float`): Above 0, of the whole job: a job on 16 nodes that each fail every 80 days
            fails every 5 days.

    Raises:
        ValueError: an argument out of range.

    Example:
    ```python
    >>> round(save_interval(stall_seconds=2.0, seconds_between_failures=86400.0))
    588
    ```
    """
    _check(stall_seconds=stall_seconds, seconds_between_failures=seconds_between_failures)
    return math.sqrt(2 * stall_seconds * seconds_between_failures)


def lost_fraction(interval_seconds: float, stall_seconds: float, seconds_between_failures: float) -> float:
    """
    Return the share of the time that saves and failures take: `s / T + T / (2 F)`.

    The first part is the stall of each save, the second the work since the last save, half an interval on average,
    that each failure loses.

    Args:
        interval_seconds (`float`): `T`, between two saves, above 0.
        stall_seconds, seconds_between_failures (`float`): As in [`save_interval`].

    Raises:
        ValueError: an argument out of range.

    Example:
    ```python
    >>> round(lost_fraction(588, stall_seconds=2.0, seconds_between_failures=86400.0), 4)
    0.0068
    >>> round(lost_fraction(3600, stall_seconds=2.0, seconds_between_failures=86400.0), 4)
    0.0214
    ```
    """
    _check(
        interval_seconds=interval_seconds,
        stall_seconds=stall_seconds,
        seconds_between_failures=seconds_between_failures,
    )
    return stall_seconds / interval_seconds + interval_seconds / (2 * seconds_between_failures)


def _check(**values: float) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"{name}={value!r} must be a number of seconds above 0.")
