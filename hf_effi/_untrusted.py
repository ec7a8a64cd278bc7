"""Files that somebody else may have written: read with limits, and refused in one short sentence."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from .errors import BrokenFileError

#: a configuration is a page or two; a record of a long run has a page for each segment
LARGEST_YAML, LARGEST_JSON = 2**18, 2**26
DEEPEST, MOST_VALUES = 50, 20_000
_LARGEST_NUMBER = 1e30


def shorten(value: Any, limit: int = 80) -> str:
    """
    Return `repr` of a value on one line, cut in its middle where it is longer than `limit`.

    Example:
    ```python
    >>> shorten("a" * 100, 20)
    "'aaaaaaa...aaaaaaaa'"
    ```
    """
    text = _repr(value)
    if len(text) <= limit:
        return text
    half = (limit - 3) // 2
    return f"{text[:half]}...{text[len(text) - (limit - 3 - half) :]}"


def _repr(value: Any) -> str:
    try:
        return repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits has no decimal form
        return f"<{type(value).__name__}>"


def one_line(text: object, limit: int = 300) -> str:
    """Return a text without line breaks, cut at `limit`."""
    words = " ".join(str(text).split())
    return words if len(words) <= limit else f"{words[: limit - 3]}..."


def read_text(path: Path, largest: int) -> str:
    """
    Return a text file of at most `largest` bytes; no more of it is ever read.

    Raises:
        BrokenFileError: it is larger.
        UnicodeDecodeError, OSError: it is no UTF-8, or cannot be read.
    """
    with path.open("rb") as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise BrokenFileError(f"{path} is larger than {largest:,} bytes, more than such a file has.")
    return content.decode("utf-8")


def parse_json(text: str, where: object) -> Any:
    """
    Return the value of a JSON text.

    Raises:
        BrokenFileError: it is no JSON, or nested more than 50 deep.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else one_line(error, 120)
        raise BrokenFileError(f"{where} is damaged: {reason}.") from None
    if depth_of(value) > DEEPEST:
        raise BrokenFileError(f"{where} is damaged: it is nested more than {DEEPEST} deep.")
    return value


def load_json(path: Path) -> Any:
    """
    Return the value in a JSON file.

    Raises:
        BrokenFileError: it is no UTF-8, no JSON, nested too deeply, or larger than 64 MiB.
        OSError: it cannot be read.
    """
    try:
        text = read_text(path, LARGEST_JSON)
    except UnicodeDecodeError:
        raise BrokenFileError(f"{path} is damaged: it is not UTF-8.") from None
    return parse_json(text, path)


def stored_json(path: Path) -> dict[str, Any] | None:
    """
    Return the mapping in a file of a cache; `None` where there is none, or the file is damaged: it is made again.
    """
    try:
        value = load_json(path)
    except (OSError, BrokenFileError):
        return None
    return value if isinstance(value, dict) else None


def depth_of(value: Any) -> int:
    """
    Return how deep lists and mappings are nested, without recursion.

    Example:
    ```python
    >>> depth_of(1), depth_of([]), depth_of({"a": [1, {}]})
    (0, 1, 3)
    ```
    """
    deepest, level = 0, [value]
    while level := [part for part in level if isinstance(part, (dict, list))]:
        deepest += 1
        level = [inner for part in level for inner in (part.values() if isinstance(part, dict) else part)]
    return deepest


def is_number(value: Any) -> bool:
    """
    Return whether a value is a number that can be added up and drawn: finite, and no larger than 1e30.

    Example:
    ```python
    >>> [is_number(value) for value in (1, 2.5, True, None, "nan", float("inf"), 10**400)]
    [True, True, False, False, False, False, False]
    ```
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) <= _LARGEST_NUMBER and math.isfinite(value)


def check_yaml(text: str, where: object) -> None:
    """
    Refuse a YAML text that is too large, nested too deeply, or that its aliases blow up, before anything is built of
    it.

    Raises:
        BrokenFileError: with the limit.
        yaml.YAMLError: it is no YAML.
    """
    import yaml

    if len(text) > LARGEST_YAML:
        raise BrokenFileError(f"{where} has {len(text):,} characters; at most {LARGEST_YAML:,} of YAML are read.")
    sizes: dict[str, int] = {}  # anchor -> values that an alias of it stands for
    open_nodes: list[tuple[str | None, int]] = []
    total = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, total))
            if len(open_nodes) > DEEPEST:
                raise BrokenFileError(f"{where} is nested more than {DEEPEST} deep.")
            total += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor is not None:
                sizes[anchor] = total - before
        elif isinstance(event, yaml.ScalarEvent):
            total += 1
            if event.anchor is not None:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor in (anchor for anchor, _ in open_nodes):
                raise BrokenFileError(f"{where} has a value that holds itself (*{event.anchor[:40]}).")
            total += sizes.get(event.anchor, 1)
        if total > MOST_VALUES:
            raise BrokenFileError(f"{where} holds more than {MOST_VALUES:,} values, those of its aliases counted in.")
