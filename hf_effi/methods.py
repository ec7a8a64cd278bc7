"""One static table: which method comes from which paper, where its code, card, tests and bench are, and its
status with the evidence for it.

Docs, `hf-effi list` and the contract tests read it. Nothing dispatches on it.
"""

from __future__ import annotations

from ._methods import data, kernels, long_sequences, observers, rejected, rollouts, schedules
from ._methods.row import Kind, Method, Status

__all__ = ["METHODS", "Kind", "Method", "Status", "find_method"]

METHODS: tuple[Method, ...] = (
    *rollouts.ROWS,
    *schedules.ROWS,
    *data.ROWS,
    *long_sequences.ROWS,
    *kernels.ROWS,
    *observers.ROWS,
    *rejected.ROWS,
)


def find_method(key: str) -> Method:
    """
    Return the row with this key.

    Raises:
        KeyError: no such method; the message lists the known keys.

    Example:
    ```python
    >>> find_method("wsd").paper_id
    '2404.06395'
    ```
    """
    for method in METHODS:
        if method.key == key:
            return method
    raise KeyError(f"unknown method {key!r}. Known: {', '.join(sorted(m.key for m in METHODS))}.")
