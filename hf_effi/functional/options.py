"""Every option acts or raises: the check for options that depend on another one."""

from __future__ import annotations

from typing import Any


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
