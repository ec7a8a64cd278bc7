"""Kernels and model patches: per instance, verified when applied, undone exactly."""

from __future__ import annotations

from ._errors import KernelMismatchError, PatchError
from ._patch import KernelPatchHandle, patch, unpatch

__all__ = ["KernelMismatchError", "PatchError", "KernelPatchHandle", "patch", "unpatch"]
