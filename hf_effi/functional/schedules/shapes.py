"""Decay shapes: how a multiplier falls from 1 to `floor` while `x` goes from 0 to 1."""

from __future__ import annotations

import math
from collections.abc import Callable

from ..options import refuse_idle
from ._checks import check_number

_E = math.e


def _linear(x: float, r: float) -> float:
    return r + (1 - r) * (1 - x)


def _cosine(x: float, r: float) -> float:
    return r + (1 - r) * (1 + math.cos(math.pi * x)) / 2


def _one_minus_sqrt(x: float, r: float) -> float:
    return r + (1 - r) * (1 - math.sqrt(x))


def _square(x: float, r: float) -> float:
    return r + (1 - r) * (1 - x * x)


def _mirror_cosine(x: float, r: float) -> float:
    return 2 * _linear(x, r) - _cosine(x, r)


def _exponential(x: float, r: float) -> float:
    return r**x


def _reciprocal(x: float, r: float) -> float:
    return 1 / (x / r + (1 - x))


def _affine_exponential(x: float, r: float) -> float:
    # a e^{-x} + b with the two constants fixed by the values 1 at x=0 and r at x=1.
    return (1 - r) * _E / (_E - 1) * math.exp(-x) + (r * _E - 1) / (_E - 1)


#: shapes that need nothing but `x` and `floor`
SHAPES: dict[str, Callable[[float, float], float]] = {
    "linear": _linear,
    "cosine": _cosine,
    "1-sqrt": _one_minus_sqrt,
    "square": _square,
    "mirror-cosine": _mirror_cosine,
    "exponential": _exponential,
    "reciprocal": _reciprocal,
    "affine-exponential": _affine_exponential,
    "power": lambda x, r: r + (1 - r) * (1 - x),
}
_NEEDS_POSITIVE_FLOOR = ("exponential", "reciprocal")


def check_shape(shape: str, floor: float, power: float = 1.0) -> None:
    """
    Refuse a shape that does not exist or cannot reach `floor`.

    Raises:
        ValueError: unknown `shape`; `floor` outside [0, 1]; `floor` 0 for a shape that never reaches 0;
            `power` not above 0.
    """
    if not isinstance(shape, str) or shape not in SHAPES:
        raise ValueError(f"shape={shape!r} is unknown. Allowed: {', '.join(sorted(SHAPES))}.")
    check_number("floor", floor, 0.0, 1.0, fix="It is the final LR as a fraction of the peak.")
    if shape in _NEEDS_POSITIVE_FLOOR and floor <= 0:
        raise ValueError(
            f"floor={floor!r} is not allowed with shape={shape!r}, which never reaches zero. "
            "Pass a positive floor such as floor=1e-3, or take shape='linear' or '1-sqrt'."
        )
    check_number("power", power, 0.0, math.inf, low_open=True, fix="power=1 is the straight line.")


def decay(shape: str, x: float, floor: float = 0.0, power: float = 1.0) -> float:
    """
    Value of a decay shape at `x`, clamped to `x` in [0, 1].

    Formulas, with r = floor: linear `r+(1-r)(1-x)`, cosine `r+(1-r)(1+cos(pi x))/2`, 1-sqrt `r+(1-r)(1-sqrt(x))`,
    square `r+(1-r)(1-x^2)`, mirror-cosine `2 linear - cosine`, exponential `r^x`, reciprocal `1/(x/r+1-x)`,
    affine-exponential `a exp(-x)+b` through both ends, power `r+(1-r)(1-x)^power`.

    Paper: Haegele et al., Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations (2405.18392).

    Args:
        shape (`str`): One of `SHAPES`.
        x (`float`): Position inside the decay; values outside [0, 1] give the nearer end.
        floor (`float`, *optional*, defaults to 0.0): Value at `x=1`, in [0, 1]; above 0 for exponential and
            reciprocal.
        power (`float`, *optional*, defaults to 1.0): Exponent of the `"power"` shape, above 0.

    Returns:
        `float`: 1 at `x=0`, `floor` at `x=1`, never rising in between.

    Raises:
        ValueError: see [`check_shape`]; `x` is NaN; a `power` for another shape.

    Example:
    ```python
    >>> [round(decay("reciprocal", x, 0.1), 6) for x in (0, 0.25, 0.5, 0.75, 1)]
    [1.0, 0.307692, 0.181818, 0.129032, 0.1]
    ```
    """
    check_shape(shape, floor, power)
    refuse_idle("power", power, 1.0, shape == "power", "with shape='power'")
    if math.isnan(x):
        raise ValueError("x=nan is not allowed: a position inside the decay is a number in [0, 1].")
    if x <= 0:
        return 1.0
    if x >= 1:
        return floor
    if shape == "power":
        return floor + (1 - floor) * (1 - x) ** power
    return SHAPES[shape](x, floor)


def half_life(steps: float, half_life_steps: float) -> float:
    """
    `0.5 ** (steps / half_life_steps)`: MiniCPM's decay, which has a rate and no end.

    Args:
        steps (`float`): Steps since the start of the decay, at least 0.
        half_life_steps (`float`): Steps after which the LR has halved, above 0 (MiniCPM: 5000).

    Raises:
        ValueError: an argument is out of range.

    Example:
    ```python
    >>> [half_life(k, 5000) for k in (0, 5000, 10000)]
    [1.0, 0.5, 0.25]
    ```
    """
    check_number("steps", steps, 0.0, math.inf, fix="Count from the first step of the decay.")
    check_number("half_life_steps", half_life_steps, 0.0, math.inf, low_open=True, fix="MiniCPM used 5000.")
    return 0.5 ** (steps / half_life_steps)
