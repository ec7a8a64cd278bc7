"""Kernels and model patches: per instance, verified when applied, undone exactly."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._faces import face

#: public name -> module that defines it
_PUBLIC = {
    "FusedLMHead": "hf_effi.kernels.trl_head",
    "FusedLoRALinear": "hf_effi.kernels.fused_lora",
    "KernelPatchHandle": "hf_effi.kernels._patch",
    "LowBitLoRALinear": "hf_effi.kernels.low_bit_lora",
    "PatchHandle": "hf_effi.patching.handle",
    "TiledMLP": "hf_effi.kernels.tiled_mlp",
    "patch": "hf_effi.kernels._patch",
    "tile_mlp": "hf_effi.kernels.tiled_mlp",
    "unpatch": "hf_effi.patching.handle",
}

if TYPE_CHECKING:  # what editors, type checkers and the reference see of the lazy names
    from ..patching.handle import PatchHandle as PatchHandle
    from ..patching.handle import unpatch as unpatch
    from ._patch import KernelPatchHandle as KernelPatchHandle
    from ._patch import patch as patch
    from .fused_lora import FusedLoRALinear as FusedLoRALinear
    from .low_bit_lora import LowBitLoRALinear as LowBitLoRALinear
    from .tiled_mlp import TiledMLP as TiledMLP
    from .tiled_mlp import tile_mlp as tile_mlp
    from .trl_head import FusedLMHead as FusedLMHead

__getattr__, __dir__, __all__ = face(__name__, _PUBLIC)
