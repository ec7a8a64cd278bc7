"""Which groups lie where in the lengths of a batch: the bands of LSPO."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: absorbs the rounding of an interpolated quantile
_TOLERANCE = 1e-9


def band_edges(lengths: Tensor, bands: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """
    The lengths at which bands of quantiles begin and end, interpolated between groups; a band that begins at 0 or ends
    at 1 has no end there.

    Args:
        lengths (`torch.Tensor`): Mean length of each group, shape `(num_groups,)`, at least one.
        bands (`Sequence[tuple[float, float]]`): Quantiles, `0 <= low < high <= 1`.

    Example:
    ```python
    >>> band_edges(torch.tensor([10.0, 20.0, 30.0, 40.0, 50.0]), [(0.0, 0.25), (0.5, 1.0)])
    [(-inf, 20.0), (30.0, inf)]
    ```
    """
    values = lengths.to(torch.float64)
    return [
        (
            -torch.inf if low == 0 else float(torch.quantile(values, low)),
            torch.inf if high == 1 else float(torch.quantile(values, high)),
        )
        for low, high in bands
    ]


def distance_to_bands(lengths: Tensor, edges: Sequence[tuple[float, float]]) -> Tensor:
    """
    How far each length lies from the nearest band, 0 inside one; float64, shape of `lengths`. The ends are inside.

    Example:
    ```python
    >>> distance_to_bands(torch.tensor([10.0, 27.0, 30.0, 60.0]), [(-torch.inf, 20.0), (30.0, 50.0)]).tolist()
    [0.0, 3.0, 0.0, 10.0]
    ```
    """
    values = lengths.to(torch.float64)
    far = [torch.maximum(low - values, values - high).clamp(min=0.0) for low, high in edges]
    nearest = torch.stack(far).amin(0)
    return torch.where(nearest <= _TOLERANCE * values.abs(), 0.0, nearest)
