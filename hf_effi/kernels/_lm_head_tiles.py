"""One tile of a language model's head: its statistics, its gradient, and the weights that it covers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..patching.triton_or_torch import triton_ops
from ._products import add_product

#: Above this share of active columns the dense product is faster than a gathered one.
COMPACT_BELOW = 0.5


@dataclass
class LMHeadCounters:
    """
    What the backwards that were given this object left out.

    Args:
        rows, rows_skipped (`int`): Scored rows, and those of them whose upstream gradient was zero.
        columns, columns_skipped (`int`): Columns of tiles, and those of them under `column_eps`.
        dropped_mass (`float`): Sum over the kept rows of the probability in skipped columns.
        recomputed (`int`): Backwards under `grad_in_forward` with another upstream gradient than one value for all
            rows.
    """

    rows: int = 0
    rows_skipped: int = 0
    columns: int = 0
    columns_skipped: int = 0
    dropped_mass: float = 0.0
    recomputed: int = 0

    @property
    def dropped_mass_per_row(self) -> float:
        """Mean probability that a kept row lost; 0 without `column_eps`."""
        return self.dropped_mass / max(self.rows - self.rows_skipped, 1)


class Shape(NamedTuple):
    """How a product becomes a logit: `z = softcap tanh(logit_scale (W h + b) / softcap) / temperature`."""

    temperature: float
    softcap: float | None
    logit_scale: float


class Options(NamedTuple):
    outputs: tuple[str, ...]
    column_eps: float
    filter_weight: bool
    grad_in_forward: bool
    group: Any
    counters: LMHeadCounters


class Rows(NamedTuple):
    """What the gradient of the logits of some rows needs."""

    hidden: Tensor
    targets: Tensor
    log_z: Tensor
    entropy: Tensor | None
    grad_log_probs: Tensor
    grad_entropy: Tensor | None

    def take(self, rows: slice | Tensor) -> Rows:
        return Rows(*(None if field is None else field[rows] for field in self))


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


# --- the vocabulary, whole or sharded --------------------------------------------------------------------------------


class Tile(NamedTuple):
    owner: int  # rank in the group that holds these rows of the weight
    local: slice  # rows of the owner's shard
    start: int  # first row in the whole vocabulary

    @property
    def width(self) -> int:
        return self.local.stop - self.local.start


class Vocabulary:
    """
    The tiles of a head. With a group each tile is sent to all ranks, and its gradient summed to the rank that owns it.
    """

    def __init__(self, weight: Tensor, group: Any, tile_columns: int) -> None:
        self.group, self.rank, sizes = group, 0, [weight.shape[0]]
        if group is not None:
            self.rank = dist.get_rank(group)
            gathered = torch.zeros(dist.get_world_size(group), dtype=torch.long, device=weight.device)
            gathered[self.rank] = weight.shape[0]
            dist.all_reduce(gathered, group=group)
            sizes = gathered.tolist()
        self.size = sum(sizes)
        self.tiles = [
            Tile(owner, slice(first, min(first + tile_columns, size)), sum(sizes[:owner]) + first)
            for owner, size in enumerate(sizes)
            for first in range(0, size, tile_columns)
        ]

    def fetch(self, part: Tensor | None, tile: Tile, dtype: torch.dtype) -> Tensor | None:
        """Return the rows of a weight or bias that a tile covers."""
        if part is None or self.group is None:
            return None if part is None else part[tile.local].to(dtype)
        if tile.owner == self.rank:
            rows = part.detach()[tile.local].to(dtype).contiguous()
        else:
            rows = torch.empty((tile.width, *part.shape[1:]), dtype=dtype, device=part.device)
        dist.broadcast(rows, dist.get_global_rank(self.group, tile.owner), group=self.group)
        return rows

    def give(self, grad: Tensor | None, total: Tensor | None, tile: Tile) -> None:
        """Write the gradient of a tile into that of the parameter, on the rank that owns it."""
        if grad is None or total is None:
            return
        if self.group is not None:
            dist.reduce(grad, dist.get_global_rank(self.group, tile.owner), group=self.group)
        if tile.owner == self.rank:
            total[tile.local] = grad.to(total.dtype)


# --- one tile --------------------------------------------------------------------------------------------------------


def _capped(tile: Tensor, shape: Shape) -> tuple[Tensor, float]:
    """Return what the softcap leaves to multiply by, and that factor."""
    z = tile * shape.logit_scale
    if shape.softcap is None:
        return z, 1.0 / shape.temperature
    return torch.tanh(z / shape.softcap), shape.softcap / shape.temperature


def new_statistics(hidden: Tensor) -> tuple[Tensor, Tensor]:
    stats = torch.zeros((6, hidden.shape[0]), dtype=statistics_dtype(hidden.dtype), device=hidden.device)
    stats[0] = -torch.inf
    return stats, torch.zeros(hidden.shape[0], dtype=torch.long, device=hidden.device)


def fold(
    tile: Tensor, stats: Tensor, top: Tensor, targets: Tensor, *, start: int, shape: Shape, outputs: Sequence[str]
) -> None:
    ops = triton_ops("hf_effi.kernels._lm_head_triton", tile)
    (ops.fold_tile if ops else fold_tile)(tile, stats, top, targets, start=start, shape=shape, outputs=outputs)


def fold_tile(
    tile: Tensor, stats: Tensor, top: Tensor, targets: Tensor, *, start: int, shape: Shape, outputs: Sequence[str]
) -> None:
    """
    Fold one tile of products into the running statistics of its rows, in place.

    Args:
        tile (`Tensor`): `(n, columns)`: `W h + b`.
        stats (`Tensor`): `(6, n)`: `m`, `s`, `sum z e^(z-m)`, `sum e^2(z-m)`, `sum z`, logit of the target.
        top (`Tensor`): `(n,)`: most likely token so far.
        targets (`Tensor`): `(n,)`.
        start (`int`): Token of the first column.
        shape: Scaling of the logits.
        outputs (`Sequence[str]`): Which optional statistics to keep.
    """
    capped, amplitude = _capped(tile.to(stats.dtype), shape)
    z = capped * amplitude
    maximum, sum_exp, weighted, squares, total, target = stats
    largest = z.amax(-1)
    new = torch.maximum(maximum, largest)
    shrink = torch.exp(maximum - new)
    e = torch.exp(z - new.unsqueeze(-1))
    sum_exp.mul_(shrink).add_(e.sum(-1))
    if "entropy" in outputs:
        weighted.mul_(shrink).add_((e * z).sum(-1))
    if "log_sum_sq_probs" in outputs:
        squares.mul_(shrink * shrink).add_((e * e).sum(-1))
    if "mean_logits" in outputs:
        total.add_(z.sum(-1))
    if "is_top1" in outputs:
        top.copy_(torch.where(largest > maximum, z.argmax(-1) + start, top))
    maximum.copy_(new)
    local = targets - start
    found = z.gather(-1, local.clamp(0, z.shape[1] - 1).unsqueeze(-1)).squeeze(-1)
    target.copy_(torch.where((local >= 0) & (local < z.shape[1]), found, target))


def gradient_tile(
    tile: Tensor, rows: Rows, start: int, shape: Shape, *, columns: bool
) -> tuple[Tensor, Tensor] | None:
    """
    Turn one tile of products into the gradient of the loss by them, in place.

    Returns:
        With `columns`, `max_i |g_ij|` and `sum_i p_ij`, both `(columns,)`.
    """
    dtype = statistics_dtype(tile.dtype)
    capped, amplitude = _capped(tile.to(dtype), shape)
    log_p = capped * amplitude - rows.log_z.unsqueeze(-1)
    p = torch.exp(log_p)
    is_target = torch.arange(start, start + tile.shape[1], device=tile.device) == rows.targets.unsqueeze(-1)
    grad = rows.grad_log_probs.unsqueeze(-1) * (is_target.to(dtype) - p)
    if rows.grad_entropy is not None:
        grad -= rows.grad_entropy.unsqueeze(-1) * p * (log_p + rows.entropy.unsqueeze(-1))
    grad *= shape.logit_scale / shape.temperature
    if shape.softcap is not None:
        grad *= 1 - capped * capped
    tile.copy_(grad)
    return (grad.abs().amax(0), p.sum(0)) if columns else None


def product(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    torch.mm(hidden, weight.t(), out=out)
    return out if bias is None else out.add_(bias)


class Gradients(NamedTuple):
    """Where the gradients of some rows and one tile are summed; `None` where nobody wants them."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def add_gradients(
    tile: Tensor, rows: Rows, weight: Tensor, *, into: Gradients, start: int, shape: Shape, options: Options
) -> None:
    """Turn a tile of products into its gradient and add what follows from it to the sums."""
    ops = triton_ops("hf_effi.kernels._lm_head_triton", tile)
    filtered = options.column_eps > 0
    measured = (ops.gradient_tile if ops else gradient_tile)(tile, rows, start, shape, columns=filtered)
    kept = None if measured is None else _active_columns(*measured, rows, start=start, shape=shape, options=options)
    narrow, w = (tile, weight) if kept is None else (tile[:, kept], weight[kept])
    if into.hidden is not None:
        add_product(into.hidden, narrow, w)
    if into.weight is not None:
        if kept is None or not options.filter_weight:
            add_product(into.weight, tile.t(), rows.hidden)
        else:
            total = into.weight[kept]
            add_product(total, narrow.t(), rows.hidden)
            into.weight[kept] = total
    if into.bias is not None:
        into.bias.add_(tile.sum(0, dtype=into.bias.dtype))


def _active_columns(
    largest: Tensor, mass: Tensor, rows: Rows, *, start: int, shape: Shape, options: Options
) -> Tensor | None:
    """Return the columns to keep, or `None` for all of them; count what is left out."""
    upstream = rows.grad_log_probs.abs().amax()
    if rows.grad_entropy is not None:
        upstream = torch.maximum(upstream, rows.grad_entropy.abs().amax())
    threshold = options.column_eps * abs(shape.logit_scale) / shape.temperature * upstream
    active = ~(largest < threshold)  # so that a NaN is kept, and seen
    local = rows.targets - start
    active[local[(local >= 0) & (local < largest.numel())]] = True
    kept = active.nonzero().squeeze(-1)
    counters = options.counters
    counters.columns += largest.numel()
    if kept.numel() > COMPACT_BELOW * largest.numel():
        return None
    counters.columns_skipped += largest.numel() - kept.numel()
    counters.dropped_mass += mass[~active].sum().item()
    return kept
