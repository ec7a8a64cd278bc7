"""Errors of `patch`."""

from __future__ import annotations

from ..patching.handle import PatchError

__all__ = ["KernelMismatchError", "PatchError"]


class KernelMismatchError(PatchError):
    """A replacement that does not compute what it replaces."""
