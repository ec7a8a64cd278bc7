"""Functions for a child process that import nothing heavy: targets of the kit's own tests."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence


def show_environment(names: Sequence[str]) -> dict[str, str | None]:
    """Return these environment variables as a child sees them."""
    return {name: os.environ.get(name) for name in names}


def hang() -> None:
    """Print a line, then never return."""
    print("about to hang")
    time.sleep(3600)
