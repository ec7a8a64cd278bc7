"""
2:4 sparse pre-training of linear layers, emulated with dense products: what a sparse product would be given.

Transposable masks, masked decay and the flip rate are of arXiv 2404.01847, the soft threshold of arXiv 2409.09099, the
unbiased pruning of gradients of arXiv 2203.10991.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@functools.cache
def tile_patterns() -> Tensor:
    """Return the 90 tiles of 4x4 zeros and ones with two ones in each row and each column, shape `(90, 4, 4)`."""
    rows = [[float(i in pair) for i in range(4)] for pair in itertools.combinations(range(4), 2)]
    tiles = torch.tensor(list(itertools.product(rows, repeat=4)))
    return tiles[(tiles.sum(1) == 2).all(1)]


def transposable_mask(weight: Tensor) -> Tensor:
    """
    Return the mask, 2:4 along rows and along columns, that keeps the largest sum of magnitudes of each 4x4 tile.

    Args:
        weight (`Tensor`): `(out, in)`, both divisible by 4.
    """
    out, width = weight.shape
    if out % 4 or width % 4:
        raise ValueError(f"both sizes must be divisible by 4, got {tuple(weight.shape)}.")
    tiles = weight.detach().abs().view(out // 4, 4, width // 4, 4).transpose(1, 2)
    patterns = tile_patterns().to(weight)
    best = (tiles.reshape(-1, 16) @ patterns.view(-1, 16).t()).argmax(1)
    return patterns[best].view(out // 4, width // 4, 4, 4).transpose(1, 2).reshape(out, width).bool()


def mvue_24(values: Tensor) -> Tensor:
    """
    Keep two of each four values along the last dimension at random, without bias and with the least variance.

    `E[kept] = values`. Keeping value `a_i` with probability `p_i` and dividing it by `p_i` has variance
    `sum a_i^2 (1 / p_i - 1)`, least under `sum p_i = 2` for `p_i` proportional to `|a_i|`; a value above half of the
    sum has `p_i = 1`, and the others share the second place. Systematic sampling draws exactly two with these
    probabilities.
    """
    fours = values.reshape(-1, 4)
    size = fours.abs()
    total = size.sum(1, keepdim=True)
    largest = size.amax(1, keepdim=True)
    tiny = torch.finfo(values.dtype).tiny
    outlier = (size == largest) & (2 * largest > total)
    share = torch.where(
        2 * largest > total, size / (total - largest).clamp(min=tiny), 2 * size / total.clamp(min=tiny)
    )
    keep = torch.where(outlier, torch.ones_like(size), share)
    ends = keep.cumsum(1)
    ends[:, -1] = 2.0
    places = (ends - torch.rand_like(total)).ceil()  # how many of the points u, u + 1 lie below each end
    drawn = places.diff(dim=1, prepend=torch.zeros_like(total)) > 0
    return torch.where(drawn & (keep > 0), fours / keep.clamp(min=tiny), torch.zeros_like(fours)).view_as(values)


def soft_threshold_24(weight: Tensor) -> Tensor:
    """
    Return `sign(w) max(|w| - t, 0)` with `t` the third largest magnitude of each four along the rows: 2:4, continuous.
    """
    fours = weight.reshape(-1, 4)
    threshold = fours.abs().kthvalue(2, dim=1, keepdim=True).values
    return (fours.sign() * (fours.abs() - threshold).clamp(min=0)).view_as(weight)


def soft_threshold_scale(weight: Tensor) -> Tensor:
    """Return `<w, S(w)> / <S(w), S(w)>`, the scale of `S(w)` that is nearest to `w`."""
    pruned = soft_threshold_24(weight)
    return (weight * pruned).sum() / pruned.square().sum()


def flip_rate(before: Tensor, after: Tensor) -> float:
    """Return the share of the mask that changed."""
    return (before != after).float().mean().item()


def masked_decay_(weight: nn.Parameter, mask: Tensor, decay: float) -> None:
    """Add `decay * w` to the gradient of the masked weights: before the optimizer, which Adam then normalises."""
    weight.grad.add_(weight.detach() * ~mask, alpha=decay)


class _Sparse24Product(torch.autograd.Function):
    """`x S^T` with a 2:4 `S`; the gradient of `S` goes straight to the dense weight, from a pruned `dy^T`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, sparse: Tensor) -> Tensor:
        ctx.save_for_backward(x, sparse)
        return F.linear(x, sparse)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, sparse = ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1])
        return dy @ sparse, mvue_24(rows.t().contiguous()) @ x.reshape(-1, x.shape[-1]), None


class Sparse24Linear(nn.Module):
    """
    A linear layer without bias whose products are 2:4, by mask or by soft threshold, until `dense` is set.

    Args:
        linear (`nn.Linear`): Its weight is used as it is. The number of tokens must be divisible by 4.
        soft (`bool`): Soft threshold with a scale that is fixed now, in the place of a mask that `refresh` updates.
    """

    def __init__(self, linear: nn.Linear, soft: bool = False) -> None:
        super().__init__()
        self.weight, self.soft, self.dense = linear.weight, soft, False
        self.register_buffer("mask", transposable_mask(self.weight), persistent=False)
        self.register_buffer("scale", soft_threshold_scale(self.weight.detach()), persistent=False)

    def refresh(self) -> float:
        """Search the mask anew; return the flip rate."""
        before, self.mask = self.mask, transposable_mask(self.weight)
        return flip_rate(before, self.mask)

    def forward(self, x: Tensor) -> Tensor:
        if self.dense:
            return F.linear(x, self.weight)
        weight = self.weight.detach()
        sparse = self.scale * soft_threshold_24(weight) if self.soft else weight * self.mask
        return _Sparse24Product.apply(x, self.weight, sparse)
