"""Who is writing to a folder: a lock that the system takes back from a process that ends, however it ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .._compat import import_module_or_none

#: of POSIX systems only
fcntl = import_module_or_none("fcntl")


def are_there() -> bool:
    """Return whether this system has such locks."""
    return fcntl is not None


def take(path: Path) -> int:
    """
    Lock a file, which is made, and return its descriptor. The lock is held until every copy of the descriptor is
    closed, one that was sent to another process too. Where there are no such locks, as on Windows, nothing is held.

    Raises:
        BlockingIOError: another process holds it.
    """
    number = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if fcntl is not None:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(number)
        raise
    return number


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """[`take`] the lock of a file for a while."""
    number = take(path)
    try:
        yield
    finally:
        os.close(number)


def locked_elsewhere(path: Path) -> bool:
    """Return whether a process holds the lock of a file."""
    if not path.exists():
        return False
    try:
        with lock(path):
            return False
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
