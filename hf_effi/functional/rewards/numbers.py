"""
Numbers as people and models write them, as exact fractions.

English notation: a point for decimals, a comma between groups of three digits. All functions take any text, never
raise for what is written in it, and take time linear in its length.
"""

from __future__ import annotations

import re
import unicodedata
from collections import deque
from collections.abc import Iterable
from fractions import Fraction

#: digits of the longest number that is read as one; Python's own limit would raise at 4300
MOST_DIGITS = 1000
#: largest power of ten that is read as a number
LARGEST_EXPONENT = 1000
#: how many numbers that cannot be read may follow the last one that can
_UNREADABLE = 64

_WIDE = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}  # full-width forms of ASCII
_DASHES = dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2212\ufe58\ufe63"), "-")
_OTHERS = {"\u066b": ".", "\u066c": ",", "\u2044": "/", "\u2215": "/", "\u00f7": "/", "\u3000": " "}
_VULGAR = "\u00bc-\u00be\u2150-\u215e"  # one half and others that are one character
_ONE_CHARACTER = {
    code: unicodedata.normalize("NFKC", chr(code)).replace("\u2044", "/")
    for code in (*range(0xBC, 0xBF), *range(0x2150, 0x215F))
}
_TABLE: dict[int, int | str] = {
    **_WIDE,
    **_DASHES,
    **{ord(key): value for key, value in _OTHERS.items()},
    **_ONE_CHARACTER,
}
_MIXED_VULGAR = re.compile(f"(?<=[0-9])(?=[{_VULGAR}])")
_OTHER_DIGIT = re.compile(r"(?![0-9])\d")
#: spaces and LaTeX between a digit and a group of three
_GROUPED = re.compile("(?<=[0-9])(?:\\{,\\}|\\\\[,!;]|[\u00a0\u2009\u202f])(?=[0-9]{3}(?![0-9]))")
_FRACTION = re.compile(
    r"\\[dtc]?frac\s?(?:\{\s?([-+]?[0-9]++)\s?\}\s?\{\s?([-+]?[0-9]++)\s?\}|([0-9])\s?([0-9])(?![0-9]))"
)
#: possessive, so that a long run is gone through once
_NUMBER = re.compile(
    r"""
    (?P<sign>(?<![\w)\]}])[-+])?+
    (?:\\?[$\u00a3\u20ac\u00a5]\s?(?P<inner>[-+])?+)?+
    (?: (?P<whole>[0-9](?:[0-9]|,(?=[0-9]))*+) (?P<point>\.[0-9]++)?+ | (?<![\w.])(?P<lead>\.[0-9]++) )
    (?P<power>[eE][-+]?[0-9]++(?!\w))?+
    (?P<over>\s?/\s?[0-9]++(?!\s?/)(?!\.[0-9]))?+
    (?P<percent>\s?\\?%)?+
    """,
    re.VERBOSE,
)
_MIXED = re.compile(r"(?<![\w./,])([0-9]{1,30})\s([0-9]{1,30})\s?/\s?([0-9]{1,30})(?![\w/])")


def plain_characters(text: str) -> str:
    """
    Return a text with ASCII forms of what numbers are made of.

    Full-width letters, digits and signs, the minus sign and other dashes, digits of other scripts, and fractions that
    are one character. Powers and other signs stay as they are: `x²` does not become `x2`.

    Example:
    ```python
    >>> plain_characters("−５ ٣ 1½ x²")
    '-5 3 1 1/2 x²'
    ```
    """
    if text.isascii():
        return text
    text = _MIXED_VULGAR.sub(" ", text).translate(_TABLE)
    return _OTHER_DIGIT.sub(lambda found: str(unicodedata.decimal(found[0])), text)


def numbers_in(text: str, percent: bool = False, last: int | None = None) -> list[Fraction]:
    r"""
    Return the numbers in a text, in order.

    `1,000` is one number, `1,2,3` are three, and `1,00` is none: it may be a decimal comma. So is a number of more
    than 1000 digits. `3/4`, `\frac{3}{4}`, `1 1/2`, `1e3`, `.5`, `$-5` and the minus sign of Unicode are read; a dash
    after a digit, a letter or a bracket is no sign.

    Args:
        text (`str`): Any text.
        percent (`bool`, *optional*, defaults to `False`): Read `50%` as 1/2 rather than as 50.
        last (`int`, *optional*): Return only so many from the end.

    Example:
    ```python
    >>> [str(number) for number in numbers_in("of 1,000 −2.50 and \\frac{3}{4}, 10-3")]
    ['1000', '-5/2', '3/4', '10', '3']
    ```
    """
    matches: Iterable[re.Match[str]] = _NUMBER.finditer(_prepared(text))
    if last is None:
        return [number for match in matches for number in _values(match, percent)]
    found: list[Fraction] = []
    for match in reversed(deque(matches, maxlen=last + _UNREADABLE)):
        found = [*_values(match, percent, last), *found]
        if len(found) >= last:
            break
    return found[-last:] if last else []


