"""Which collectives each rank ran, and from where: ranks that disagree are told by name, in place of a hang."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

#: of `torch.distributed`, over all ranks
NAMES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
)
_BELOW = ("torch", "accelerate", "contextlib.py")


#: the file of this process; a list, so that it can be named after the functions were replaced
_FILE: list[Path] = []


def record_collectives(path: Path) -> None:
    """
    Append a line to `path` for each collective of the whole group that this process begins: its place and its name.
    """
    watch_collectives()
    _FILE[:] = [path]


@functools.cache
def watch_collectives() -> None:
    """Replace the collectives of `torch.distributed`, before others take them by name; nothing is written yet."""
    import torch.distributed as dist
    from torch.distributed import distributed_c10d as c10d

    inside = threading.local()

    def recorded(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def record(*args: Any, **kwargs: Any) -> Any:
            groups = [value for value in (*args, *kwargs.values()) if isinstance(value, dist.ProcessGroup)]
            of_a_part = any(group is not dist.group.WORLD for group in groups)
            if not _FILE or of_a_part or getattr(inside, "one", False):
                return call(*args, **kwargs)
            with _FILE[0].open("a", encoding="utf-8") as file:
                file.write(f"{_place()} {name}\n")
            inside.one = True
            try:
                return call(*args, **kwargs)
            finally:
                inside.one = False

        return record

    for name in NAMES:
        call = recorded(name, getattr(c10d, name))
        setattr(c10d, name, call)
        setattr(dist, name, call)


def _place() -> str:
    """Return file and function of the innermost caller that is not torch or accelerate."""
    frame = sys._getframe(2)
    while frame is not None:
        parts = Path(frame.f_code.co_filename).parts
        below = parts[-1] in _BELOW or any(f"site-packages/{name}/" in "/".join(parts) for name in _BELOW)
        if not below:
            return f"{'/'.join(parts[-2:])}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "?"


def read_collectives(path: Path) -> list[str]:
    """Return the lines of one rank; none where it ran no collective."""
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def first_difference(ranks: Sequence[Sequence[str]], whole: bool) -> str | None:
    """
    Say where ranks began to run different collectives; `None` where they agree.

    Args:
        ranks: The lines of each rank, in order.
        whole (`bool`): Whether all ranks came to their end. Otherwise one may have more lines than another.

    Example:
    ```python
    >>> first_difference([["a.py:f barrier", "a.py:g gather"], ["a.py:g gather"]], whole=False)
    'collective 1 differs: rank 0 a.py:f barrier, rank 1 a.py:g gather'
    ```
    """
    for number, calls in enumerate(zip_longest(*ranks, fillvalue="none") if whole else zip(*ranks, strict=False), 1):
        if len(set(calls)) > 1:
            shown = ", ".join(f"rank {rank} {call}" for rank, call in enumerate(calls))
            return f"collective {number} differs: {shown}"
    return None
