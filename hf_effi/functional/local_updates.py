"""Local updates (DiLoCo): the outer step that joins what several processes trained alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LocalUpdates:
    """
    When processes that train alone are joined, and by what outer optimizer.

    Paper: Douillard et al., DiLoCo (2311.08105), algorithm 1; the released code and OpenDiLoCo have the same defaults.

    Args:
        every (`int`): Updates that each process makes alone between two synchronisations, `H`, at least 1. The paper:
            500; what is published lies between 50 and 500.
        outer_lr (`float`, *optional*, defaults to 0.7): Learning rate of the outer step, above 0.
        outer_momentum (`float`, *optional*, defaults to 0.9): Nesterov momentum of the outer step, in `[0, 1)`.

    Raises:
        ValueError: an argument out of range.

    Example:
    ```python
    >>> [LocalUpdates(every=4).is_due(step, last=10) for step in (1, 4, 8, 10)]
    [False, True, True, True]
    ```
    """

    every: int
    outer_lr: float = 0.7
    outer_momentum: float = 0.9

    def __post_init__(self) -> None:
        if not isinstance(self.every, int) or isinstance(self.every, bool) or self.every < 1:
            raise ValueError(f"every={self.every!r} must be a whole number of updates, at least 1; DiLoCo has 500.")
        if not 0 < self.outer_lr < math.inf:
            raise ValueError(f"outer_lr={self.outer_lr!r} must be above 0 and finite; DiLoCo has 0.7.")
        if not 0 <= self.outer_momentum < 1:
            raise ValueError(f"outer_momentum={self.outer_momentum!r} must be in [0, 1); DiLoCo has 0.9.")

    def is_due(self, step: int, last: int) -> bool:
        """Return whether the processes meet after `step` finished updates of a run of `last`: its end is one."""
        return step % self.every == 0 or step >= last


@torch.no_grad()
def outer_step(anchor: Tensor, mean: Tensor, velocity: Tensor, lr: float, momentum: float) -> Tensor:
    """
    Return the weights after an outer step of SGD with Nesterov momentum, and update `velocity` in place.

    Formula: `D = anchor - mean`, `v <- momentum v + D`, `theta = anchor - lr (D + momentum v)`. It is computed from
    the mean, `theta = mean + (1 - lr) D - lr momentum v`, and a term whose factor is 0 is left out: with `lr=1` and
    no momentum the result is the mean to the bit.
    Paper: Douillard et al., DiLoCo (2311.08105), algorithm 1, lines 12 to 14; Nesterov's form is torch's.

    Args:
        anchor (`torch.Tensor`): Weights that all processes had after the last outer step, any shape.
        mean (`torch.Tensor`): Mean over the processes of their weights now, of that shape.
        velocity (`torch.Tensor`): Momentum buffer of that shape, zeros at first; it is changed.
        lr (`float`): Outer learning rate, above 0.
        momentum (`float`): In `[0, 1)`.

    Returns:
        `torch.Tensor`: The new weights, of that shape.

    Example:
    ```python
    >>> anchor, velocity = torch.tensor([1.0]), torch.zeros(1)
    >>> theta = outer_step(anchor, torch.tensor([(0.8 + 0.6) / 2]), velocity, lr=0.7, momentum=0.9)
    >>> round(theta.item(), 4), round(velocity.item(), 4)
    (0.601, 0.3)
    ```
    """
    delta = anchor - mean
    velocity.mul_(momentum).add_(delta)
    theta = mean.clone()
    if lr != 1:
        theta.add_(delta, alpha=1 - lr)
    if momentum:
        theta.sub_(velocity, alpha=lr * momentum)
    return theta


@torch.no_grad()
def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """
    Return all entries of some tensors as one vector, in their widest dtype and at least in fp32.

    Args:
        tensors (`Sequence[torch.Tensor]`): At least one; on one device.

    Raises:
        ValueError: no tensor.

    Example:
    ```python
    >>> flatten([torch.tensor([[1.0, 2.0]]), torch.tensor([3.0], dtype=torch.bfloat16)])
    tensor([1., 2., 3.])
    ```
    """
    if not tensors:
        raise ValueError("There is no trainable weight, so there is nothing to send. Train at least one.")
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return torch.cat([tensor.detach().reshape(-1).to(dtype) for tensor in tensors])


@torch.no_grad()
def unflatten_into(tensors: Sequence[Tensor], vector: Tensor) -> None:
    """
    Write the entries of [`flatten`]'s vector back into the tensors, each in its own dtype.

    Args:
        tensors (`Sequence[torch.Tensor]`): As given to [`flatten`]; they are changed.
        vector (`torch.Tensor`): Shape `(entries,)`.

    Raises:
        ValueError: the vector has another length than the tensors together.

    Example:
    ```python
    >>> weights = [torch.zeros(1, 2), torch.zeros(1)]
    >>> unflatten_into(weights, torch.tensor([1.0, 2.0, 3.0]))
    >>> weights
    [tensor([[1., 2.]]), tensor([3.])]
    ```
    """
    sizes = [tensor.numel() for tensor in tensors]
    if vector.numel() != sum(sizes):
        raise ValueError(f"vector has {vector.numel()} entries, and the tensors together {sum(sizes)}.")
    for tensor, part in zip(tensors, vector.split(sizes), strict=True):
        tensor.copy_(part.view_as(tensor))
