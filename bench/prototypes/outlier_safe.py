"""Outlier-safe pre-training: Muon on every weight, norms with one gain, projections around the embeddings."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

#: of the quintic iteration that brings all singular values near 1
COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5


def orthogonalised(matrix: torch.Tensor) -> torch.Tensor:
    """Return the matrix with its singular values brought near 1 (between 0.7 and 1.2)."""
    a, b, c = COEFFICIENTS
    tall = matrix.size(0) > matrix.size(1)
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(ITERATIONS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if tall else x


class MuonAll(torch.optim.Optimizer):
    """
    Muon for every weight, embeddings and head too: Nesterov momentum, matrices orthogonalised, vectors normalised,
    both times `0.2 sqrt(max(shape))`, scalars `0.2 sign`.
    """

    def __init__(self, params: Iterable[Any], lr: float, momentum: float = 0.95, weight_decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                buffer = state["momentum"].mul_(group["momentum"]).add_(weight.grad)
                update = muon_update(weight.grad + group["momentum"] * buffer)
                weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * update)


def muon_update(direction: torch.Tensor) -> torch.Tensor:
    if direction.dim() == 0:
        return 0.2 * direction.sign()
    scale = 0.2 * math.sqrt(max(direction.shape))
    if direction.dim() == 2:
        return scale * orthogonalised(direction)
    return scale * direction / direction.norm().clamp_min(1e-12)


class SSNorm(nn.Module):
    """RMSNorm with one gain for all features."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.gain, self.eps = nn.Parameter(torch.tensor(1.0)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


def use_ss_norm(model: nn.Module) -> int:
    """Put [`SSNorm`] in the place of every RMSNorm; return how many there were."""
    found = [(n, m) for n, m in model.named_modules() if type(m).__name__.endswith("RMSNorm")]
    for name, norm in found:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, SSNorm(norm.variance_epsilon))
    return len(found)


def add_embedding_projections(model: nn.Module) -> None:
    """Put an orthogonal square matrix behind the embedding and one before the head, which must not be tied."""
    embedding, head = model.model.embed_tokens, model.lm_head
    if embedding.weight is head.weight:
        raise ValueError("Embedding and head are tied: one matrix cannot take two projections.")
    after, before = (nn.Linear(embedding.embedding_dim, embedding.embedding_dim, bias=False) for _ in range(2))
    for projection in (after, before):
        nn.init.orthogonal_(projection.weight)
    model.model.embed_tokens = nn.Sequential(embedding, after)
    model.lm_head = nn.Sequential(before, head)


@torch.no_grad()
def fold_embedding_projections(model: nn.Module) -> None:
    """Multiply the projections into embedding and head: the same model without them."""
    (embedding, after), (before, head) = model.model.embed_tokens, model.lm_head
    embedding.weight.copy_(embedding.weight @ after.weight.T)
    head.weight.copy_(head.weight @ before.weight)
    model.model.embed_tokens, model.lm_head = embedding, head


def excess_kurtosis(hidden: torch.Tensor) -> torch.Tensor:
    """
    Return `E[(x - mean)^4] / var^2 - 3` of each token over its features, `hidden` `(..., features)`.

    Centred and per token. The paper's script neither centres nor has context, so its figures (0.04 against 1818) are
    not comparable.

    Example:
    ```python
    >>> round(excess_kurtosis(torch.tensor([0.0, 0.0, 0.0, 10.0])).item(), 4)
    -0.6667
    ```
    """
    centred = hidden - hidden.mean(-1, keepdim=True)
    variance = centred.pow(2).mean(-1)
    return centred.pow(4).mean(-1) / variance.pow(2).clamp_min(1e-24) - 3


def rounded(values: torch.Tensor, bits: int = 4) -> torch.Tensor:
    """Round to nearest with one scale for each row of the last dimension."""
    most = 2 ** (bits - 1) - 1
    scale = values.abs().amax(-1, keepdim=True).clamp_min(1e-12) / most
    return (values / scale).round().clamp(-most - 1, most) * scale


class RoundedLinear(nn.Module):
    """A linear whose weights and inputs are rounded to four bits."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", rounded(linear.weight.detach()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(rounded(x), self.weight)


def round_layers(model: nn.Module) -> int:
    """Round weights and inputs of every linear below the layers, for evaluation; return how many."""
    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n]
    for name, linear in linears:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, RoundedLinear(linear))
    return len(linears)
