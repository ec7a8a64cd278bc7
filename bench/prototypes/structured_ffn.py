"""
Linear layers as products of small factors, and self-guided training of them (arXiv 2406.16450).

A guide weight `W0`, which begins as the product of the factors, carries the layer at first:
`y = alpha x W0^T + (1 - alpha) f(x)` with `alpha` from 1 to 0 over the first half of the run.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def guide_alpha(step: int, total_steps: int) -> float:
    """Return the share of the guide at `step`: a cosine from 1 to 0 over the first half of the run, then 0."""
    done = step / (total_steps / 2)
    return 0.5 * (1 + math.cos(math.pi * done)) if done < 1 else 0.0


def _orthogonal_(factor: Tensor) -> Tensor:
    """Replace each matrix by its nearest one with orthonormal rows or columns."""
    left, _, right = torch.linalg.svd(factor, full_matrices=False)
    return factor.copy_(left @ right)


def _normal(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) * shape[-1] ** -0.5)


class StructuredLinear(nn.Module):
    """
    A linear layer without bias that subclasses build from factors.

    Attributes:
        alpha (`float`): Share of the guide in `[0, 1]`; the guide is not computed at 0.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.alpha = 0.0
        self.guide: nn.Parameter | None = None

    def add_guide(self) -> StructuredLinear:
        """Add a dense guide, equal to the product of the factors."""
        self.guide, self.alpha = nn.Parameter(self.dense_weight().detach().clone()), 1.0
        return self

    def product(self, x: Tensor) -> Tensor:
        """Apply the factors to `x`, shape `(tokens, in_features)`."""
        raise NotImplementedError

    def dense_weight(self) -> Tensor:
        """Return the product of the factors, `(out_features, in_features)`."""
        return self.product(torch.eye(self.in_features, dtype=next(self.parameters()).dtype)).t()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        y = self.product(rows)
        if self.alpha:
            y = self.alpha * F.linear(rows, self.guide) + (1 - self.alpha) * y
        return y.view(*x.shape[:-1], self.out_features)


class LowRank(StructuredLinear):
    """
    `W = up down`: the best approximation of a random dense matrix, each factor with the root of the singular values.
    """

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__(in_features, out_features)
        left, values, right = torch.linalg.svd(_normal(out_features, in_features).detach(), full_matrices=False)
        root = values[:rank].sqrt()
        self.up = nn.Parameter(left[:, :rank] * root)
        self.down = nn.Parameter(root[:, None] * right[:rank])

    def product(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down), self.up)


class BlockDense(StructuredLinear):
    """Diagonal blocks `in -> rank`, then a dense matrix `rank -> out`, all orthogonal at first."""

    def __init__(self, in_features: int, out_features: int, rank: int, blocks: int) -> None:
        super().__init__(in_features, out_features)
        self.first, self.second = _normal(blocks, rank // blocks, in_features // blocks), _normal(out_features, rank)
        with torch.no_grad():
            _orthogonal_(self.first)
            _orthogonal_(self.second)

    def product(self, x: Tensor) -> Tensor:
        return F.linear(_block_product(x, self.first).transpose(0, 1).flatten(1), self.second)


class BlockShuffle(StructuredLinear):
    """Two matrices of diagonal blocks with a shuffle after each (Monarch); the inner width is the smaller one."""

    def __init__(self, in_features: int, out_features: int, blocks: int) -> None:
        super().__init__(in_features, out_features)
        inner = min(in_features, out_features)
        self.first = _normal(blocks, inner // blocks, in_features // blocks)
        self.second = _normal(blocks, out_features // blocks, inner // blocks)
        with torch.no_grad():
            _orthogonal_(self.first)
            _orthogonal_(self.second)

    def product(self, x: Tensor) -> Tensor:
        blocks = self.first.shape[0]
        inner = _block_product(x, self.first).transpose(0, 1).flatten(1)
        inner = inner.view(len(x), -1, blocks).transpose(1, 2).flatten(1)
        return _block_product(inner, self.second).permute(1, 2, 0).flatten(1)


def _block_product(x: Tensor, blocks: Tensor) -> Tensor:
    """Multiply the pieces of `x` by their blocks: `(tokens, b p)`, `(b, q, p)` -> `(b, tokens, q)`."""
    return x.view(len(x), blocks.shape[0], -1).transpose(0, 1) @ blocks.transpose(1, 2)
