"""
Log-probabilities and entropies of a language model's head from hidden states, without the logits of all tokens.

The products run in cuBLAS on tiles of `(rows, columns)`; one pass over a tile folds it into running statistics, and in
the backward turns it into the gradient of the logits. Rows whose upstream gradient is zero are left out of the backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._compat import HAS_MM_OUT_DTYPE
from ._dispatch import triton_ops

ROW_CHUNK = 4096
VOCABULARY_TILE = 32_768
#: logits that `grad_in_forward` keeps at a time
KEPT_LOGIT_BYTES = 1_250_000_000
OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
#: Above this share of active columns the dense product is faster than a gathered one.
COMPACT_BELOW = 0.5


class LMHeadOutput(NamedTuple):
    """
    What [`lm_head_log_probs`] returns, each in the shape of `targets`; `None` where it was not asked for.

    Args:
        log_probs (`Tensor`): Log-probability of the target. Differentiable.
        entropy (`Tensor`, *optional*): Entropy in nats. Differentiable.
        log_sum_sq_probs (`Tensor`, *optional*): `log(sum_v p_v^2)`.
        mean_logits (`Tensor`, *optional*): Mean of the logits over the vocabulary, after all scaling.
        is_top1 (`Tensor`, *optional*): Whether the target is the most likely token, the first of equals.
    """

    log_probs: Tensor
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None


@dataclass
class LMHeadCounters:
    """
    What the backwards that were given this object left out.

    Args:
        rows, rows_skipped (`int`): Scored rows, and those of them whose upstream gradient was zero.
        columns, columns_skipped (`int`): Columns of tiles, and those of them under `column_eps`.
        dropped_mass (`float`): Sum over the kept rows of the probability in skipped columns.
        recomputed (`int`): Backwards under `grad_in_forward` with another upstream gradient than one value for all rows.
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


class _Shape(NamedTuple):
    """How a product becomes a logit: `z = softcap tanh(logit_scale (W h + b) / softcap) / temperature`."""

    temperature: float
    softcap: float | None
    logit_scale: float


class _Options(NamedTuple):
    outputs: tuple[str, ...]
    column_eps: float
    filter_weight: bool
    grad_in_forward: bool
    group: Any
    counters: LMHeadCounters


class _Rows(NamedTuple):
    """What the gradient of the logits of some rows needs."""

    hidden: Tensor
    targets: Tensor
    log_z: Tensor
    entropy: Tensor | None
    grad_log_probs: Tensor
    grad_entropy: Tensor | None

    def take(self, rows: slice | Tensor) -> _Rows:
        return _Rows(*(None if field is None else field[rows] for field in self))


def lm_head_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
) -> LMHeadOutput:
    """Return all outputs from the full logits, by autograd: what [`lm_head_log_probs`] is compared with."""
    z = F.linear(hidden, weight, bias).to(_statistics_dtype(hidden.dtype)) * logit_scale
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
    log_p = z.log_softmax(-1)
    valid = targets != ignore_index
    found = (
        log_p.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1),
        -(log_p.exp() * log_p).sum(-1),
        (2 * log_p).logsumexp(-1).detach(),
        z.mean(-1).detach(),
        z.argmax(-1) == targets,
    )
    return LMHeadOutput(*(value.masked_fill(~valid, 0) for value in found))


