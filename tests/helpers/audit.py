"""
A hook of the interpreter that fails a test when anything is opened, imported, connected or started outside of a list.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

_EVENTS = ("open", "import", "socket", "subprocess", "os.system", "os.exec", "os.posix_spawn", "os.remove",
    "os.rename",
           "os.mkdir", "os.rmdir", "shutil", "urllib", "ctypes.dlopen", "exec", "webbrowser")  # fmt: skip
#: what Python and the libraries do by themselves
_SYSTEM = (
    "/proc/",
    "/sys/",
    "/dev/null",
    "/dev/urandom",
    "linecache",
    "/site-packages/",
    "/lib/python3",
    "<string>",
    "<module>",
)
_seen: list[str] | None = None


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _seen is not None and event.startswith(_EVENTS):
        _seen.append(f"{event} {arguments[0] if arguments else ''}")


sys.addaudithook(_watch)  # cannot be taken out again; it is idle outside of `watched`


@contextlib.contextmanager
def watched(*allowed: str) -> Iterator[None]:
    """Fail if anything happens but for paths and modules that contain one of `allowed`."""
    global _seen
    before, found = _seen, []
    _seen = found
    try:
        yield
    finally:
        _seen = before
    outside = [entry for entry in found if not any(part in entry for part in (*allowed, *_SYSTEM))]
    assert not outside, outside


def loaded(names: tuple[str, ...]) -> list[str]:
    """Return which of these modules have been imported."""
    return [name for name in names if name in sys.modules]


def files_below(folder: str | os.PathLike[str]) -> set[str]:
    """Return every path below a folder."""
    return {os.path.join(place, name) for place, folders, names in os.walk(folder) for name in (*folders, *names)}
