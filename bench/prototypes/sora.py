"""SoRA: LoRA with a gate for each direction, which a proximal step closes; folded into plain LoRA afterwards."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn


def soft_threshold(values: torch.Tensor, threshold: float) -> torch.Tensor:
    """
    Return `sign(v) max(|v| - t, 0)`.

    (The authors' code sets what is left below `t` to 0 once more, so that its dead zone is `2 t`.)

    Example:
    ```python
    >>> soft_threshold(torch.tensor([0.5, 1.5, 2.5, -1.5, -3.0]), 1.0).tolist()
    [0.0, 0.5, 1.5, -0.5, -2.0]
    ```
    """
    return values.sign() * (values.abs() - threshold).clamp_min(0.0)


class GatedLora(nn.Module):
    """`y = W x + s B diag(g) A x` over a frozen linear; without a gate it is plain LoRA. Rank 0 adds nothing."""

    def __init__(self, base: nn.Linear, rank: int, scaling: float, *, gated: bool) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scaling = scaling
        self.lora_a = nn.Parameter(torch.empty(rank, base.in_features))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank))
        if rank:
            nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self.gate = nn.Parameter(torch.randn(rank)) if gated else None

    @property
    def rank(self) -> int:
        """Directions in use."""
        return self.lora_a.size(0) if self.gate is None else int((self.gate != 0).sum())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = x @ self.lora_a.T
        if self.gate is not None:
            inner = inner * self.gate
        return self.base(x) + self.scaling * inner @ self.lora_b.T

    @torch.no_grad()
    def folded(self) -> GatedLora:
        """Return plain LoRA of the directions in use: `A <- diag(g) A`, closed rows dropped, the scaling kept."""
        if self.gate is None:
            return self
        keep = self.gate != 0
        plain = GatedLora(self.base, int(keep.sum()), self.scaling, gated=False)
        plain.lora_a.copy_((self.gate[:, None] * self.lora_a)[keep])
        plain.lora_b.copy_(self.lora_b[:, keep])
        return plain


def adapt(
    model: nn.Module, rank_of: Callable[[str], int], scaling: float, *, gated: bool = False
) -> dict[str, GatedLora]:
    """Freeze `model` and wrap every linear below its layers; return the adapters by name."""
    model.requires_grad_(False)
    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n]
    found = {}
    for name, linear in linears:
        found[name] = GatedLora(linear, rank_of(name), scaling, gated=gated)
        replace(model, name, found[name])
    return found


def fold(model: nn.Module, adapters: dict[str, GatedLora]) -> dict[str, GatedLora]:
    """Put plain LoRA in the place of every gated one."""
    plain = {name: adapter.folded() for name, adapter in adapters.items()}
    for name, adapter in plain.items():
        replace(model, name, adapter)
    return plain


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


@torch.no_grad()
def proximal_step(adapters: dict[str, GatedLora], learning_rate: float, penalty: float) -> None:
    """`g <- soft_threshold(g, learning_rate penalty)`, after the optimizer's step."""
    for adapter in adapters.values():
        if adapter.gate is not None:
            adapter.gate.copy_(soft_threshold(adapter.gate, learning_rate * penalty))