def lm_head_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    outputs: Sequence[str] = (),
    ignore_index: int = -100,
    column_eps: float = 0.0,
    filter_weight: bool = False,
    grad_in_forward: bool = False,
    group: Any = None,
    counters: LMHeadCounters | None = None,
) -> LMHeadOutput:
    """
    Score targets by `log softmax(z)`, `z = softcap tanh(logit_scale (W h + b) / softcap) / temperature`, in tiles.

    Forward: running `m = max z`, `s = sum e^(z - m)`, `x = sum z e^(z - m)`; `log Z = m + log s`,
    `log p = z_target - log Z`, `H = log Z - x / s`. Backward: tiles are computed again; with
    `p = e^(z - log Z)`, `g = dL/dlogp (1[target] - p) - dL/dH p (log p + H)`, `dh = g W`, `dW = g^T h`, summed in fp32.
    Rows with `dL/dlogp = dL/dH = 0` do not enter the backward, which is exact. The column filter is the one of
    Cut Cross-Entropy, https://arxiv.org/abs/2411.09009, by column instead of by block.

    Args:
        hidden (`Tensor`): `(..., H)`.
        weight (`Tensor`): `(V, H)`, or this rank's rows of it with `group`. Without `requires_grad` its gradient is not
            computed.
        targets (`Tensor`): `(...)`, in `[0, V)` or `ignore_index`. Ignored rows are not projected; their outputs are 0.
        bias (`Tensor`, *optional*): `(V,)`.
        temperature (`float`, *optional*, defaults to 1.0): Above 0.
        softcap (`float`, *optional*): Above 0. `None`: none.
        logit_scale (`float`, *optional*, defaults to 1.0): Factor of the product.
        outputs (`Sequence[str]`, *optional*): Of `"entropy"`, `"log_sum_sq_probs"`, `"mean_logits"`, `"is_top1"`.
        ignore_index (`int`, *optional*, defaults to -100): Target of rows that are not scored.
        column_eps (`float`, *optional*, defaults to 0.0): In `[0, 1)`. In each tile of the backward, columns `j` with
            `max_i |g_ij| < t`, `t = column_eps |logit_scale| max|upstream| / temperature`, are left out of `dh`:
            `|error of dh| <= t sum |W_j|` over them. 0: exact. The paper uses `2^-12`.
        filter_weight (`bool`, *optional*, defaults to `False`): Leave these columns out of `dW` too. Not for
            pre-training, where rare tokens then never learn.
        grad_in_forward (`bool`, *optional*, defaults to `False`): Compute the gradient in the forward, for an upstream
            gradient of one value for all rows, as that of a mean or a sum is: three products instead of four. Another
            upstream gradient is honoured by the four.
        group (`ProcessGroup`, *optional*): The vocabulary is sharded over this group in the order of ranks, each rank
            has tokens of its own, and gradients of the weight are summed over ranks. All ranks must call.
        counters (`LMHeadCounters`, *optional*): Told what the backward left out.

    Returns:
        [`LMHeadOutput`]: In fp32, or fp64 for fp64 inputs.

    Raises:
        ValueError: shapes do not fit, a target or a setting is out of range, or `grad_in_forward` with `group`.

    Example:
    ```python
    >>> import torch
    >>> hidden, weight = torch.eye(2), torch.zeros(4, 2)
    >>> lm_head_log_probs(hidden, weight, torch.tensor([3, -100])).log_probs
    tensor([-1.3863,  0.0000])
    ```
    """
    vocabulary = _Vocabulary(weight, bias, group)
    shape = _Shape(temperature, softcap, logit_scale)
    options = _Options(tuple(outputs), column_eps, filter_weight, grad_in_forward, group, counters or LMHeadCounters())
    _check(hidden, weight, targets, shape, options)
    rows, flat = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    valid = flat != ignore_index
    everything = bool(valid.all())
    if not everything:
        rows, flat = rows[valid], flat[valid]
    if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < vocabulary.size:
        raise ValueError(
            f"targets go from {int(flat.min())} to {int(flat.max())}; they must be in [0, {vocabulary.size}) or "
            f"ignore_index={ignore_index}."
        )
    autocast = torch.is_autocast_enabled(hidden.device.type)
    dtype = torch.get_autocast_dtype(hidden.device.type) if autocast else hidden.dtype
    options = options._replace(grad_in_forward=grad_in_forward and torch.is_grad_enabled())
    with torch.autocast(hidden.device.type, enabled=False):
        found = _LMHead.apply(rows, weight, bias, flat.contiguous(), vocabulary, dtype, shape, options)
    if not everything:
        # masked_scatter keeps the outputs attached to the model where every row is ignored
        found = (None if x is None else x.new_zeros(valid.shape).masked_scatter(valid, x) for x in found)
    return LMHeadOutput(*(None if x is None else x.view(targets.shape) for x in found))


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, shape: _Shape, options: _Options) -> None:
    if hidden.shape[:-1] != targets.shape or hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and targets {tuple(targets.shape)} must be "
            "(..., H), (V, H) and (...)."
        )
    if not shape.temperature > 0:
        raise ValueError(f"temperature={shape.temperature} must be above 0.")
    if shape.softcap is not None and not shape.softcap > 0:
        raise ValueError(f"softcap={shape.softcap} must be above 0, or None.")
    check_filter(options.column_eps, options.filter_weight)
    if unknown := [name for name in options.outputs if name not in OUTPUTS]:
        raise ValueError(f"outputs={unknown} are unknown. There are: {', '.join(OUTPUTS)}.")
    if options.grad_in_forward and options.group is not None:
        raise ValueError("grad_in_forward=True needs the whole vocabulary on each rank. Remove it, or group=.")


