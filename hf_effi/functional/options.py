"""Checks of options: every one acts or raises, and numbers are numbers."""

from __future__ import annotations

import math
from typing import Any, SupportsFloat


def is_finite(value: SupportsFloat) -> bool:
    """
    Return whether a number is finite as a float, which an integer of 400 digits is not.

    Example:
    ```python
    >>> [is_finite(value) for value in (1, 2.5, float("nan"), float("inf"), 10**400)]
    [True, True, False, False, False]
    ```
    """
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def refuse_idle(name: str, value: Any, default: Any, acts: bool, needs: str) -> None:
    """
    Raise `ValueError` for an option that was set while nothing reads it.

    An option that was set to its default cannot be told from one that was left out, and passes.

    Args:
        name (`str`): The option.
        value, default: What it is, and what it is where nobody sets it.
        acts (`bool`): Whether the other options let it act.
        needs (`str`): What lets it act, to be read after "only acts".

    Example:
    ```python
    >>> refuse_idle("power", 1.0, 1.0, acts=False, needs="with shape='power'")
    >>> refuse_idle("power", 2.0, 1.0, acts=False, needs="with shape='power'")
    Traceback (most recent call last):
    ...
    ValueError: power=2.0 only acts with shape='power'. Leave it at 1.0.
    ```
    """
    if not acts and value != default:
        raise ValueError(f"{name}={value!r} only acts {needs}. Leave it at {default!r}.")
