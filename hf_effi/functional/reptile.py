"""The Reptile step: move weights only a part of the way from where they were."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def reptile_step(weights: Iterable[Tensor], references: Iterable[Tensor], beta: float) -> None:
    """
    Set `theta <- theta_ref + beta (theta - theta_ref)`, then `theta_ref <- theta`, in place.

    Args:
        weights (`Iterable[torch.Tensor]`): `theta`, changed in place.
        references (`Iterable[torch.Tensor]`): `theta_ref`, of the same shapes, changed in place; may lie on the CPU.
        beta (`float`): In `(0, 1]`; 1 leaves the weights alone, to the bit.

    Raises:
        ValueError: `beta` out of range.

    Example:
    ```python
    >>> theta, before = torch.tensor([3.0]), torch.tensor([1.0])
    >>> reptile_step([theta], [before], beta=0.25)
    >>> theta.item(), before.item()
    (1.5, 1.5)
    ```
    """
    if not 0 < beta <= 1:
        raise ValueError(f"beta={beta!r} is outside (0, 1]: the share of the way that the weights may go.")
    for weight, reference in zip(weights, references, strict=True):
        if beta < 1:
            old = reference.to(weight.device, weight.dtype)
            weight.copy_(old + beta * (weight - old))
        reference.copy_(weight)
