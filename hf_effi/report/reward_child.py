"""One call of a reward function, also as the whole of a process: nothing but what the function needs is imported."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import pickle
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def call(reward: Callable[..., Any], arguments: Mapping[str, Any], state: Any) -> Any:
    """Call a reward function with what TRL adds to the columns, and wait for one that is asynchronous."""
    extra = {"trainer_state": state, "log_extra": _ignore, "log_metric": _ignore}
    values = reward(**arguments, **extra)
    if inspect.isawaitable(values):
        values = asyncio.run(_wait(values))
    if hasattr(values, "tolist"):
        return values
    with contextlib.suppress(TypeError):
        return list(values)
    return values


async def _wait(values: Any) -> Any:
    return await values


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Stand for the trainer's log."""


def main(source: str, out: str) -> None:
    """Call the function that was pickled into one file, and pickle its values into another."""
    reward, arguments, state = pickle.loads(Path(source).read_bytes())
    values = call(reward, arguments, SimpleNamespace(**state))
    Path(out).write_bytes(pickle.dumps(values.tolist() if hasattr(values, "tolist") else values))


if __name__ == "__main__":
    main(*sys.argv[1:])
