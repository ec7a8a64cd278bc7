"""Kernels and model patches: per instance, verified when applied, undone exactly."""

from __future__ import annotations

from ._errors import KernelMismatchError, PatchError
from ._patch import PatchHandle, patch, unpatch

__all__ = ["KernelMismatchError", "PatchError", "PatchHandle", "patch", "unpatch"]
