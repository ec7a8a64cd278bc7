"""MIGU: update only the rows of a linear layer whose outputs are large (Du et al., 2406.17245)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .schedules._checks import check_number


def output_magnitude(output: Tensor, real: Tensor | None = None) -> Tensor:
    """
    Return the summed size of each output over the tokens of a batch.

    Formula: `a_j = sum over tokens of |y_j|`. A sum and a mean rank the outputs alike, and sums of micro-batches and
    of processes add up.

    Args:
        output (`torch.Tensor`): What a linear layer returned, shape `(..., m)`.
        real (`torch.Tensor`, *optional*): Shape `output.shape[:-1]`; tokens where it is 0 or `False` are padding and
            are left out.

    Returns:
        `torch.Tensor`: Shape `(m,)`, fp32, at least 0.

    Raises:
        ValueError: `real` has another shape.

    Example:
    ```python
    >>> y = torch.tensor([[[1.0, -2.0], [3.0, 0.5], [9.0, 9.0]]])
    >>> output_magnitude(y, torch.tensor([[1, 1, 0]]))
    tensor([4.0000, 2.5000])
    ```
    """
    output = output.detach()
    if real is not None:
        if real.shape != output.shape[:-1]:
            raise ValueError(f"real has shape {tuple(real.shape)}; {tuple(output.shape[:-1])} fits the output.")
        output = output.masked_fill(real.eq(0).unsqueeze(-1), 0.0)
    return torch.linalg.vector_norm(output.reshape(-1, output.shape[-1]), 1, dim=0, dtype=torch.float32)


def migu_mask(magnitude: Tensor, threshold: float = 0.7, parts: Sequence[int] | None = None) -> Tensor:
    """
    Return which outputs of a layer are large enough that their rows are updated.

    Formula: `mask_j = a_j / |a|_1 >= quantile(a / |a|_1, threshold)`, so that a share `1 - threshold` of the rows
    stays, to one row. Dividing by the sum changes no comparison and is left out. Where a magnitude is not finite,
    every row of that layer stays: its gradients then show the fault as they would without a mask.

    Args:
        magnitude (`torch.Tensor`): Shape `(m,)`, of [`output_magnitude`].
        threshold (`float`, *optional*, defaults to 0.7): Share of the rows that is not updated, in `[0, 1]`; the
            paper's 0.7. With 0 every row is, with 1 only the largest.
        parts (`Sequence[int]`, *optional*): Sizes of the layers that a fused projection holds, which sum to `m`: each
            has a quantile of its own.

    Returns:
        `torch.Tensor`: Boolean, shape `(m,)`.

    Raises:
        ValueError: the threshold is out of range, `magnitude` is no vector, or `parts` do not sum to its length.

    Example:
    ```python
    >>> migu_mask(torch.tensor([4.0, 1.0, 3.0, 2.0]), 0.5)
    tensor([ True, False,  True, False])
    ```
    """
    check_number("threshold", threshold, 0.0, 1.0)
    if magnitude.dim() != 1:
        raise ValueError(f"magnitude has {magnitude.dim()} dimensions; one number per output is needed: one.")
    sizes = [magnitude.numel()] if parts is None else list(parts)
    if sum(sizes) != magnitude.numel() or min(sizes) < 0:
        raise ValueError(f"parts={sizes} must be sizes that sum to the {magnitude.numel()} outputs.")
    return torch.cat([_large(part, threshold) for part in magnitude.split(sizes)])


def _large(magnitude: Tensor, threshold: float) -> Tensor:
    if not magnitude.numel():
        return torch.zeros(0, dtype=torch.bool, device=magnitude.device)
    level = torch.quantile(magnitude, threshold)
    return ~(magnitude < level) | ~magnitude.isfinite().all()


def random_magnitude(size: int, seed: int, update: int, layer: int) -> Tensor:
    """
    Return random magnitudes: the control of MIGU, which updates as many rows, chosen by chance.

    They depend on the arguments alone, so every process and a resumed run draw the same.

    Args:
        size (`int`): Outputs of the layer.
        seed (`int`): Of the run.
        update (`int`): Number of the update.
        layer (`int`): Number of the layer in the model.

    Example:
    ```python
    >>> torch.equal(random_magnitude(8, 0, 3, 1), random_magnitude(8, 0, 3, 1))
    True
    ```
    """
    mixed = (seed * 1_000_003 + update) * 1_000_003 + layer
    generator = torch.Generator().manual_seed(mixed % 2**63)
    return torch.rand(size, generator=generator, dtype=torch.float64)


def local_part(mask: Tensor, placements: Sequence[tuple[bool, int, int]]) -> Tensor:
    """
    Return the part of a mask that belongs to this process's shard of the weight.

    Shards are those of `torch.chunk`: equal ones of `ceil(rows / processes)` rows, the last ones shorter or empty.

    Args:
        mask (`torch.Tensor`): Shape `(m,)`.
        placements (`Sequence[tuple[bool, int, int]]`): One for each dimension of the mesh: whether the dimension of
            the mask is cut along it, the number of its processes, and which of them this one is.

    Example:
    ```python
    >>> mask = torch.tensor([True, False, True, True, False])
    >>> [local_part(mask, [(True, 2, rank)]).tolist() for rank in range(2)]
    [[True, False, True], [True, False]]
    >>> local_part(mask, [(False, 2, 1)]).numel()
    5
    ```
    """
    for cut, processes, rank in placements:
        if cut:
            rows = -(-mask.numel() // processes)
            mask = mask[rank * rows : (rank + 1) * rows]
    return mask
