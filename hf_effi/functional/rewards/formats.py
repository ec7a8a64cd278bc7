"""Forms that a completion can have: tags that are opened and closed in order, and a length that is not too long."""

from __future__ import annotations

from collections.abc import Sequence

from ..data import check_count
from .length import check_tokens


def tag_conditions(
    text: str, tags: Sequence[str], order: bool = True, only: bool = False, opened: bool = False, empty: bool = False
) -> dict[str, bool]:
    """
    Return which conditions of a form a text keeps.

    For each tag one condition, its name: opened once, closed once after that, and not empty. Then `apart`, no two of
    them overlap; `order`, they come in the order of `tags`; `only`, nothing but white space stands outside of them.
    The last three do not hold where a tag is not there as it should.

    Args:
        text (`str`): Any text.
        tags (`Sequence[str]`): Names, without brackets.
        order, only (`bool`, *optional*): Whether there are these conditions.
        opened (`bool`, *optional*, defaults to `False`): The prompt ends with the first opening tag, as the templates
            of reasoning models do: then it must not stand in the text again.
        empty (`bool`, *optional*, defaults to `False`): Whether a tag may be empty.

    Example:
    ```python
    >>> tag_conditions("<think>2</think> so <answer>4</answer>", ("think", "answer"), only=True)
    {'think': True, 'answer': True, 'apart': True, 'order': True, 'only': False}
    >>> tag_conditions("<think>2</think><answer>4", ("think", "answer"))
    {'think': True, 'answer': False, 'apart': False, 'order': False}
    ```
    """
    spans: list[tuple[int, int]] = []
    found: dict[str, bool] = {}
    for place, tag in enumerate(tags):
        span = _span(text, tag, opened and place == 0, empty)
        found[tag] = span is not None
        spans += [span] if span is not None else []
    whole = len(spans) == len(tags)
    places = sorted(spans)
    apart = whole and all(first[1] <= then[0] for first, then in zip(places, places[1:], strict=False))
    found["apart"] = apart
    if order:
        found["order"] = apart and spans == places
    if only:
        ends = [0, *(place for span in places for place in span), len(text)]
        outside = [text[start:end] for start, end in zip(ends[::2], ends[1::2], strict=True)] if apart else []
        found["only"] = apart and not any(part.strip() for part in outside)
    return found


def _span(text: str, tag: str, opened: bool, empty: bool) -> tuple[int, int] | None:
    """Return where an element begins and ends with its tags; `None` unless there is one as it should be."""
    opening, closing = f"<{tag}>", f"</{tag}>"
    if text.count(opening) != (0 if opened else 1) or text.count(closing) != 1:
        return None
    start, end = (0 if opened else text.index(opening)), text.index(closing)
    inner = start if opened else start + len(opening)
    if end < inner or not (empty or text[inner:end].strip()):
        return None
    return start, end + len(closing)


def soft_overlong(length: int, max_tokens: int, cache_tokens: int) -> float:
    r"""
    Return the punishment of a long completion, 0 to -1.

    $$R(y) = \min\left(0, \max\left(-1, \frac{(L_{max} - L_{cache}) - |y|}{L_{cache}}\right)\right)$$

    Equation 13 of [2503.14476](https://huggingface.co/papers/2503.14476) (DAPO).

    Args:
        length (`int`): Tokens of the completion.
        max_tokens (`int`): $L_{max}$, from where on it is -1.
        cache_tokens (`int`): $L_{cache}$, the last tokens before that, over which it falls; 1 to `max_tokens`.

    Raises:
        ValueError: no such numbers of tokens.

    Example:
    ```python
    >>> [soft_overlong(length, 100, 20) for length in (80, 90, 100, 101)]
    [0.0, -0.5, -1.0, -1.0]
    ```
    """
    check_tokens("max_tokens", max_tokens)
    if check_count("cache_tokens", cache_tokens) > max_tokens:
        raise ValueError(f"cache_tokens={cache_tokens} must be at most max_tokens={max_tokens}.")
    return min(0.0, max(-1.0, (max_tokens - cache_tokens - length) / cache_tokens))
