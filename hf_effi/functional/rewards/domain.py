"""Small scores that recipes are put together from."""

from __future__ import annotations

import re

from ..data import check_number


def length_band(length: float, low: float, high: float, largest: float) -> float:
    """
    1 inside of a band of lengths, falling to 0 on both sides.

    `length / low` below it, `(largest - length) / (largest - high)` above it, 0 from `largest` on.

    Paper: [LongWriter-Zero](https://huggingface.co/papers/2506.18841).

    Args:
        length (`float`): In tokens, words or any unit that the others have too.
        low, high (`float`): The band, 0 < low <= high.
        largest (`float`): > high.

    Raises:
        ValueError: the limits are not in that order.

    Example:
    ```python
    >>> [length_band(length, 100, 200, 400) for length in (0, 50, 100, 200, 300, 400, 500)]
    [0.0, 0.5, 1.0, 1.0, 0.5, 0.0, 0.0]
    ```
    """
    for name, value in (("low", low), ("high", high), ("largest", largest)):
        check_number(name, value, 0.0, open_low=True)
    if not low <= high < largest:
        raise ValueError(f"The band must have low <= high < largest, got low={low}, high={high}, largest={largest}.")
    if length < low:
        return length / low
    return 1.0 if length <= high else max(0.0, (largest - length) / (largest - high))


def text_in_tag(text: str, tag: str) -> str | None:
    """
    Return what stands in the one `<tag>...</tag>` of a text, without white space around it.

    Args:
        text (`str`): Any text.
        tag (`str`): Letters, digits, `_` and `-`.

    Returns:
        `str` or `None`: `None` where there is no such tag, more than one, or it is not closed.

    Raises:
        ValueError: `tag` has other characters.

    Example:
    ```python
    >>> text_in_tag("It falls. <class> down </class>", "class"), text_in_tag("down", "class")
    ('down', None)
    >>> text_in_tag("<class>up</class> <class>down</class>", "class") is None
    True
    ```
    """
    if not isinstance(tag, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", tag):
        raise ValueError(f"tag={tag!r} must be letters, digits, _ and -, such as 'class' for <class>.")
    opening, closing = f"<{tag}>", f"</{tag}>"
    if text.count(opening) != 1 or text.count(closing) != 1:
        return None
    before, _, behind = text.partition(opening)
    return behind.partition(closing)[0].strip() if closing in behind else None
