"""What only observes never ends a run: one guard for every record, doctor and summary."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)


def only_observes(event: Callable[..., None]) -> Callable[..., None]:
    """
    Decorate an event of a callback that offers `stop_observing(error)`: what fails in it ends the observation.

    `stop_observing` says so, once, and lets go of the run. Ctrl-C and other ends of a process pass.
    """

    @functools.wraps(event)
    def observed(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            event(self, *args, **kwargs)
        except Exception as error:
            self.stop_observing(error)

    return observed


def describe(error: BaseException) -> str:
    """Return an error as one line of at most 300 characters, also where its own text cannot be had."""
    try:
        text = " ".join(f"{type(error).__name__}: {error}".split())
    except Exception:
        text = type(error).__name__
    return text if len(text) <= 300 else f"{text[:299]}…"
