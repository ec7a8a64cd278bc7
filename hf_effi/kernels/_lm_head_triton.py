"""Triton kernels of [`hf_effi.kernels.lm_head`]: one pass over a tile of logits each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

FOLD_COLUMNS = 1024
GRAD_ROWS = 16
GRAD_COLUMNS = 128


@triton.jit
def _capped(z, logit_scale, softcap, HAS_SOFTCAP: tl.constexpr):
    z = z * tl.cast(logit_scale, tl.float32)
    if HAS_SOFTCAP:
        z = 2.0 * tl.sigmoid(2.0 * z / tl.cast(softcap, tl.float32)) - 1.0  # tanh, which the interpreter has not
    return z


@triton.jit
def _lm_head_fwd_kernel(
    tile_ptr,
    tile_stride,
    stats_ptr,
    stats_stride,
    top_ptr,
    target_ptr,
    start,
    num_columns,
    logit_scale,
    softcap,
    inverse_temperature,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_SQUARES: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_TOP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    amplitude = tl.cast(inverse_temperature, tl.float32)
    if HAS_SOFTCAP:
        amplitude = amplitude * tl.cast(softcap, tl.float32)
    stats = stats_ptr + row
    maximum = tl.load(stats)
    sum_exp = tl.load(stats + stats_stride)
    weighted = tl.load(stats + 2 * stats_stride)
    squares = tl.load(stats + 3 * stats_stride)
    total = tl.load(stats + 4 * stats_stride)
    top = tl.load(top_ptr + row)
    for first in range(0, num_columns, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < num_columns
        z = tl.load(tile_ptr + row * tile_stride + columns, mask=inside, other=0.0).to(tl.float32)
        z = _capped(z, logit_scale, softcap, HAS_SOFTCAP) * amplitude
        if HAS_MEAN:
            total += tl.sum(tl.where(inside, z, 0.0), axis=0)
        masked = tl.where(inside, z, -float("inf"))
        if HAS_TOP:
            largest, where = tl.max(masked, axis=0, return_indices=True, return_indices_tie_break_left=True)
            top = tl.where(largest > maximum, (start + first + where).to(tl.int64), top)
        else:
            largest = tl.max(masked, axis=0)
        new = tl.maximum(maximum, largest)
        shrink = tl.exp(maximum - new)
        e = tl.exp(masked - new)
        sum_exp = sum_exp * shrink + tl.sum(e, axis=0)
        if HAS_ENTROPY:
            weighted = weighted * shrink + tl.sum(e * z, axis=0)
        if HAS_SQUARES:
            squares = squares * shrink * shrink + tl.sum(e * e, axis=0)
        maximum = new
    tl.store(stats, maximum)
    tl.store(stats + stats_stride, sum_exp)
    tl.store(stats + 2 * stats_stride, weighted)
    tl.store(stats + 3 * stats_stride, squares)
    tl.store(stats + 4 * stats_stride, total)
    tl.store(top_ptr + row, top)
    local = tl.load(target_ptr + row) - start
    if (local >= 0) & (local < num_columns):
        z = tl.load(tile_ptr + row * tile_stride + local).to(tl.float32)
        tl.store(stats + 5 * stats_stride, _capped(z, logit_scale, softcap, HAS_SOFTCAP) * amplitude)


@triton.jit
def _lm_head_bwd_kernel(
    tile_ptr,
    tile_stride,
    target_ptr,
    log_z_ptr,
    entropy_ptr,
    grad_log_prob_ptr,
    grad_entropy_ptr,
    largest_ptr,
    mass_ptr,
    start,
    num_rows,
    num_columns,
    logit_scale,
    softcap,
    inverse_temperature,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    is_row, is_column = rows < num_rows, columns < num_columns
    inside = is_row[:, None] & is_column[None, :]
    pointers = tile_ptr + rows.to(tl.int64)[:, None] * tile_stride + columns[None, :]
    amplitude = tl.cast(inverse_temperature, tl.float32)
    capped = _capped(tl.load(pointers, mask=inside, other=0.0).to(tl.float32), logit_scale, softcap, HAS_SOFTCAP)
    slope = tl.cast(inverse_temperature, tl.float32) * tl.cast(logit_scale, tl.float32)
    if HAS_SOFTCAP:
        amplitude = amplitude * tl.cast(softcap, tl.float32)
    log_p = capped * amplitude - tl.load(log_z_ptr + rows, mask=is_row, other=0.0)[:, None]
    p = tl.exp(log_p)
    is_target = (columns[None, :] + start) == tl.load(target_ptr + rows, mask=is_row, other=-1)[:, None]
    grad = tl.load(grad_log_prob_ptr + rows, mask=is_row, other=0.0)[:, None] * (is_target.to(tl.float32) - p)
    if HAS_ENTROPY:
        entropy = tl.load(entropy_ptr + rows, mask=is_row, other=0.0)[:, None]
        grad -= tl.load(grad_entropy_ptr + rows, mask=is_row, other=0.0)[:, None] * p * (log_p + entropy)
    grad = grad * slope
    if HAS_SOFTCAP:
        grad = grad * (1.0 - capped * capped)
    tl.store(pointers, grad.to(tile_ptr.dtype.element_ty), mask=inside)
    if HAS_COLUMNS:
        # One row of partial results a block of rows: no atomics, so that the same columns are kept each time.
        partial = tl.program_id(0).to(tl.int64) * num_columns + columns
        tl.store(largest_ptr + partial, tl.max(tl.where(inside, tl.abs(grad), 0.0), axis=0), mask=is_column)
        tl.store(mass_ptr + partial, tl.sum(tl.where(inside, p, 0.0), axis=0), mask=is_column)


def fold_tile(tile: Tensor, stats: Tensor, top: Tensor, targets: Tensor, *, start: int, shape, outputs) -> None:
    """
    Fold one tile of logits into the running statistics: [`hf_effi.kernels._lm_head_tiles.fold_tile`] in one launch.
    """
    _lm_head_fwd_kernel[(tile.shape[0],)](
        tile,
        tile.stride(0),
        stats,
        stats.stride(0),
        top,
        targets,
        start,
        tile.shape[1],
        shape.logit_scale,
        shape.softcap or 1.0,
        1.0 / shape.temperature,
        HAS_SOFTCAP=shape.softcap is not None,
        HAS_ENTROPY="entropy" in outputs,
        HAS_SQUARES="log_sum_sq_probs" in outputs,
        HAS_MEAN="mean_logits" in outputs,
        HAS_TOP="is_top1" in outputs,
        BLOCK=FOLD_COLUMNS,
    )


def gradient_tile(tile: Tensor, rows, start: int, shape, *, columns: bool) -> tuple[Tensor, Tensor] | None:
    """Turn one tile of logits into their gradient: [`hf_effi.kernels._lm_head_tiles.gradient_tile`] in one launch."""
    num_rows, num_columns = tile.shape
    grid = (triton.cdiv(num_rows, GRAD_ROWS), triton.cdiv(num_columns, GRAD_COLUMNS))
    partial = torch.empty((2, grid[0], num_columns) if columns else (2, 0), dtype=torch.float32, device=tile.device)
    has_entropy = rows.grad_entropy is not None
    _lm_head_bwd_kernel[grid](
        tile,
        tile.stride(0),
        rows.targets,
        rows.log_z,
        rows.entropy if has_entropy else rows.log_z,
        rows.grad_log_probs,
        rows.grad_entropy if has_entropy else rows.log_z,
        partial[0],
        partial[1],
        start,
        num_rows,
        num_columns,
        shape.logit_scale,
        shape.softcap or 1.0,
        1.0 / shape.temperature,
        HAS_SOFTCAP=shape.softcap is not None,
        HAS_ENTROPY=has_entropy,
        HAS_COLUMNS=columns,
        BLOCK_ROWS=GRAD_ROWS,
        BLOCK_COLUMNS=GRAD_COLUMNS,
    )
    return (partial[0].amax(0), partial[1].sum(0)) if columns else None
