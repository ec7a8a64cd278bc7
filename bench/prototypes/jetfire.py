"""Jetfire's number format: int8 with one scale for each square block (arXiv 2403.12422)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

BLOCK = 32


def block_int8(x: torch.Tensor, block: int = BLOCK) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return int8 values and the scales of square blocks: `s = max|x| / 127`, `q = round(x / s)` in each block.

    Args:
        x (`torch.Tensor`): Shape `(rows, columns)`; the last blocks may be partial.

    Returns:
        Values of the shape of `x`, and scales `(ceil(rows / block), ceil(columns / block))`; a block of zeros has
        scale 1.

    Example:
    ```python
    >>> block_int8(torch.tensor([[127.0, 1.2, 0.0, 0.5]]), block=2)
    (tensor([[127,   1,   0, 127]], dtype=torch.int8), tensor([[1.0000, 0.0039]]))
    ```
    """
    rows, columns = x.shape
    padded = F.pad(x, (0, -columns % block, 0, -rows % block))
    tiles = padded.unflatten(1, (-1, block)).unflatten(0, (-1, block))
    scale = tiles.abs().amax((1, 3)) / 127
    scale = torch.where(scale == 0, 1.0, scale)
    q = (tiles / scale[:, None, :, None]).round().to(torch.int8)
    return q.flatten(2).flatten(0, 1)[:rows, :columns], scale


def expand(scale: torch.Tensor, shape: torch.Size, block: int = BLOCK) -> torch.Tensor:
    """Return the scale of every element of a tensor of `shape`."""
    return scale.repeat_interleave(block, 0).repeat_interleave(block, 1)[: shape[0], : shape[1]]


def round_trip(x: torch.Tensor, block: int = BLOCK) -> torch.Tensor:
    """Return `x` as it is after quantising and scaling back; the error of an element is at most half its scale."""
    q, scale = block_int8(x, block)
    return q * expand(scale, x.shape, block)


def quantize(tensor: torch.Tensor, role: str, contracted: int) -> torch.Tensor:
    """Round one operand; a square block serves both layouts, so the contracted dimension does not matter."""
    return round_trip(tensor)
