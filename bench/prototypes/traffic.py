"""
Quantised and chosen gradients, after QSDP (arXiv 2302.02390) and L-GreCo (arXiv 2210.17357), from the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def lattice_quantise(values: Tensor, delta: Tensor | float, shift: Tensor | float) -> Tensor:
    """
    Return whole numbers `round((w - r) / delta)`; `delta q + r` is the value that they stand for.

    With `r` uniform in `[-delta / 2, delta / 2]` the mean over `r` is `w`, and the variance `delta^2 / 12`.
    """
    return torch.round((values - shift) / delta)


def lattice_values(codes: Tensor, delta: Tensor | float, shift: Tensor | float) -> Tensor:
    """Return what the whole numbers of [`lattice_quantise`] stand for."""
    return codes * delta + shift


def stochastic_codes(values: Tensor, delta: Tensor, draws: Tensor) -> Tensor:
    """Return whole numbers `floor(g / delta + u)` with `u` uniform in `[0, 1)`: their mean is `g / delta`."""
    return torch.floor(values / delta + draws)


def buckets_of(values: Tensor, size: int) -> Tensor:
    """Return a vector as rows of `size` entries, the last one filled up with zeros."""
    missing = -values.numel() % size
    return torch.nn.functional.pad(values, (0, missing)).view(-1, size)


def steps_of(buckets: Tensor, bits: int) -> Tensor:
    """Return the step of each bucket, shape `(buckets, 1)`, with which its largest magnitude has a code of `bits`."""
    largest = buckets.abs().amax(dim=1, keepdim=True)
    # One code is left free at each end, as far as there is one: a shift, or a draw, can move a value by one.
    return (largest / max(2 ** (bits - 1) - 2, 1)).clamp_min(torch.finfo(buckets.dtype).tiny)


def choose_levels(errors: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: float) -> tuple[int, ...]:
    """
    L-GreCo: a level for each layer, with the fewest bytes whose errors sum to `budget` or less, by dynamic
    programming.

    The paper rounds errors to a grid; with a handful of levels what is not dominated is few enough to be kept exactly.

    Args:
        errors, sizes: Of each layer, by level.
        budget (`float`): At least 0.

    Raises:
        ValueError: no choice stays within the budget.

    Example:
    ```python
    >>> choose_levels([[0, 1, 4], [0, 2, 9], [0, 0.5, 1]], [[8, 4, 2], [16, 8, 4], [4, 2, 1]], budget=3)
    (1, 1, 0)
    ```
    """
    best: list[tuple[float, int, tuple[int, ...]]] = [(0.0, 0, ())]
    for layer, of_levels in zip(errors, sizes, strict=True):
        found = sorted(
            (used + error, count + nbytes, (*chosen, level))
            for used, count, chosen in best
            for level, (error, nbytes) in enumerate(zip(layer, of_levels, strict=True))
            if used + error <= budget * (1 + 1e-12)
        )
        best, least = [], math.inf  # what costs more of the budget must be smaller
        for one in found:
            if one[1] < least:
                best.append(one)
                least = one[1]
    if not best:
        raise ValueError(f"budget={budget} is below the least error of all layers together. Raise it.")
    return best[-1][2]


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return codes of `bits` (2, 4 or 8), between `-2^(bits - 1)` and `2^(bits - 1) - 1`, as bytes."""
    whole = (codes.reshape(-1) + 2 ** (bits - 1)).to(torch.uint8)
    parts = 8 // bits
    if parts == 1:
        return whole
    rows = torch.nn.functional.pad(whole, (0, -whole.numel() % parts)).view(-1, parts)
    packed = rows[:, 0].clone()
    for part in range(1, parts):
        packed |= rows[:, part] << (bits * part)
    return packed


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return the first `count` codes that [`pack`] packed, as floats."""
    parts, mask = 8 // bits, 2**bits - 1
    found = torch.stack([(packed >> (bits * part)) & mask for part in range(parts)], dim=1).reshape(-1)[:count]
    return found.to(torch.float32) - 2 ** (bits - 1)
