"""Range checks shared by the schedules."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from typing import SupportsFloat

from ..options import is_finite


def check_number(
    name: str,
    value: object,
    low: float,
    high: float,
    *,
    low_open: bool = False,
    high_open: bool = False,
    fix: str = "",
) -> None:
    """Raise `ValueError` unless `value` is a real number in the interval."""
    left, right = "(" if low_open or low == -math.inf else "[", ")" if high_open or high == math.inf else "]"
    allowed = f"a number in {left}{low:g}, {high:g}{right}"
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not is_finite(value):
        raise ValueError(f"{name}={value!r} is not allowed: it must be {allowed}. {fix}".rstrip())
    below = value <= low if low_open else value < low
    above = not (value < high if high_open else value <= high)
    if below or above:
        raise ValueError(f"{name}={value!r} is not allowed: it must be {allowed}. {fix}".rstrip())


def as_numbers(name: str, values: Iterable[SupportsFloat], fix: str = "") -> list[float]:
    """Return `values` as floats, or raise `ValueError` where it is no sequence of numbers."""
    try:
        return [float(value) for value in values]
    except (TypeError, ValueError):
        raise ValueError(
            f"{name}={values!r} is not allowed: it must be a sequence of numbers. {fix}".rstrip()
        ) from None


def check_steps(name: str, value: object, low: int = 0, fix: str = "") -> None:
    """Raise `ValueError` unless `value` is a whole number of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < low:
        raise ValueError(f"{name}={value!r} is not allowed: it must be a whole number >= {low}. {fix}".rstrip())


def check_choice(name: str, value: object, allowed: tuple) -> None:
    """Raise `ValueError` unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not allowed: choose one of {', '.join(map(repr, allowed))}.")


def check_one_of(
    steps_name: str, steps: int | None, fraction_name: str, fraction: float | None, *, required: bool = False
) -> None:
    """Raise unless at most one of a length in steps and a length as a fraction of the run is given."""
    if steps is not None and fraction is not None:
        raise ValueError(
            f"{steps_name}={steps!r} and {fraction_name}={fraction!r} both say how long the same phase is. Pass one."
        )
    if required and steps is None and fraction is None:
        raise ValueError(f"Neither {steps_name} nor {fraction_name} is given. Pass one of them.")
    if steps is not None:
        check_steps(steps_name, steps, fix=f"For a share of the run use {fraction_name}.")
    if fraction is not None:
        check_number(fraction_name, fraction, 0.0, 1.0, fix=f"For a number of steps use {steps_name}.")
