"""One JSON value out of a text, in linear time and without ever raising on what a model wrote."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any

#: deepest nesting, most brackets and most commas, most characters of a number, most brackets side by side in prose
DEEPEST, MOST_NODES, LONGEST_NUMBER, MOST_SPANS = 16, 100_000, 1_000, 256
# All quantifiers are possessive, so that no character is looked at twice; a text in quotes may lack its last one.
_CLOSED = r'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_TO_BRACKET = re.compile(rf'(?:[^"\[\]{{}}]++|{_CLOSED}?)*+([\[\]{{}}])', re.DOTALL)
_TO_LAST_COMMA = re.compile(rf'(?:(?:[^",]++|{_CLOSED})*+,)*+', re.DOTALL)
_OPENING = re.compile(r"[\[{]")
_CLOSER = {"[": "]", "{": "}"}
#: what could be beyond a double, or take long to read
_LARGE = re.compile(r"(?<!\d)\d{300}|\d[eE][+-]?\d{3}")


@dataclass(frozen=True)
class JSONText:
    """
    What [`read_json`] found.

    Args:
        value: What the text says; `None` where it is not valid, and for `null`.
        valid (`bool`): There is exactly one JSON value, within the limits.
        format (`float`): 1 where the text is that value and nothing else, 0.5 where something stands around it, 0
            where it is not valid.
        cut (`bool`): `value` is the beginning of one that breaks off, see `mend`.
    """

    value: Any
    valid: bool
    format: float
    cut: bool = False


_NOTHING = JSONText(None, False, 0.0)


class _NotReadError(ValueError):
    """Control flow: the text is no JSON that is read here."""


def read_json(text: str, mend: bool = False) -> JSONText:
    r"""
    Return the one JSON value in a text.

    The text itself, without white space around it; else an object or an array in it, as in a fence or among prose.
    Two of them are none: nothing says which one counts. Not valid are also `NaN` and `Infinity`, numbers beyond a
    double or of more than 1000 characters, a key that an object has twice, and what is deeper than 16 or has more than
    100,000 brackets or commas, or 400,000 quotation marks. Takes linear time.

    Args:
        text (`str`): Any text.
        mend (`bool`, *optional*, defaults to `False`): Of a text that is not valid because it breaks off, return what
            was complete by then.

    Returns:
        `JSONText`

    Example:
    ```python
    >>> read_json('{"a": 1}')
    JSONText(value={'a': 1}, valid=True, format=1.0, cut=False)
    >>> read_json('It is\n```json\n{"a": 1}\n```').format, read_json('{"a": 1} {"a": 2}').valid
    (0.5, False)
    >>> read_json('{"a": 1, "b": [2, 3', mend=True).value
    {'a': 1, 'b': [2]}
    ```
    """
    stripped = text.strip()
    if stripped.count(",") > MOST_NODES or stripped.count('"') > 4 * MOST_NODES:
        return _NOTHING
    try:
        spans, rest = _spans(stripped)
    except _NotReadError:
        return _NOTHING
    if spans == [(0, len(stripped))] or not stripped.startswith(("[", "{")):
        exact = _parsed(stripped, 1.0)
        if exact.valid:
            return exact
    found = _NOTHING
    for start, end in spans:
        one = _parsed(stripped[start:end], 0.5)
        if one.valid and found.valid:
            return _NOTHING
        found = one if one.valid else found
    if rest is None:
        return found
    return _mended(stripped, *rest) if mend and not found.valid else _NOTHING


def _spans(text: str) -> tuple[list[tuple[int, int]], tuple[int, int, str] | None]:
    """
    Return where brackets that belong together begin and end, outside of which quotation marks mean nothing.

    With them, of one that is never closed, its place, that behind the last bracket, and what would close it.
    """
    found: list[tuple[int, int]] = []
    place = brackets = 0
    while opening := _OPENING.search(text, place):
        start = place = opening.start()
        stack: list[str] = []
        while stack or place == start:
            token = _TO_BRACKET.match(text, place)
            if token is None:
                return found, (start, place, "".join(reversed(stack)))
            place, brackets = token.end(), brackets + 1
            if token[1] in _CLOSER:
                stack.append(_CLOSER[token[1]])
            elif stack.pop() != token[1]:
                stack = ["!"] * len(stack)  # what closes something else cannot be mended
            if len(stack) > DEEPEST or brackets > MOST_NODES:
                raise _NotReadError("too deep or too large")
        found.append((start, place))
        if len(found) > MOST_SPANS:
            raise _NotReadError("too many brackets side by side")
    return found, None


def _parsed(text: str, form: float) -> JSONText:
    careful = _LARGE.search(text) is not None
    try:
        value = json.loads(
            text,
            parse_float=_number if careful else None,
            parse_int=_integer if careful else None,
            parse_constant=_refuse,
            object_pairs_hook=_object,
        )
    except (ValueError, RecursionError):
        return _NOTHING
    return JSONText(value, True, form)


def _refuse(word: str) -> Any:
    raise _NotReadError(word)


def _number(digits: str) -> float:
    number = float(digits) if len(digits) <= LONGEST_NUMBER else math.inf
    if not math.isfinite(number):
        raise _NotReadError(digits[:9])
    return number


def _integer(digits: str) -> int:
    _number(digits)
    return int(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _NotReadError("a key is there twice")
    return found


def _mended(text: str, start: int, place: int, closers: str) -> JSONText:
    """Close what is open at the last place where everything before was complete."""
    comma = _TO_LAST_COMMA.match(text, place)
    end = place if comma is None or comma.end() == place else comma.end() - 1
    part = _parsed(text[start:end] + closers, 0.0)
    return JSONText(part.value, False, 0.0, True) if part.valid else _NOTHING