def check_filter(column_eps: float, filter_weight: bool) -> None:
    """Raise `ValueError` where the column filter's settings are out of range or have no effect."""
    if not 0 <= column_eps < 1:
        raise ValueError(f"column_eps={column_eps} must be in [0, 1); 0 is exact, 2**-12 is the paper's.")
    if filter_weight and not column_eps:
        raise ValueError("filter_weight=True has no effect without column_eps. Set column_eps=2**-12.")


def _statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


# --- the vocabulary, whole or sharded --------------------------------------------------------------------------------


class _Tile(NamedTuple):
    owner: int  # rank in the group that holds these rows of the weight
    local: slice  # rows of the owner's shard
    start: int  # first row in the whole vocabulary

    @property
    def width(self) -> int:
        return self.local.stop - self.local.start


class _Vocabulary:
    """
    The tiles of a head. With a group each tile is sent to all ranks, and its gradient summed to the rank that owns it.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, group: Any) -> None:
        self.group, self.rank, sizes = group, 0, [weight.shape[0]]
        if group is not None:
            self.rank = dist.get_rank(group)
            gathered = torch.zeros(dist.get_world_size(group), dtype=torch.long, device=weight.device)
            gathered[self.rank] = weight.shape[0]
            dist.all_reduce(gathered, group=group)
            sizes = gathered.tolist()
        self.size = sum(sizes)
        self.tiles = [
            _Tile(owner, slice(first, min(first + VOCABULARY_TILE, size)), sum(sizes[:owner]) + first)
            for owner, size in enumerate(sizes)
            for first in range(0, size, VOCABULARY_TILE)
        ]

    def fetch(self, part: Tensor | None, tile: _Tile, dtype: torch.dtype) -> Tensor | None:
        """Return the rows of a weight or bias that a tile covers."""
        if part is None or self.group is None:
            return None if part is None else part[tile.local].to(dtype)
        if tile.owner == self.rank:
            rows = part.detach()[tile.local].to(dtype).contiguous()
        else:
            rows = torch.empty((tile.width, *part.shape[1:]), dtype=dtype, device=part.device)
        dist.broadcast(rows, dist.get_global_rank(self.group, tile.owner), group=self.group)
        return rows

    def give(self, grad: Tensor | None, total: Tensor | None, tile: _Tile) -> None:
        """Write the gradient of a tile into that of the parameter, on the rank that owns it."""
        if grad is None or total is None:
            return
        if self.group is not None:
            dist.reduce(grad, dist.get_global_rank(self.group, tile.owner), group=self.group)
        if tile.owner == self.rank:
            total[tile.local] = grad.to(total.dtype)


# --- one tile ----------------------------------------------------------------------------------------------------------


def _capped(tile: Tensor, shape: _Shape) -> tuple[Tensor, float]:
    """Return what the softcap leaves to multiply by, and that factor."""
    z = tile * shape.logit_scale
    if shape.softcap is None:
        return z, 1.0 / shape.temperature
    return torch.tanh(z / shape.softcap), shape.softcap / shape.temperature


def fold_tile(
    tile: Tensor, stats: Tensor, top: Tensor, targets: Tensor, start: int, shape: _Shape, outputs: Sequence[str]
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
    tile: Tensor, rows: _Rows, start: int, shape: _Shape, *, columns: bool
) -> tuple[Tensor, Tensor] | None:
    """
    Turn one tile of products into the gradient of the loss by them, in place.

    Returns:
        With `columns`, `max_i |g_ij|` and `sum_i p_ij`, both `(columns,)`.
    """
    dtype = _statistics_dtype(tile.dtype)
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


def _product(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    torch.mm(hidden, weight.t(), out=out)
    return out if bias is None else out.add_(bias)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right` in `total`'s precision: rounding each tile's product to bf16 would add up to a bias."""
    if HAS_MM_OUT_DTYPE and total.is_cuda and left.dtype in (torch.float16, torch.bfloat16):
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


