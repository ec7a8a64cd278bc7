"""Kernels and model patches: per instance, verified when applied, undone exactly."""

from __future__ import annotations

from ._errors import KernelMismatchError, PatchError
from ._patch import KernelPatchHandle, patch, unpatch
from .fused_lora import FusedLoRALinear
from .tiled_mlp import TiledMLP

__all__ = [
    "FusedLoRALinear",
    "KernelMismatchError",
    "KernelPatchHandle",
    "PatchError",
    "TiledMLP",
    "patch",
    "unpatch",
]
