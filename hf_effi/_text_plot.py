"""Curves drawn with characters, for terminals and for Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def text_plot(values: Sequence[float], height: int = 8, top: float | None = None, label: str = "{:.2f}") -> str:
    """
    Draw one column of stars for a curve of values of at least 0.

    Args:
        values (`Sequence[float]`): One a column.
        height (`int`, *optional*, defaults to 8): Lines.
        top (`float`, *optional*): Upper end of the first line; the largest value without it.
        label (`str`, *optional*): Format of the numbers at the left.

    Example:
    ```python
    >>> print(text_plot([1.0, 1.0, 0.5, 0.0], height=2))
    1.00 |**
    0.50 |  **
    ```
    """
    top = max(values) if top is None else top
    lines = []
    for row in range(height):
        high, low = top * (1 - row / height), top * (1 - (row + 1) / height)
        line = "".join("*" if (low < v <= high or (row == height - 1 and v <= low)) else " " for v in values)
        lines.append(f"{label.format(high)} |{line}".rstrip())
    return "\n".join(lines)