class _Gradients(NamedTuple):
    """Where the gradients of some rows and one tile are summed; `None` where nobody wants them."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def _add_gradients(
    tile: Tensor, rows: _Rows, weight: Tensor, into: _Gradients, start: int, shape: _Shape, options: _Options
) -> None:
    """Turn a tile of products into its gradient and add what follows from it to the sums."""
    ops = triton_ops("_lm_head_triton", tile)
    filtered = options.column_eps > 0
    measured = (ops.gradient_tile if ops else gradient_tile)(tile, rows, start, shape, columns=filtered)
    kept = None if measured is None else _active_columns(*measured, rows, start, shape, options)
    narrow, w = (tile, weight) if kept is None else (tile[:, kept], weight[kept])
    if into.hidden is not None:
        _add_product(into.hidden, narrow, w)
    if into.weight is not None:
        if kept is None or not options.filter_weight:
            _add_product(into.weight, tile.t(), rows.hidden)
        else:
            total = into.weight[kept]
            _add_product(total, narrow.t(), rows.hidden)
            into.weight[kept] = total
    if into.bias is not None:
        into.bias.add_(tile.sum(0, dtype=into.bias.dtype))


def _active_columns(
    largest: Tensor, mass: Tensor, rows: _Rows, start: int, shape: _Shape, options: _Options
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


# --- all tiles ---------------------------------------------------------------------------------------------------------


def _chunks(count: int, size: int) -> Iterator[slice]:
    for first in range(0, count, size):
        yield slice(first, min(first + size, count))


def _new_statistics(hidden: Tensor) -> tuple[Tensor, Tensor]:
    stats = torch.zeros((6, hidden.shape[0]), dtype=_statistics_dtype(hidden.dtype), device=hidden.device)
    stats[0] = -torch.inf
    return stats, torch.zeros(hidden.shape[0], dtype=torch.long, device=hidden.device)


def _fold(
    tile: Tensor, stats: Tensor, top: Tensor, targets: Tensor, start: int, shape: _Shape, outputs: Sequence[str]
) -> None:
    ops = triton_ops("_lm_head_triton", tile)
    (ops.fold_tile if ops else fold_tile)(tile, stats, top, targets, start, shape, outputs)


def _finish(stats: Tensor, top: Tensor, targets: Tensor, vocabulary_size: int, outputs: Sequence[str]) -> LMHeadOutput:
    maximum, sum_exp, weighted, squares, total, target = stats
    log_sum = sum_exp.log()
    log_z = maximum + log_sum
    return LMHeadOutput(
        target - log_z,
        log_z - weighted / sum_exp if "entropy" in outputs else None,
        squares.log() - 2 * log_sum if "log_sum_sq_probs" in outputs else None,
        total / vocabulary_size if "mean_logits" in outputs else None,
        top == targets if "is_top1" in outputs else None,
    )


def _backward_tiles(
    rows: _Rows,
    weight: Tensor,
    bias: Tensor | None,
    vocabulary: _Vocabulary,
    needed: Sequence[bool],
    shape: _Shape,
    options: _Options,
) -> _Gradients:
    """Compute each tile again and return the gradients: of these rows, and of the whole weight and bias."""
    dtype, device = rows.hidden.dtype, rows.hidden.device
    wide = _statistics_dtype(dtype)
    count = rows.hidden.shape[0]
    grad_hidden = torch.zeros(rows.hidden.shape, dtype=wide, device=device) if needed[0] else None
    grad_weight = torch.zeros_like(weight) if needed[1] else None
    grad_bias = torch.zeros_like(bias) if needed[2] else None
    tiles = vocabulary.tiles if count or vocabulary.group is not None else []
    widest = max((tile.width for tile in tiles), default=0)
    buffer = torch.empty(min(count, ROW_CHUNK) * widest, dtype=dtype, device=device)
    for tile in tiles:
        w, b = vocabulary.fetch(weight, tile, dtype), vocabulary.fetch(bias, tile, dtype)
        tile_weight = torch.zeros(w.shape, dtype=wide, device=device) if needed[1] else None
        tile_bias = torch.zeros(tile.width, dtype=wide, device=device) if needed[2] else None
        for chunk in _chunks(count, ROW_CHUNK):
            part = rows.take(chunk)
            logits = buffer[: part.hidden.shape[0] * tile.width].view(-1, tile.width)
            _product(part.hidden, w, b, logits)
            into = _Gradients(None if grad_hidden is None else grad_hidden[chunk], tile_weight, tile_bias)
            _add_gradients(logits, part, w, into, tile.start, shape, options)
        vocabulary.give(tile_weight, grad_weight, tile)
        vocabulary.give(tile_bias, grad_bias, tile)
    return _Gradients(grad_hidden, grad_weight, grad_bias)


def _forward_with_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    vocabulary: _Vocabulary,
    needed: Sequence[bool],
    shape: _Shape,
    options: _Options,
) -> tuple[Tensor, Tensor, _Gradients]:
    """Keep the logits of some rows until their `log Z` is known, and compute the gradient of the sum of `log p`."""
    dtype, device = hidden.dtype, hidden.device
    wide, (stats, top) = _statistics_dtype(dtype), _new_statistics(hidden)
    total = _Gradients(
        torch.zeros(hidden.shape, dtype=wide, device=device) if needed[0] else None,
        torch.zeros(weight.shape, dtype=wide, device=device) if needed[1] else None,
        torch.zeros(vocabulary.size, dtype=wide, device=device) if needed[2] else None,
    )
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    size = max(1, min(ROW_CHUNK, KEPT_LOGIT_BYTES // (vocabulary.size * hidden.element_size())))
    buffer = torch.empty((min(size, hidden.shape[0]), vocabulary.size), dtype=dtype, device=device)
    for chunk in _chunks(hidden.shape[0], size):
        h, y = hidden[chunk], targets[chunk]
        logits = _product(h, weight, bias, buffer[: h.shape[0]])
        _fold(logits, stats[:, chunk], top[chunk], y, 0, shape, options.outputs)
        log_z = stats[0, chunk] + stats[1, chunk].log()
        part = _Rows(h, y, log_z, None, torch.ones_like(log_z), None)
        for tile in vocabulary.tiles:
            into = _Gradients(
                None if total.hidden is None else total.hidden[chunk],
                None if total.weight is None else total.weight[tile.local],
                None if total.bias is None else total.bias[tile.local],
            )
            _add_gradients(logits[:, tile.local], part, weight[tile.local], into, tile.start, shape, options)
    return stats, top, total


class _LMHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        vocabulary: _Vocabulary,
        dtype: torch.dtype,
        shape: _Shape,
        options: _Options,
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        rows, known = hidden.to(dtype), _Gradients(None, None, None)
        if options.grad_in_forward:
            stats, top, sums = _forward_with_gradients(
                rows, weight, bias, targets, vocabulary, ctx.needs_input_grad[:3], shape, options
            )
            inputs = (hidden, weight, bias)
            known = _Gradients(*(None if s is None else s.to(x.dtype) for s, x in zip(sums, inputs, strict=True)))
        else:
            stats, top = _new_statistics(rows)
            for tile in vocabulary.tiles:
                w, b = vocabulary.fetch(weight, tile, dtype), vocabulary.fetch(bias, tile, dtype)
                for chunk in _chunks(rows.shape[0], ROW_CHUNK):
                    logits = F.linear(rows[chunk], w, b)
                    _fold(logits, stats[:, chunk], top[chunk], targets[chunk], tile.start, shape, options.outputs)
        found = _finish(stats, top, targets, vocabulary.size, options.outputs)
        ctx.save_for_backward(hidden, weight, bias, targets, stats[0] + stats[1].log(), found.entropy, *known)
        ctx.vocabulary, ctx.dtype, ctx.shape, ctx.options = vocabulary, dtype, shape, options
        ctx.mark_non_differentiable(*(x for x in found[2:] if x is not None))
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_log_probs: Tensor | None, grad_entropy: Tensor | None, *_: Any
    ) -> tuple[Tensor | None, ...]:
        with torch.autocast(ctx.saved_tensors[0].device.type, enabled=False):
            return *_backward(ctx, grad_log_probs, grad_entropy), None, None, None, None, None


def _backward(ctx: Any, grad_log_probs: Tensor | None, grad_entropy: Tensor | None) -> _Gradients:
    hidden, weight, bias, targets, log_z, entropy, *known = ctx.saved_tensors
    options, counters, needed = ctx.options, ctx.options.counters, ctx.needs_input_grad[:3]
    if grad_log_probs is None:
        grad_log_probs = torch.zeros_like(log_z)
    counters.rows += hidden.shape[0]
    if options.grad_in_forward and hidden.shape[0]:
        factor = grad_log_probs[0]
        if grad_entropy is None and bool((grad_log_probs == factor).all()):
            return _Gradients(*(None if g is None else g * factor.to(g.dtype) for g in known))
        counters.recomputed += 1
    wanted = grad_log_probs != 0 if grad_entropy is None else (grad_log_probs != 0) | (grad_entropy != 0)
    kept = wanted.nonzero().squeeze(-1)
    counters.rows_skipped += hidden.shape[0] - kept.numel()
    rows = _Rows(hidden.to(ctx.dtype), targets, log_z, entropy, grad_log_probs, grad_entropy)
    grads = _backward_tiles(rows.take(kept), weight, bias, ctx.vocabulary, needed, ctx.shape, options)
    if grads.hidden is None:
        return grads
    return grads._replace(hidden=torch.zeros_like(hidden).index_copy_(0, kept, grads.hidden.to(hidden.dtype)))
