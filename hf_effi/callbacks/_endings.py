"""
How a run ends that no event tells of: an exception, Ctrl-C, SIGTERM, the end of Python.

Callbacks are not told of an exception. Records that are open are therefore closed when Python ends, which knows the
exception that ended it, and when a signal ends the process that Python itself does not handle. What is killed by
SIGKILL stays "running"; its last `updated` says since when.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

from .._run_record import RunStore
from .observer import describe

logger = logging.getLogger(__name__)
#: what ends a process without a word, where nobody handles it
_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
_open: dict[int, RunStore] = {}
_process: int | None = None


def watch_end(store: RunStore) -> None:
    """Close the record of a run in whatever way its process ends, unless [`forget_end`] comes first."""
    global _process
    if not _open:
        _process = os.getpid()
        atexit.register(_at_exit)
        _handle_signals()
    _open[id(store)] = store


def forget_end(store: RunStore) -> None:
    """The run has ended, or is recorded no longer."""
    if _open.pop(id(store), None) is not None and not _open:
        atexit.unregister(_at_exit)
        _release_signals()


def end_record(store: RunStore, error: BaseException | str | None) -> None:
    """
    Write how a run ended: `"failed"` with the error, or `"interrupted"` by Ctrl-C, a signal or whoever stopped
    waiting.

    Nothing that fails here is raised: the run has its own reason to end.
    """
    failed = isinstance(error, Exception)
    try:
        reason = describe(error) if isinstance(error, BaseException) else error
        store.end("failed" if failed else "interrupted", reason)
    except Exception as problem:
        logger.warning("The record does not say how the run ended: %s", describe(problem))


def _at_exit() -> None:
    error = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
    _end_all(error if isinstance(error, BaseException) else None)


def _end_all(error: BaseException | str | None) -> None:
    if os.getpid() != _process:
        return  # a child that was forked: the run is its parent's
    for store in list(_open.values()):
        end_record(store, error)
    _open.clear()


def _on_signal(number: int, frame: FrameType | None) -> Any:
    _end_all(signal.Signals(number).name)
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)  # what would have happened


def _handle_signals() -> None:
    if threading.current_thread() is not threading.main_thread():
        return  # Python lets no other thread handle signals
    for number in _SIGNALS:
        if signal.getsignal(number) is signal.SIG_DFL:  # else somebody ends the run in a way of his own
            signal.signal(number, _on_signal)


def _release_signals() -> None:
    if threading.current_thread() is not threading.main_thread():
        return
    for number in _SIGNALS:
        if signal.getsignal(number) is _on_signal:
            signal.signal(number, signal.SIG_DFL)
