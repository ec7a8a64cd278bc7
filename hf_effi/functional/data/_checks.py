"""Checks shared by the curriculum functions: every refusal names the value, the range and the fix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..options import is_finite


def clean_scores(scores: Tensor | Sequence[float], name: str = "scores", nan: str = "error") -> Tensor:
    """
    Return scores as a 1-D float64 CPU tensor.

    Args:
        scores (`torch.Tensor` or `Sequence[float]`): One number per row, shape `(num_rows,)`.
        name (`str`, *optional*, defaults to `"scores"`): What errors call it.
        nan (`str`, *optional*, defaults to `"error"`): `"error"`, or `"median"`: a NaN counts as the lower median of
            the others.

    Raises:
        ValueError: no row, another number of dimensions, a NaN under `nan="error"`, or nothing but NaN.

    Example:
    ```python
    >>> clean_scores([3, float("nan"), 1, 2], nan="median").tolist()
    [3.0, 2.0, 1.0, 2.0]
    ```
    """
    if nan not in ("error", "median"):
        raise ValueError(f"nan={nan!r} is not known. Use 'error' or 'median'.")
    values = _as_numbers(scores, name)
    if values.ndim != 1 or values.numel() == 0:
        raise ValueError(
            f"{name} has shape {tuple(values.shape)}. Pass one number for each row of the dataset, at least one."
        )
    missing = torch.isnan(values)
    count = int(missing.sum())
    if count == 0:
        return values
    if nan == "error":
        raise ValueError(
            f"{name} has {count} NaN of {values.numel()}, the first in row {int(missing.nonzero()[0])}. Score these "
            "rows, drop them, or pass nan='median'."
        )
    if count == values.numel():
        raise ValueError(f"{name} is NaN in every row, so there is no median to use.")
    values[missing] = values[~missing].median()
    return values


def _as_numbers(scores: Any, name: str) -> Tensor:
    try:
        # Without a kind torch would round Python's numbers to single precision, and rows that are close would tie.
        kind = None if isinstance(scores, Tensor) else torch.float64
        return torch.as_tensor(scores, dtype=kind).detach().to("cpu", torch.float64).clone()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        # What torch says of words tells neither which, nor what to do.
        raise ValueError(f"{name} must hold one number per row, and {_why_no_numbers(scores)}") from error


def as_labels(values: Any) -> Any:
    """Return a tensor of labels as a list: two elements of a tensor are never the same key."""
    return values.tolist() if isinstance(values, Tensor) else values


def _why_no_numbers(scores: Any) -> str:
    if isinstance(scores, str) or not isinstance(scores, Sequence):
        return f"is {type(scores).__name__} {repr(scores)[:60]}. Pass a list or a tensor."
    for row, score in enumerate(scores):
        try:
            if not isinstance(score, str):
                float(score)
                continue
        except (TypeError, ValueError, OverflowError):
            pass
        advice = " Map words to numbers first, such as {'easy': 0, 'hard': 1}[word]." if isinstance(score, str) else ""
        return f"row {row} has {repr(score)[:60]}, which is no finite number.{advice}"
    return "they are of kinds that do not go together."


def check_number(
    name: str, value: float, low: float, high: float = math.inf, *, open_low: bool = False, open_high: bool = False
) -> float:
    """
    Return `value` if it lies between `low` and `high`.

    Raises:
        ValueError: it does not, or it is not a finite number.

    Example:
    ```python
    >>> check_number("rate", 0.5, 0, 1)
    0.5
    >>> check_number("alpha", 1.0, 0, 1, open_high=True)
    Traceback (most recent call last):
    ...
    ValueError: alpha=1.0 is outside [0, 1).
    ```
    """
    good = is_finite_number(value)
    good = good and (value > low if open_low else value >= low) and (value < high if open_high else value <= high)
    if not good:
        left, right = "(" if open_low else "[", ")" if open_high or high == math.inf else "]"
        raise ValueError(f"{name}={value!r} is outside {left}{low}, {high}{right}.")
    return value


def is_finite_number(value: Any) -> bool:
    """Whether `value` is an integer or a float, no bool, and finite as a float, which `10**400` is not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and is_finite(value)


def check_count(name: str, value: Any, low: int = 1) -> int:
    """
    Return `value` if it is an integer of at least `low`.

    Raises:
        ValueError: it is not.

    Example:
    ```python
    >>> check_count("buckets", 4)
    4
    ```
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name}={value!r} must be an integer of at least {low}.")
    return value


def seeded(seed: int, *stream: int) -> torch.Generator:
    """
    Return a CPU generator for `(seed, *stream)`; streams of one seed are independent of one another.

    Raises:
        ValueError: a negative number, or none.

    Example:
    ```python
    >>> bool(torch.equal(torch.rand(2, generator=seeded(0, 1)), torch.rand(2, generator=seeded(0, 1))))
    True
    >>> bool(torch.equal(torch.rand(2, generator=seeded(0, 1)), torch.rand(2, generator=seeded(1, 0))))
    False
    ```
    """
    mixed = 0
    for part in (seed, *stream):
        check_count("seed or epoch", part, 0)
        # A step of splitmix64 per part: neighbouring seeds and epochs give unrelated streams.
        mixed = (mixed + part + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 31
    return torch.Generator().manual_seed(mixed >> 1)
