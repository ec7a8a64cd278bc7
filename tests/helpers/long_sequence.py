"""What tests of tiled and chunked computation compare: gradients of models that are in fp64 all through."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn


def in_double(model: nn.Module) -> nn.Module:
    """Return the model in fp64 all through: the RMS norms of transformers compute in fp32 whatever they are given."""

    def norm(module: Any, x: torch.Tensor) -> torch.Tensor:
        eps = getattr(module, "variance_epsilon", None) or module.eps
        scale = 1 + module.weight if type(module).__name__.startswith("Gemma") else module.weight
        return scale * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(norm, module)
    return model.double()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the gradients by name and clear them."""
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_equal_gradients(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], tolerance: float) -> None:
    """Fail unless every gradient differs by at most `tolerance`, relative to the largest entry of its tensor."""
    if left.keys() != right.keys():
        raise AssertionError(f"other parameters have gradients: {sorted(left.keys() ^ right.keys())}")
    for name, expected in left.items():
        if not expected.numel():
            continue
        error = (expected - right[name]).abs().max().item() / max(expected.abs().max().item(), 1e-30)
        if not error <= tolerance:
            raise AssertionError(f"{name}: relative error {error:.2e}, allowed {tolerance:.0e}")
