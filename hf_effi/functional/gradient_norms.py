"""The norms of a whole gradient, and a record of them over the updates of a run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import MismatchError

if TYPE_CHECKING:  # a record of norms is read without it
    import torch


def sum_norms(gradients: Iterable[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return the sum of the absolute values of all gradients and the sum of their squares, in fp32 or better.

    Formula: `sum_i |g_i|` and `sum_i g_i^2`, `i` over the elements of all tensors. The first is the L1 norm, the root
    of the second the L2 norm; of sharded gradients both may be added over the shards.

    Args:
        gradients (`Iterable[torch.Tensor]`): Of any shapes, dense or sparse. With none, both sums are 0.

    Returns:
        Two tensors without dimensions, on the device of the first gradient: nothing waits for it.

    Example:
    ```python
    >>> import torch
    >>> absolute, squares = sum_norms([torch.tensor([3.0, -4.0]), torch.tensor([[0.0]])])
    >>> absolute.item(), squares.item()
    (7.0, 25.0)
    ```
    """
    import torch

    whole = [gradient.coalesce().values() if gradient.is_sparse else gradient for gradient in gradients]
    if not whole:
        return torch.zeros(()), torch.zeros(())
    # Norms of half precision are rounded to it, unless one asks for more; and the L1 kernel of a CPU is slow.
    if all(values.dtype == torch.float32 for values in whole):
        squares = torch.nn.utils.get_total_norm(whole, 2.0).square()
        if whole[0].is_cuda:
            return torch.nn.utils.get_total_norm(whole, 1.0), squares
        return _total([values.abs().sum() for values in whole]), squares
    wide = [torch.float64 if values.dtype == torch.float64 else torch.float32 for values in whole]
    absolute = [values.abs().sum(dtype=dtype) for values, dtype in zip(whole, wide, strict=True)]
    roots = [torch.linalg.vector_norm(values, 2, dtype=dtype) for values, dtype in zip(whole, wide, strict=True)]
    return _total(absolute), _total([root.square() for root in roots])


def _total(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    import torch

    wide = max((part.dtype for part in parts), key=lambda dtype: dtype.itemsize)
    return torch.stack([part.to(parts[0].device, wide) for part in parts]).sum()


def unclipped(absolute: float, squares: float, l2_before: float) -> float:
    """
    Return the L1 norm of a gradient before it was scaled as a whole, as clipping by its L2 norm does.

    Formula: `||g||_1 = ||c g||_1 / c` with `c = ||c g||_2 / ||g||_2`.

    Args:
        absolute, squares (`float`): What [`sum_norms`] gives for the scaled gradient.
        l2_before (`float`): The L2 norm before.

    Example:
    ```python
    >>> unclipped(absolute=0.7, squares=0.25, l2_before=5.0)  # (3, -4), clipped to (0.3, -0.4)
    7.0
    ```
    """
    return absolute * (l2_before / math.sqrt(squares)) if squares > 0 else absolute


@dataclass(frozen=True)
class GradientNorms:
    """
    Norms of the gradients of one run, at some or all of its updates.

    Args:
        updates (`Sequence[int]`): Number of the update of each norm, from 1, ascending.
        total (`int`): Updates of the whole run.
        l1 (`Sequence[float]`, *optional*): L1 norm of each; `None` where nobody recorded them.
        l2 (`Sequence[float]`, *optional*): L2 norm of each.

    Raises:
        ValueError: no updates, updates that do not ascend from 1 to `total`, or another number of norms.

    Example:
    ```python
    >>> norms = GradientNorms(updates=(2, 4), total=5, l1=(3.0, 1.0))
    >>> norms.spread(norms.l1)  # to each update, on a line between two norms
    [3.0, 3.0, 2.0, 1.0, 1.0]
    ```
    """

    updates: Sequence[int]
    total: int
    l1: Sequence[float] | None = None
    l2: Sequence[float] | None = None

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip(self.updates, self.updates[1:], strict=False))
        if not self.updates or not rising or self.updates[0] < 1 or self.updates[-1] > self.total:
            raise ValueError(
                f"updates={[*self.updates][:3]}... must be at least one number, ascending, from 1 to "
                f"total={self.total}. Pass the update of each norm, and the length of the run."
            )
        for name, values in (("l1", self.l1), ("l2", self.l2)):
            if values is not None and len(values) != len(self.updates):
                raise ValueError(f"{name} has {len(values)} norms for {len(self.updates)} updates. Pass one for each.")

    def of(self, optimizer: str) -> Sequence[float]:
        """
        Return the norms that the schedule of an optimizer is refined from: L1 for `"adam"`, L2 for `"sgd"`.

        Raises:
            MismatchError: the run has not recorded them.
        """
        wanted, values = ("L1", self.l1) if optimizer == "adam" else ("L2", self.l2)
        if values is None:
            raise MismatchError(
                f"The run has no {wanted} norms, which optimizer={optimizer!r} is refined from. Train it with "
                "GradientNormsCallback(), which records both, or pass a list of norms of your own."
            )
        return values

    def spread(self, values: Sequence[float]) -> list[float]:
        """Return one value for each of the `total` updates: on a line between two, level before and after."""
        spread, right = [], 0
        for update in range(1, self.total + 1):
            while right < len(self.updates) and self.updates[right] < update:
                right += 1
            if right in (0, len(self.updates)) or self.updates[right] == update:
                spread.append(float(values[min(right, len(self.updates) - 1)]))
                continue
            a, b = self.updates[right - 1], self.updates[right]
            share = (update - a) / (b - a)
            spread.append((1 - share) * values[right - 1] + share * values[right])
        return spread
