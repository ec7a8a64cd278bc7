"""Errors of `patch`."""

from __future__ import annotations


class PatchError(ValueError):
    """A patch that cannot be applied or undone as asked; the message names the module and the fix."""


class KernelMismatchError(PatchError):
    """A replacement that does not compute what it replaces."""
