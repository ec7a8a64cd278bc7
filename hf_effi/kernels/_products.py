"""Sums of matrix products over tiles, in the precision of the sum."""

from __future__ import annotations

import torch
from torch import Tensor

from .._compat import HAS_MM_OUT_DTYPE


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """
    `total += left @ right`, in the wider of the two precisions.

    A sum in fp32 of products of 16-bit operands is one cuBLAS call on a GPU: rounding each tile's product to bf16
    would add up to a bias, and cost a pass over the sum.
    """
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.element_size() < left.element_size():
        total.add_(left @ right)
    elif HAS_MM_OUT_DTYPE and total.is_cuda and total.dtype == torch.float32:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))
