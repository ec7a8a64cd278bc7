"""
How the processes of a run finish one checkpoint without talking to each other: by files in the folder in progress.

They write in the background, where a collective would get between those of the training.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from .._files import load_json, save_json
from ._locks import are_there, locked_elsewhere, take

#: the lock of whoever leads, and, with a number, of the other processes
LOCK = "lock"
_DONE = "done"


def locks_in(aside: Path) -> list[Path]:
    """Return the locks of a folder in progress."""
    return [aside / LOCK, *sorted(aside.glob(f"{LOCK}-*"))]


def join(aside: Path, rank: int) -> int:
    """Take part in a checkpoint that the leader has begun, and return the descriptor of the lock that says so."""
    path = aside / f"{LOCK}-{rank}"
    number = take(path)
    os.write(number, socket.gethostname().encode())
    return number


def report(aside: Path, rank: int, parts: dict[str, Any], problem: str | None = None) -> None:
    """
    Say that a process has written its files, and what is in them.

    Args:
        aside (`Path`): The folder in progress.
        rank (`int`): Of the process.
        parts (`dict`): Folder of a sharded state -> what [`StagedShards.write`] returned.
        problem (`str`, *optional*): What went wrong, where something did.
    """
    save_json(aside / f"{_DONE}-{rank}.json", {"parts": parts, "problem": problem})


def reports_of(aside: Path, ranks: Iterable[int], patience: float) -> list[dict[str, Any]]:
    """
    Wait until other processes have reported, and return the `parts` of each.

    Args:
        aside (`Path`): The folder in progress.
        ranks (`Iterable[int]`): Of the others.
        patience (`float`): How many seconds to wait while nobody writes a byte.

    Raises:
        OSError: one has failed, or has ended before its report, which on another machine only its silence shows.
    """
    end, size, found = time.monotonic() + patience, -1, []
    for rank in ranks:
        path, pause = aside / f"{_DONE}-{rank}.json", 0.005
        while not path.exists():
            # A process that ends leaves its lock; its report may have come in between.
            if _has_ended(aside / f"{LOCK}-{rank}") and not path.exists():
                raise OSError(f"process {rank} ended before it had written its part")
            if (now := time.monotonic()) > end:
                if (written := _bytes_in(aside)) == size:
                    raise TimeoutError(
                        f"process {rank} has not written its part, and nothing for {patience:.0f} seconds"
                    )
                end, size = now + patience, written
            time.sleep(pause)
            pause = min(2 * pause, 0.25)
        told = load_json(path)
        if told["problem"] is not None:
            raise OSError(f"process {rank}: {told['problem']}")
        found.append(told["parts"])
    return found


def _bytes_in(folder: Path) -> int:
    size = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # renamed since
            size += path.stat().st_size
    return size


def _has_ended(path: Path) -> bool:
    """Return whether a process of this machine has left its lock; of another machine a lock may say nothing."""
    try:
        here = path.read_text(encoding="utf-8") == socket.gethostname()
    except OSError:
        return False
    return here and are_there() and not locked_elsewhere(path)
