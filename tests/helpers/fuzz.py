"""Changes to data and bytes that a stranger, a bad disk or a torn copy could make."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from typing import Any

#: what stands in the place of a value
HOSTILE: tuple[Any, ...] = (
    None, True, -1, 0, 10**400, 1e308, -1e39, float("nan"), float("inf"), "", "/etc/passwd", "../../x",
    "http://127.0.0.1:9/x", "evil/repo", "os:system", "$(touch x)", "a$b$c", "<!-- hf_effi section "
        "-->", "</script>", "```",
    "a" * 5000, "\u202e", [], {}, [[]], [1] * 300, {"a": {"b": {"c": [1]}}}, "__import__('os')",
    "!!python/object:os.system",
)  # fmt: skip


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path to each part of nested data."""
    yield path
    for key in data if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ():
        yield from places(data[key], (*path, key))


def mutated(data: Any, rng: random.Random, values: Sequence[Any] = HOSTILE, names: Sequence[str] = ()) -> Any:
    """
    Return a copy of nested data with one to three changes: a value replaced, added, taken out or doubled.

    Args:
        names (`Sequence[str]`, *optional*): Keys that are added; without it those that the data has somewhere.
    """
    data = copy.deepcopy(data)
    for _ in range(rng.randint(1, 3)):
        paths = [path for path in places(data) if path]
        if not paths:
            return data
        path = rng.choice(paths)
        parent = data
        for key in path[:-1]:
            parent = parent[key]
        action = rng.random()
        if action < 0.55:
            parent[path[-1]] = copy.deepcopy(rng.choice(values))
        elif action < 0.75 and isinstance(parent, dict):
            known = names or [path[-1] for path in paths if isinstance(path[-1], str)] or ["x"]
            parent[rng.choice(known)] = copy.deepcopy(rng.choice(values))
        elif action < 0.9 and isinstance(parent, dict):
            del parent[path[-1]]
        else:
            parent[path[-1]] = [copy.deepcopy(parent[path[-1]])] * 2
    return data


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Return bytes that are cut, changed, doubled, nested, or have others in between."""
    at = rng.randrange(len(content) + 1)
    end = min(len(content), at + rng.randint(1, 40))
    action = rng.randrange(6)
    if action == 0:
        return content[:at]
    if action == 1:
        return content[:at] + content[end:]
    if action == 2:
        return content[:at] + rng.randbytes(end - at) + content[end:]
    if action == 3:
        return content[:at] + content[at:end] * rng.randint(2, 50) + content[end:]
    if action == 4:
        piece = rng.choice(
            [b"[", b"{", b'{"a":', b"&a [*a, ", b"\x00", b"\xff\xfe", b"- ", b"? ", b"<<: *x\n", b"'", b'"']
        )
        return content[:at] + piece * rng.choice([1, 3, 5000]) + content[at:]
    return content[end:] + content[:at]
