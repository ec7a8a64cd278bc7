"""
Unit scaling for static fp8 casts, after µnit Scaling (arXiv 2502.05967); the rules marked "ours" were not at hand.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from bench._low_precision import build, quantized_linear

E4M3_MAX, E5M2_MAX = 448.0, 57344.0
#: Share of the branch in a residual addition (ours, from the range that the paper's authors use).
TAU = 0.3


class StaticCast:
    """
    Clip to the format's range and cast, with no scale: e4m3 for inputs and weights, e5m2 for gradients; counts what is
    lost.
    """

    def __init__(self) -> None:
        self.overflows = self.underflows = self.elements = 0

    def __call__(self, tensor: torch.Tensor, role: str, contracted: int) -> torch.Tensor:
        largest, dtype = (E5M2_MAX, torch.float8_e5m2) if role == "grad" else (E4M3_MAX, torch.float8_e4m3fn)
        cast = tensor.clamp(-largest, largest).to(dtype).float()
        self.elements += tensor.numel()
        self.overflows += int((tensor.abs() > largest).sum())
        self.underflows += int(((cast == 0) & (tensor != 0)).sum())
        return cast


def dynamic_cast(tensor: torch.Tensor, role: str, contracted: int) -> torch.Tensor:
    """Cast with the scale of the tensor's largest magnitude, as the usual per-tensor recipe does."""
    largest, dtype = (E5M2_MAX, torch.float8_e5m2) if role == "grad" else (E4M3_MAX, torch.float8_e4m3fn)
    scale = tensor.abs().amax().clamp(min=1e-30) / largest
    return (tensor / scale).clamp(-largest, largest).to(dtype).float() * scale


class UnitLinear(nn.Linear):
    """`y = x W^T / sqrt(fan_in)` with `W ~ N(0, 1)`, operands cast without scales."""

    quantize: StaticCast

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return quantized_linear(x, self.weight, self.quantize) / math.sqrt(self.in_features)


class UnitHead(nn.Linear):
    """`logits = x W^T / fan_in` with `W ~ N(0, 1)`, in full precision."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / self.in_features


def mix(residual: torch.Tensor, branch: torch.Tensor, tau: float = TAU) -> torch.Tensor:
    """
    Return `sqrt(1 - tau) residual + sqrt(tau) branch`: unit variance from two independent parts of unit variance.
    """
    return math.sqrt(1 - tau) * residual + math.sqrt(tau) * branch


class UnitLayer(LlamaDecoderLayer):
    """A decoder layer that normalises what a branch returns, not what it gets."""

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        attended, _ = self.self_attn(hidden_states=hidden_states, **kwargs)
        hidden_states = mix(hidden_states, self.input_layernorm(attended))
        return mix(hidden_states, self.post_attention_layernorm(self.mlp(hidden_states)))


def build_unit_scaled(seed: int) -> LlamaForCausalLM:
    """Return the twin of `build(seed)`: the same shapes, unit-scaled; gains of norms are fixed at 1 (ours)."""
    model = build(seed)
    for layer in model.model.layers:
        layer.__class__ = UnitLayer
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.__class__ = UnitHead if name == "lm_head" else UnitLinear
            module.quantize = StaticCast()
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight)
        elif "norm" in name:
            module.weight.requires_grad_(False)
    return model


def loss_scale(tokens: int, width: int) -> float:
    """
    Return the power of two next to `tokens * width` (ours).

    A mean over tokens and the head's `1 / width` leave a gradient of about `1 / (tokens width)` for a hidden unit:
    without a constant in front of the loss it lies below e5m2's range.
    """
    return 2.0 ** round(math.log2(tokens * width))
