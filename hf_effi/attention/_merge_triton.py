"""Triton kernels of [`hf_effi.attention.merge`]: each tensor is read or written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 1024


@triton.jit
def _shares(lse_a, lse_b):
    largest = tl.maximum(lse_a, lse_b)
    anchor = tl.where(largest == -float("inf"), 0.0, largest)
    a, b = tl.exp(lse_a - anchor), tl.exp(lse_b - anchor)
    total = a + b
    divisor = tl.where(total == 0.0, 1.0, total)
    lse = tl.where(total == 0.0, -float("inf"), anchor + tl.log(divisor))
    return a / divisor, b / divisor, lse


@triton.jit
def _attention_merge_fwd_kernel(
    out_a_ptr,
    lse_a_ptr,
    out_b_ptr,
    lse_b_ptr,
    out_ptr,
    lse_ptr,
    num_rows,
    SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_SIZE)
    is_row = rows < num_rows
    share_a, share_b, lse = _shares(
        tl.load(lse_a_ptr + rows, mask=is_row, other=0.0), tl.load(lse_b_ptr + rows, mask=is_row, other=0.0)
    )
    at = rows[:, None] * SIZE + columns[None, :]
    inside = is_row[:, None] & (columns < SIZE)[None, :]
    # What a part without keys holds is not loaded: it may be anything.
    a = tl.load(out_a_ptr + at, mask=inside & (share_a > 0.0)[:, None], other=0.0).to(tl.float32)
    b = tl.load(out_b_ptr + at, mask=inside & (share_b > 0.0)[:, None], other=0.0).to(tl.float32)
    out = share_a[:, None] * a + share_b[:, None] * b
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(lse_ptr + rows, lse, mask=is_row)


@triton.jit
def _attention_merge_bwd_kernel(
    grad_ptr,
    grad_lse_ptr,
    out_a_ptr,
    lse_a_ptr,
    out_b_ptr,
    lse_b_ptr,
    grad_a_ptr,
    grad_lse_a_ptr,
    grad_b_ptr,
    grad_lse_b_ptr,
    num_rows,
    SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_SIZE)
    is_row = rows < num_rows
    share_a, share_b, _ = _shares(
        tl.load(lse_a_ptr + rows, mask=is_row, other=0.0), tl.load(lse_b_ptr + rows, mask=is_row, other=0.0)
    )
    at = rows[:, None] * SIZE + columns[None, :]
    inside = is_row[:, None] & (columns < SIZE)[None, :]
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    a = tl.load(out_a_ptr + at, mask=inside & (share_a > 0.0)[:, None], other=0.0).to(tl.float32)
    b = tl.load(out_b_ptr + at, mask=inside & (share_b > 0.0)[:, None], other=0.0).to(tl.float32)
    grad_lse = tl.load(grad_lse_ptr + rows, mask=is_row, other=0.0)
    tl.store(grad_a_ptr + at, (share_a[:, None] * grad).to(grad_a_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_b_ptr + at, (share_b[:, None] * grad).to(grad_b_ptr.dtype.element_ty), mask=inside)
    along = tl.sum(grad * (a - b), axis=1)
    tl.store(grad_lse_a_ptr + rows, share_a * (grad_lse + share_b * along), mask=is_row)
    tl.store(grad_lse_b_ptr + rows, share_b * (grad_lse - share_a * along), mask=is_row)


def _blocks(out: Tensor) -> tuple[tuple[int], dict[str, int]]:
    rows, size = out.shape
    width = triton.next_power_of_2(size)
    height = max(1, ELEMENTS // width)
    return (triton.cdiv(rows, height),), {"SIZE": size, "BLOCK_ROWS": height, "BLOCK_SIZE": width}


def merge_rows(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """[`hf_effi.attention.merge.merge_rows`] in one launch."""
    out, lse = torch.empty_like(out_a, memory_format=torch.contiguous_format), torch.empty_like(lse_a)
    grid, blocks = _blocks(out_a)
    if out.numel():
        parts = (out_a.contiguous(), lse_a.contiguous(), out_b.contiguous(), lse_b.contiguous())
        _attention_merge_fwd_kernel[grid](*parts, out, lse, out.shape[0], **blocks)
    return out, lse


def merge_rows_backward(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, *, grad: Tensor, grad_lse: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[`hf_effi.attention.merge.merge_rows_backward`] in one launch, which needs no `lse`."""
    parts = [t.contiguous() for t in (out_a, lse_a, out_b, lse_b)]
    found = tuple(torch.empty_like(t) for t in parts)
    grid, blocks = _blocks(out_a)
    if out_a.numel():
        upstream = (grad.contiguous(), grad_lse.contiguous())
        _attention_merge_bwd_kernel[grid](*upstream, *parts, *found, out_a.shape[0], **blocks)
    return found
