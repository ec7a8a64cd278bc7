"""Gradients in a random subspace: what APOLLO estimates step sizes from. Pure functions, on tensors and shards."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

#: What keeps a ratio of norms finite where a gradient is zero.
TINY = 1e-8


def draw_seed(seed: int, name: str, index: int) -> int:
    """
    Return the seed of one draw: a function of three values, equal on all ranks and machines.

    Args:
        seed (`int`): Of the run.
        name (`str`): Of the parameter.
        index (`int`): Number of the draw, from 0.

    Returns:
        `int`: In [0, 2^63).

    Example:
    ```python
    >>> draw_seed(0, "layers.0.mlp.up_proj.weight", 0) == draw_seed(0, "layers.0.mlp.up_proj.weight", 1)
    False

    ```
    """
    digest = hashlib.sha256(f"{seed}\0{name}\0{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def random_projection(rank: int, side: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """
    Return a matrix of shape `(rank, side)` with entries from N(0, 1 / rank), on the CPU.

    The numbers come from a generator of their own, so that they are the same on every device and the global random
    state stays as it was.

    Args:
        rank (`int`): At least 1.
        side (`int`): Length that it projects. At least 1.
        seed (`int`): See [`draw_seed`].
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): The numbers are drawn in fp32 and converted.

    Raises:
        ValueError: a length below 1.

    Example:
    ```python
    >>> projection = random_projection(64, 4096, seed=1)
    >>> tuple(projection.shape), round((projection.var() * 64).item(), 2)
    ((64, 4096), 1.0)

    ```
    """
    if rank < 1 or side < 1:
        raise ValueError(f"rank={rank} and side={side} must be at least 1.")
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(rank, side, generator=generator, dtype=torch.float32).mul_(rank**-0.5).to(dtype)


def is_tall(shape: torch.Size | tuple[int, ...]) -> bool:
    """Return whether a matrix has at least as many rows as columns, so that its rows are the channels."""
    return shape[-2] >= shape[-1]


def project(gradient: Tensor, projection: Tensor) -> Tensor:
    """
    Compress the shorter side of a matrix; the longer side keeps its channels.

    Formula: `G P^T` where `G` of shape `(..., m, n)` has m >= n, else `P G`.

    Args:
        gradient (`Tensor`): Shape `(..., m, n)`.
        projection (`Tensor`): Shape `(r, min(m, n))`.

    Returns:
        `Tensor`: Shape `(..., m, r)` where m >= n, else `(..., r, n)`.

    Example:
    ```python
    >>> project(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), torch.tensor([[1.0, 1.0]])).flatten().tolist()
    [3.0, 7.0, 11.0]
    >>> project(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), torch.tensor([[1.0, 1.0]])).flatten().tolist()
    [5.0, 7.0, 9.0]

    ```
    """
    return gradient @ projection.mT if is_tall(gradient.shape) else projection @ gradient


def norm_over(tensor: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Return the 2-norm over some axes, which stay with length 1."""
    return torch.linalg.vector_norm(tensor, dim=axes, keepdim=True)


def step_scale(
    direction: Tensor,
    projected: Tensor,
    axes: tuple[int, ...],
    norm: Callable[[Tensor, tuple[int, ...]], Tensor] = norm_over,
) -> Tensor:
    """
    Return by what a raw gradient is multiplied, `|direction| / (|projected| + 1e-8)` with norms over `axes`.

    Args:
        direction (`Tensor`): Adam's direction in the subspace, `M / (sqrt(V) + eps)`.
        projected (`Tensor`): The projected gradient, of the same shape.
        axes (`tuple[int, ...]`): The axis of the rank for one scale per channel, both for one per matrix.
        norm (`Callable`, *optional*, defaults to `norm_over`): How a norm is taken: on shards it has to be whole.

    Returns:
        `Tensor`: The scales; the axes stay, with length 1.

    Example:
    ```python
    >>> scale = step_scale(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.tensor([[6.0, 8.0], [0.0, 0.0]]), (-1,))
    >>> round(scale[0].item(), 6), scale[1].item() > 1e7
    (0.5, True)

    ```
    """
    return norm(direction, axes) / (norm(projected, axes) + TINY)


def growth_factor(norm: Tensor, previous: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """
    Hold the growth of an update's norm from one step to the next to `gamma`.

    Formula: where `norm / (previous + 1e-8) > gamma` the factor is `gamma previous / norm`, else 1. It is 1 too where
    `previous` is 0, i.e. before the first update that was not zero: a factor of 0 would hold the weight for ever.

    Args:
        norm (`Tensor`): Norm of the update, of any shape.
        previous (`Tensor`): What this function returned for the last update, at first 0.
        gamma (`float`): Above 1.

    Returns:
        `tuple[Tensor, Tensor]`: The factor, and the norm to remember: that of the last update that was not zero.

    Example:
    ```python
    >>> factor, kept = growth_factor(torch.tensor(10.0), torch.tensor(1.0), 1.01)
    >>> round(factor.item(), 4), round(kept.item(), 4)
    (0.101, 1.01)

    ```
    """
    held = (previous > 0) & (norm > gamma * (previous + TINY))
    factor = torch.where(held, gamma * previous / norm, torch.ones_like(norm))
    return factor, torch.where(norm > 0, norm * factor, previous)
