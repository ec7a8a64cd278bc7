"""What a run's troubles come from, as numbers of single tensors: sizes of gradients, outliers among activations."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: a token is massive where its largest value is above this, and this many times the median of its values
MASSIVE_SIZE, MASSIVE_RATIO = 100.0, 1000.0
#: power steps of [`spectral_norm`]
POWER_STEPS = 2


def excess_kurtosis(values: Tensor) -> Tensor:
    """
    Return the excess kurtosis of each row: how much of its variance a few large values hold.

    Formula, over the last dimension: `mean((x - mean x)^4) / mean((x - mean x)^2)^2 - 3`, with population moments. It
    is 0 for normal numbers, and `d^2 / (d - 1) - 6` at most, for one value that stands alone among `d`. It is
    centred, and taken for each token over its features: figures of papers that leave the mean in, or put a whole
    sequence into one moment, are of another quantity and cannot be compared with it.

    Args:
        values (`torch.Tensor`): Shape `(..., d)`; computed in fp32.

    Returns:
        `torch.Tensor`: Shape `(...)`; NaN where all values of a row are equal.

    Example:
    ```python
    >>> [round(value, 3) for value in excess_kurtosis(torch.tensor([[0.0, 0, 0, 10], [-1, 1, -1, 1]])).tolist()]
    [-0.667, -2.0]
    ```
    """
    centred = values.detach().float()
    centred = centred - centred.mean(-1, keepdim=True)
    squares = centred.square()
    return squares.square().mean(-1) / squares.mean(-1).square() - 3


@dataclass(frozen=True)
class Outliers:
    """
    Outliers among the tokens that passed a layer.

    Args:
        tokens (`int`): How many were looked at.
        kurtosis (`float`): Mean of [`excess_kurtosis`] over them; NaN without a token that has one.
        ratio (`float`): The largest `max |x| / median |x|` of a token, at least 1; NaN without a token.
        massive (`float`): Share of tokens with a massive activation, in `[0, 1]`: `max |x|` above 100, and above 1000
            times the median of `|x|` (Massive Activations in Large Language Models, 2402.17762).
    """

    tokens: int
    kurtosis: float
    ratio: float
    massive: float


def count_outliers(hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """
    Return what [`join_outliers`] needs to know of one batch, on its device: nothing is synchronised.

    Args:
        hidden (`torch.Tensor`): Shape `(..., d)`, one row for each token.
        mask (`torch.Tensor`, *optional*): Tokens that count, not 0; of the shape `(...)`. One of another shape is
            that of other tokens, and is left out.

    Returns:
        `torch.Tensor`: Shape `(5,)`: tokens, those with a kurtosis, its sum, the largest ratio, massive tokens.

    Example:
    ```python
    >>> hidden = torch.tensor([[[1.0, 1, 2, 2000], [1, 2, 3, 4], [0, 0, 0, 9]]])
    >>> [round(value, 2) for value in count_outliers(hidden, torch.tensor([[1, 1, 0]])).tolist()]
    [2.0, 2.0, -2.03, 2000.0, 1.0]
    ```
    """
    rows = hidden.detach()
    if mask is not None and mask.shape == rows.shape[:-1]:
        rows = rows[mask != 0]
    rows = rows.reshape(-1, rows.shape[-1]).float()
    if not len(rows):
        return rows.new_zeros(5)
    kurtosis = excess_kurtosis(rows)
    has_one = kurtosis.isfinite()
    sizes = rows.abs()
    largest, median = sizes.amax(-1), sizes.median(-1).values
    # Where most features are 0 there is no ratio to speak of; a row of zeros is even.
    ratio = torch.where(median > 0, largest / median, torch.where(largest > 0, math.inf, 1.0))
    massive = (largest > MASSIVE_SIZE) & (ratio > MASSIVE_RATIO)
    finite = torch.where(ratio.isfinite(), ratio, 1.0)
    parts = [
        largest.new_tensor(float(len(rows))),
        has_one.sum().float(),
        torch.where(has_one, kurtosis, 0.0).sum(),
        finite.amax(),
        massive.sum().float(),
    ]
    return torch.stack(parts)


def join_outliers(counts: Sequence[Sequence[float]]) -> Outliers:
    """
    Return the outliers of one layer, over micro-batches and processes.

    Args:
        counts (`Sequence[Sequence[float]]`): Rows of [`count_outliers`], as numbers.

    Example:
    ```python
    >>> join_outliers([[2, 2, -2.0, 8.0, 0], [6, 6, 10.0, 3.0, 2]])
    Outliers(tokens=8, kurtosis=1.0, ratio=8.0, massive=0.25)
    ```
    """
    tokens, with_one, total, _, massive = (sum(row[part] for row in counts) for part in range(5))
    return Outliers(
        tokens=int(tokens),
        kurtosis=total / with_one if with_one else math.nan,
        ratio=max((row[3] for row in counts if row[0]), default=math.nan),
        massive=massive / tokens if tokens else 0.0,
    )


def frobenius_norm(values: Tensor) -> Tensor:
    """Return the root of the sum of squares in fp32, a tensor of no dimension; of a whole tensor under FSDP2."""
    return _whole(torch.linalg.vector_norm(values.detach(), dtype=torch.float32))


def spectral_norm(matrix: Tensor, steps: int = POWER_STEPS) -> Tensor:
    """
    Estimate the largest singular value from below, by power steps from a fixed vector: no random number is drawn.

    Formula: `v <- G^T G v`, so many times; then `|G v| / |v|`. Under FSDP2 the ranks exchange vectors as long as a
    side of the matrix, and never the matrix.

    Args:
        matrix (`torch.Tensor`): Shape `(m, n)`, or `(e, m, n)` for several, of which the largest counts.
        steps (`int`, *optional*, defaults to 2): At least 1; each brings in the next share of the gap between the
            largest and the second largest value.

    Returns:
        `torch.Tensor`: Of no dimension; 0 for a matrix of zeros.

    Example:
    ```python
    >>> round(float(spectral_norm(torch.diag(torch.tensor([5.0, 1.0, 1.0])))), 2)
    5.0
    ```
    """
    if steps < 1:
        raise ValueError(f"steps={steps!r} must be an integer of at least 1.")
    matrix = matrix.detach().float()
    several = matrix if matrix.dim() == 3 else matrix.unsqueeze(0)
    vector = _fixed_vector(several)
    for _ in range(steps):
        vector = _to_length_1(_times(several.transpose(1, 2), _to_length_1(_times(several, vector))))
    return torch.linalg.vector_norm(_times(several, vector), dim=1).amax()


def _to_length_1(vectors: Tensor) -> Tensor:
    return vectors / torch.linalg.vector_norm(vectors, dim=1, keepdim=True).clamp_min(1e-30)


def _fixed_vector(several: Tensor) -> Tensor:
    """Return numbers between -1 and 1 without a pattern, shape `(e, n, 1)`; equal on all ranks."""
    places = torch.arange(several.shape[2], device=several.device, dtype=torch.float64)
    numbers = ((places * 0.7548776662 + 0.1) * 12.9898).sin().float()
    return numbers.reshape(1, -1, 1).expand(several.shape[0], -1, 1) / numbers.norm()


def _times(matrices: Any, vectors: Tensor) -> Tensor:
    """Return `matrices @ vectors`, whole on every rank."""
    if not hasattr(matrices, "full_tensor"):
        return torch.bmm(matrices, vectors)
    from torch.distributed.tensor import DTensor, Replicate

    mesh = matrices.device_mesh
    everywhere = DTensor.from_local(vectors, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return _whole(torch.bmm(matrices, everywhere))


def _whole(value: Any) -> Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def mean_absolute_difference(curve: Sequence[float]) -> float:
    """
    Return how uneven a curve over the layers is: `mean |s_(l+1) - s_l|`, 0 for fewer than two layers.

    What Happened in LLMs Layers when Trained for Fast vs. Slow Thinking (2410.23743) calls it the mean absolute
    difference (MAD).

    Example:
    ```python
    >>> mean_absolute_difference([1.0, 3.0, 2.0]), mean_absolute_difference([5.0])
    (1.5, 0.0)
    ```
    """
    steps = [abs(after - before) for before, after in zip(curve, curve[1:], strict=False)]
    return statistics.fmean(steps) if steps else 0.0


def root_of_squares(values: Sequence[float]) -> float:
    """
    Return the norm of what these are the norms of: `sqrt(sum x^2)`.

    Example:
    ```python
    >>> root_of_squares([3.0, 4.0]), root_of_squares([])
    (5.0, 0.0)
    ```
    """
    return math.hypot(*values)


def unclipped_factor(norm: float, max_norm: float) -> float:
    """
    Return what clipped gradients have to be multiplied by to be those before: 1 where nothing was clipped.

    Formula, of `torch.nn.utils.clip_grad_norm_`: they were multiplied by `min(1, max_norm / (norm + 1e-6))`.

    Args:
        norm (`float`): Of all gradients, before clipping.
        max_norm (`float`): Above 0; `inf` clips nothing.

    Example:
    ```python
    >>> round(unclipped_factor(4.0, 1.0), 4), unclipped_factor(0.5, 1.0)
    (4.0, 1.0)
    ```
    """
    return max(1.0, (norm + 1e-6) / max_norm)
