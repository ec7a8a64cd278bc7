"""Fast Forward: how far the last update could have gone on, as a sign of a learning rate that is too low."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor


def walk_while_falling(loss_after: Callable[[int], float], longest: int) -> tuple[int, list[float]]:
    """
    Repeat a step while the loss falls, and return how often.

    Formula: `tau* = ` the last `tau` with `L(theta + tau Delta) < L(theta + (tau - 1) Delta) < ... < L(theta)`
    (Fast Forward, 2409.04206). Unlike the released code, the loss before the first step is measured, and the step that
    did not help is not counted.

    Args:
        loss_after (`Callable[[int], float]`): Returns the loss after `tau` steps; called with 0, 1, ... in order.
        longest (`int`): Steps at most, at least 1.

    Returns:
        `tuple[int, list[float]]`: `tau*` in `[0, longest]`, and the losses that were measured, from `tau = 0` on. A
        loss that is not finite ends the walk.

    Raises:
        ValueError: `longest` out of range.

    Example:
    ```python
    >>> walk_while_falling(lambda tau: (tau - 2.4) ** 2, longest=10)[0]
    2
    ```
    """
    if not isinstance(longest, int) or isinstance(longest, bool) or longest < 1:
        raise ValueError(f"longest={longest!r} must be an integer of at least 1.")
    losses = [loss_after(0)]
    if not math.isfinite(losses[0]):
        return 0, losses
    for step in range(1, longest + 1):
        losses.append(loss_after(step))
        if not losses[-1] < losses[-2]:  # not a number included
            return step - 1, losses
    return longest, losses


@torch.no_grad()
def place_on_ray(
    live: Mapping[str, Tensor], start: Mapping[str, Tensor], before: Mapping[str, Tensor], steps: int
) -> None:
    """
    Write `start + steps (start - before)` into weights; with 0 steps `start`, to the bit.

    It is computed from the start each time, in fp32 or wider, so that small displacements are not lost in bf16.

    Args:
        live (`Mapping[str, torch.Tensor]`): Written in place, in their own dtype.
        start, before (`Mapping[str, torch.Tensor]`): Copies of the weights after and before the update.
        steps (`int`): At least 0.

    Example:
    ```python
    >>> live, start, before = ({"w": torch.tensor([value])} for value in (3.0, 3.0, 1.0))
    >>> place_on_ray(live, start, before, 2)
    >>> live["w"].item()
    7.0
    ```
    """
    for name, tensor in live.items():
        if steps == 0:
            tensor.copy_(start[name])
            continue
        wide = torch.promote_types(tensor.dtype, torch.float32)
        first = start[name].to(wide)
        tensor.copy_(first + steps * (first - before[name].to(wide)))


def learning_rate_is_low(walks: Sequence[int], limit: int, patience: int) -> bool:
    """
    Return whether each of the last `patience` walks was longer than `limit` steps.

    Args:
        walks (`Sequence[int]`): `tau*` of the walks so far.
        limit (`int`): At least 0.
        patience (`int`): At least 1.

    Example:
    ```python
    >>> learning_rate_is_low([0, 7, 9], limit=5, patience=2), learning_rate_is_low([7, 2, 9], limit=5, patience=2)
    (True, False)
    ```
    """
    return len(walks) >= patience and min(walks[-patience:]) > limit


def typical(walks: Iterable[int]) -> float:
    """Return the median length of walks, 0 where there is none."""
    found = list(walks)
    return float(statistics.median(found)) if found else 0.0
