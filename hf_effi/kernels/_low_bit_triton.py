"""Triton kernel of [`hf_effi.kernels.low_bit`]: largest entry, scale and cast of a row, which is read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: a row stays in the registers of one block, 1024 threads at most
MOST_BYTES = 65_536
ELEMENTS_A_WARP = 512
#: adding and subtracting 1.5 * 2^23 rounds |q| < 2^22 to an integer, ties to even; libdevice is not in the interpreter
ROUNDER = tl.constexpr(12_582_912.0)


@triton.jit
def _quantize_rows_fwd_kernel(
    x_ptr,
    x_stride,
    column_scale_ptr,
    values_ptr,
    scale_ptr,
    num_columns,
    LARGEST: tl.constexpr,
    FLOOR: tl.constexpr,
    IS_INTEGER: tl.constexpr,
    HAS_COLUMN_SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < num_columns
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_COLUMN_SCALE:
        x = x * tl.load(column_scale_ptr + columns, mask=inside, other=0.0)
    scale = tl.maximum(tl.max(tl.abs(x), axis=0), FLOOR) / LARGEST
    has_nan = tl.max((x != x).to(tl.int32), axis=0)  # which a maximum leaves out
    scale = tl.where(has_nan > 0, float("nan"), scale)
    q = x / scale
    if IS_INTEGER:
        q = (q + ROUNDER) - ROUNDER
    tl.store(values_ptr + row * num_columns + columns, q.to(values_ptr.dtype.element_ty), mask=inside)
    tl.store(scale_ptr + row, scale)


def quantize_rows(
    x: Tensor, dtype: torch.dtype, largest: float, floor: float, column_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """[`hf_effi.kernels.low_bit.quantize_rows_reference`] in one launch."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    values = torch.empty(x.shape, dtype=dtype, device=x.device)
    scale = torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(x.shape[1])
    if len(x):
        _quantize_rows_fwd_kernel[(len(x),)](
            x,
            x.stride(0),
            scale if column_scale is None else column_scale.contiguous(),
            values,
            scale,
            x.shape[1],
            LARGEST=largest,
            FLOOR=floor,
            IS_INTEGER=dtype == torch.int8,
            HAS_COLUMN_SCALE=column_scale is not None,
            BLOCK=block,
            num_warps=min(32, max(1, block // ELEMENTS_A_WARP)),
        )
    return values, scale
