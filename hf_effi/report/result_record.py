"""The one schema of result files: what was measured, where, with which versions, by which command."""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from typing import Any

from .._compat import installed_versions
from .._environment import current_commit, describe_machine

#: Keys of every result file, in the order they are written.
RECORD_KEYS = ("bench", "commit", "date", "machine", "versions", "command", "seeds", "headline", "rows")
HEADLINE_KEYS = ("name", "value", "goal", "met")

_GOAL = re.compile(r"^(<=|>=|<|>|=) (-?\d+(?:\.\d+)?(?:e-?\d+)?)$")


def headline(name: str, value: float | None, goal: str | None = None) -> dict[str, Any]:
    """
    Return one named figure, and whether its goal was met.

    Args:
        value (`float` or `None`): `None` where the figure does not exist (a target never reached): goal not met.
        goal (`str`, *optional*): Operator and number, such as `">= 1.6"`.

    Example:
    ```python
    >>> headline("step_speedup", 1.72, ">= 1.6")
    {'name': 'step_speedup', 'value': 1.72, 'goal': '>= 1.6', 'met': True}
    ```
    """
    if goal is None:
        return {"name": name, "value": value, "goal": None, "met": None}
    match = _GOAL.match(goal)
    if match is None:
        raise ValueError(f"goal of {name!r} must be an operator and a number such as '>= 1.6', got {goal!r}.")
    limit = float(match.group(2))
    met = (
        value is not None
        and {
            "<=": value <= limit,
            ">=": value >= limit,
            "<": value < limit,
            ">": value > limit,
            "=": value == limit,
        }[match.group(1)]
    )
    return {"name": name, "value": value, "goal": goal, "met": met}


def make_record(
    bench: str, command: str, seeds: Sequence[int], headlines: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Return a complete result in the schema, stamped with date, commit, machine and versions."""
    return {
        "bench": bench,
        "commit": current_commit(),
        "date": datetime.date.today().isoformat(),
        "machine": describe_machine(),
        "versions": installed_versions(),
        "command": command,
        "seeds": list(seeds),
        "headline": list(headlines),
        "rows": list(rows),
    }


def check_record(record: Any, source: str = "result") -> None:
    """
    Check a result against the schema.

    Raises:
        ValueError: a key is missing or has the wrong type, or `met` disagrees with value and goal; names `source`.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{source}: a result must be a JSON object, got {type(record).__name__}.")
    if missing := [key for key in RECORD_KEYS if key not in record]:
        raise ValueError(f"{source}: missing {', '.join(missing)}. A result has {', '.join(RECORD_KEYS)}.")
    for key, kind in {"machine": dict, "versions": dict, "seeds": list, "headline": list, "rows": list}.items():
        if not isinstance(record[key], kind):
            raise ValueError(f"{source}: {key} must be a {kind.__name__}, got {type(record[key]).__name__}.")
    for item in record["headline"]:
        if not isinstance(item, dict) or sorted(item) != sorted(HEADLINE_KEYS):
            raise ValueError(f"{source}: a headline has exactly {', '.join(HEADLINE_KEYS)}, got {item!r}.")
        if isinstance(item["goal"], str) and headline(**{k: item[k] for k in HEADLINE_KEYS[:3]})["met"] != item["met"]:
            raise ValueError(f"{source}: {item['name']} says met={item['met']}, which disagrees with its goal.")
