"""Kernels and model patches: per instance, verified when applied, undone exactly."""

from __future__ import annotations

from ._errors import KernelMismatchError, PatchError
from ._patch import KernelPatchHandle, patch, unpatch
from .fused_lora import FusedLoRALinear
from .low_bit_lora import LowBitLoRALinear
from .tiled_mlp import TiledMLP
from .trl_head import FusedLMHead

__all__ = [
    "FusedLMHead",
    "FusedLoRALinear",
    "KernelMismatchError",
    "KernelPatchHandle",
    "LowBitLoRALinear",
    "PatchError",
    "TiledMLP",
    "patch",
    "unpatch",
]
