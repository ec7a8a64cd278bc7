"""
Liger's kernels as stateless layers that read weights and settings of the module they replace.

Inside a compiled graph the original runs, which the compiler fuses by itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .._compat import require
from ..errors import RefusedError
from ._targets import LOSS_NAME, ROTARY_NAME

_ops = require("liger_kernel.ops", "the Liger layers")


def _epsilon(norm: nn.Module) -> float:
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps


class LigerRMSNorm(nn.Module):
    """`weight * x / rms(x)`, with the product in the dtype of `x`: Llama, Mistral, Qwen."""

    has_backward = True
    can_torch_compile = False

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # in_place=False: the backward would otherwise overwrite the incoming gradient, which others may share.
        return _ops.LigerRMSNormFunction.apply(hidden_states, self.weight, _epsilon(self), 0.0, "llama", False)


class LigerGemmaRMSNorm(nn.Module):
    """`(1 + weight) * x / rms(x)`, all in fp32: Gemma 1, 2 and 3."""

    has_backward = True
    can_torch_compile = False

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return _ops.LigerRMSNormFunction.apply(hidden_states, self.weight, _epsilon(self), 1.0, "gemma", False)


class LigerSwiGLUMLP(nn.Module):
    """`down(silu(gate(x)) * up(x))`; saves gate and up, and computes the product again in the backward."""

    has_backward = True
    can_torch_compile = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(_ops.LigerSiLUMulFunction.apply(self.gate_proj(x), self.up_proj(x)))


class LigerGeGLUMLP(nn.Module):
    """`down(gelu_tanh(gate(x)) * up(x))`."""

    has_backward = True
    can_torch_compile = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(_ops.LigerGELUMulFunction.apply(self.gate_proj(x), self.up_proj(x)))


class LigerRotary(nn.Module):
    """Rotary embedding of queries and keys in one launch, in place; angles in halves, as Llama's."""

    has_backward = True
    can_torch_compile = False

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return _ops.LigerRopeFunction.apply(q, k, cos, sin, None, unsqueeze_dim)


class LigerCausalLMLoss(nn.Module):
    """Cross-entropy of shifted labels, with its gradient made in the forward."""

    has_backward = True
    can_torch_compile = False

    def forward(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor | None,
        vocab_size: int,
        num_items_in_batch: torch.Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if shift_labels is None:
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        flat = shift_labels.reshape(-1).to(logits.device)
        reduction = "mean" if num_items_in_batch is None else "sum"
        # Liger writes the gradient over its input: a copy keeps `outputs.logits`, and in fp32 the loss is not rounded.
        rows = logits.reshape(-1, vocab_size).to(torch.float32, copy=True)
        loss = _ops.LigerCrossEntropyFunction.apply(rows, flat, None, ignore_index, 0.0, 0.0, reduction)[0]
        if num_items_in_batch is None:
            return loss
        return loss / torch.as_tensor(num_items_in_batch, device=loss.device)


#: kernel name -> layers, of which `patch` takes the first that passes its self-check
LAYERS: dict[str, tuple[type[nn.Module], ...]] = {
    "RMSNorm": (LigerRMSNorm, LigerGemmaRMSNorm),
    "SwiGLUMLP": (LigerSwiGLUMLP,),
    "GeGLUMLP": (LigerGeGLUMLP,),
    ROTARY_NAME: (LigerRotary,),
    LOSS_NAME: (LigerCausalLMLoss,),
}

_OF_LIGER = {
    "LigerRMSNorm": LigerRMSNorm,
    "LigerRMSNormForGemma": LigerGemmaRMSNorm,
    "LigerRMSNormForGemma2": LigerGemmaRMSNorm,
    "LigerRMSNormForGemma3": LigerGemmaRMSNorm,
    "LigerSwiGLUMLP": LigerSwiGLUMLP,
    "LigerGEGLUMLP": LigerGeGLUMLP,
}


def stateless(layer: type[nn.Module]) -> type[nn.Module]:
    """
    Return the stateless twin of one of Liger's classes, which keep settings of their own.

    Raises:
        RefusedError: there is none.
    """
    if layer.__name__ not in _OF_LIGER:
        raise RefusedError(f"{layer.__name__} of Liger has no stateless twin here. There are: {', '.join(_OF_LIGER)}.")
    return _OF_LIGER[layer.__name__]