def _prepared(text: str) -> str:
    text = plain_characters(text)
    if "frac" in text:
        text = _FRACTION.sub(_flat, text)
    return _MIXED.sub(_improper, _GROUPED.sub(lambda found: "," if found[0] == "{,}" else "", text))


def _flat(found: re.Match[str]) -> str:
    above, below = found[1] or found[3], found[2] or found[4]
    sign = "-" if (above[0] == "-") != (below[0] == "-") else ""
    before = found.string[found.start() - 1 : found.start()]
    return f"{' ' if before.isalnum() else ''}{sign}{above.lstrip('+-')}/{below.lstrip('+-')}"


def _improper(found: re.Match[str]) -> str:
    whole, above, below = (int(part) for part in found.groups())
    return found[0] if above >= below else f"{whole * below + above}/{below}"


def _values(match: re.Match[str], percent: bool, last: int | None = None) -> list[Fraction]:
    pieces = (match["whole"] or "").split(",")
    if _is_grouped(pieces):
        pieces = ["".join(pieces)]
    elif any(piece[0] == "0" and len(piece) > 1 for piece in pieces[1:]):
        return []
    pieces[-1] += f"{match['point'] or match['lead'] or ''}{match['power'] or ''}"
    if "-" in (match["sign"], match["inner"]):
        pieces[0] = f"-{pieces[0]}"
    values = [_exact(piece) for piece in (pieces if last is None else pieces[-last:])]
    if match["over"]:
        below = _exact(match["over"].strip().removeprefix("/").strip())
        if match.string[match.start() - 1 : match.start()] == "/":  # a date, a path: no fraction of fractions
            values.append(below)
        elif values[-1] is not None:
            values[-1] = values[-1] / below if below else None
    if match["percent"] and percent and values[-1] is not None:
        values[-1] /= 100
    return [value for value in values if value is not None]


def _is_grouped(pieces: list[str]) -> bool:
    first, *rest = pieces
    return not rest or first != "0" and len(first) <= 3 and all(len(piece) == 3 for piece in rest)


def _exact(text: str) -> Fraction | None:
    number, _, power = text.lower().partition("e")
    if len(number) > MOST_DIGITS or len(power) > 5 or abs(int(power or 0)) > LARGEST_EXPONENT:
        return None
    return Fraction(text)


def parse_number(value: object, percent: bool = False) -> Fraction | None:
    r"""
    Return a value that is one number, as an exact fraction; `None` where it is none, several, or more than a number.

    Args:
        value: A number, or a text that holds one and at most a sign of a currency, a percent sign, dollars of LaTeX
            and a period beside it. A float is what it prints as: 0.1 is 1/10.
        percent (`bool`, *optional*, defaults to `False`): Read `50%` as 1/2 rather than as 50.

    Example:
    ```python
    >>> [str(parse_number(v)) for v in ("$1,000.50", "0.75", "\\dfrac34", "3/4", "1e3", "12 cm", "1,00")]
    ['2001/2', '3/4', '3/4', '3/4', '1000', 'None', 'None']
    ```
    """
    if isinstance(value, bool) or value is None:
        return None
    if not isinstance(value, str):
        try:
            return Fraction(value) if isinstance(value, (int, Fraction)) else Fraction(repr(float(value)))  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            return None
    if len(value) > 4 * MOST_DIGITS:
        return None
    text = _prepared(value).strip().removeprefix("$").removesuffix("$").strip()
    text = text.removesuffix(".") if not text.endswith("..") else text
    text = re.sub(r"^([-+])\s+(?=[\\$.0-9])", r"\1", text)
    match = _NUMBER.fullmatch(text)
    if match is None or not _is_grouped((match["whole"] or "").split(",")):
        return None
    values = _values(match, percent)
    return values[0] if len(values) == 1 else None
