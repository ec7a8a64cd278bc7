"""
Log-probabilities and entropies of a language model's head from hidden states, without the logits of all tokens.

The products run in cuBLAS on tiles of `(rows, columns)`; one pass over a tile folds it into running statistics, and in
the backward turns it into the gradient of the logits. Rows whose upstream gradient is zero are left out of the
backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._lm_head_tiles import (
    Gradients,
    LMHeadCounters,
    Options,
    Rows,
    Shape,
    Vocabulary,
    add_gradients,
    fold,
    new_statistics,
    product,
    statistics_dtype,
)

ROW_CHUNK = 4096
VOCABULARY_TILE = 32_768
#: logits that `grad_in_forward` keeps at a time
KEPT_LOGIT_BYTES = 1_250_000_000
OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


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
    z = F.linear(hidden, weight, bias).to(statistics_dtype(hidden.dtype)) * logit_scale
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
    `p = e^(z - log Z)`, `g = dL/dlogp (1[target] - p) - dL/dH p (log p + H)`, `dh = g W`, `dW = g^T h`, summed in
    fp32. Rows with `dL/dlogp = dL/dH = 0` do not enter the backward, which is exact. The column filter is the one of
    Cut Cross-Entropy, https://arxiv.org/abs/2411.09009, by column instead of by block.

    Args:
        hidden (`Tensor`): `(..., H)`.
        weight (`Tensor`): `(V, H)`, or this rank's rows of it with `group`. Without `requires_grad` its gradient is
            not computed.
        targets (`Tensor`): `(...)`, in `[0, V)` or `ignore_index`. Ignored rows are not projected; their outputs are
            0.
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
    vocabulary = Vocabulary(weight, group, VOCABULARY_TILE)
    shape = Shape(temperature, softcap, logit_scale)
    options = Options(tuple(outputs), column_eps, filter_weight, grad_in_forward, group, counters or LMHeadCounters())
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


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, shape: Shape, options: Options) -> None:
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


def _chunks(count: int, size: int) -> Iterator[slice]:
    for first in range(0, count, size):
        yield slice(first, min(first + size, count))


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
    rows: Rows,
    weight: Tensor,
    bias: Tensor | None,
    vocabulary: Vocabulary,
    *,
    needed: Sequence[bool],
    shape: Shape,
    options: Options,
) -> Gradients:
    """Compute each tile again and return the gradients: of these rows, and of the whole weight and bias."""
    dtype, device = rows.hidden.dtype, rows.hidden.device
    wide = statistics_dtype(dtype)
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
            product(part.hidden, w, b, logits)
            into = Gradients(None if grad_hidden is None else grad_hidden[chunk], tile_weight, tile_bias)
            add_gradients(logits, part, w, into=into, start=tile.start, shape=shape, options=options)
        vocabulary.give(tile_weight, grad_weight, tile)
        vocabulary.give(tile_bias, grad_bias, tile)
    return Gradients(grad_hidden, grad_weight, grad_bias)


def _forward_with_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    vocabulary: Vocabulary,
    needed: Sequence[bool],
    shape: Shape,
    options: Options,
) -> tuple[Tensor, Tensor, Gradients]:
    """Keep the logits of some rows until their `log Z` is known, and compute the gradient of the sum of `log p`."""
    dtype, device = hidden.dtype, hidden.device
    wide, (stats, top) = statistics_dtype(dtype), new_statistics(hidden)
    total = Gradients(
        torch.zeros(hidden.shape, dtype=wide, device=device) if needed[0] else None,
        torch.zeros(weight.shape, dtype=wide, device=device) if needed[1] else None,
        torch.zeros(vocabulary.size, dtype=wide, device=device) if needed[2] else None,
    )
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    size = max(1, min(ROW_CHUNK, KEPT_LOGIT_BYTES // (vocabulary.size * hidden.element_size())))
    buffer = torch.empty((min(size, hidden.shape[0]), vocabulary.size), dtype=dtype, device=device)
    for chunk in _chunks(hidden.shape[0], size):
        h, y = hidden[chunk], targets[chunk]
        logits = product(h, weight, bias, buffer[: h.shape[0]])
        fold(logits, stats[:, chunk], top[chunk], y, start=0, shape=shape, outputs=options.outputs)
        log_z = stats[0, chunk] + stats[1, chunk].log()
        part = Rows(h, y, log_z, entropy=None, grad_log_probs=torch.ones_like(log_z), grad_entropy=None)
        for tile in vocabulary.tiles:
            into = Gradients(
                None if total.hidden is None else total.hidden[chunk],
                None if total.weight is None else total.weight[tile.local],
                None if total.bias is None else total.bias[tile.local],
            )
            add_gradients(
                logits[:, tile.local],
                part,
                weight[tile.local],
                into=into,
                start=tile.start,
                shape=shape,
                options=options,
            )
    return stats, top, total


class _LMHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        vocabulary: Vocabulary,
        dtype: torch.dtype,
        shape: Shape,
        options: Options,
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        rows, known = hidden.to(dtype), Gradients(None, None, None)
        if options.grad_in_forward:
            stats, top, sums = _forward_with_gradients(
                rows,
                weight,
                bias,
                targets,
                vocabulary=vocabulary,
                needed=ctx.needs_input_grad[:3],
                shape=shape,
                options=options,
            )
            inputs = (hidden, weight, bias)
            known = Gradients(*(None if s is None else s.to(x.dtype) for s, x in zip(sums, inputs, strict=True)))
        else:
            stats, top = new_statistics(rows)
            for tile in vocabulary.tiles:
                w, b = vocabulary.fetch(weight, tile, dtype), vocabulary.fetch(bias, tile, dtype)
                for chunk in _chunks(rows.shape[0], ROW_CHUNK):
                    logits = F.linear(rows[chunk], w, b)
                    fold(
                        logits,
                        stats[:, chunk],
                        top[chunk],
                        targets[chunk],
                        start=tile.start,
                        shape=shape,
                        outputs=options.outputs,
                    )
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


def _backward(ctx: Any, grad_log_probs: Tensor | None, grad_entropy: Tensor | None) -> Gradients:
    hidden, weight, bias, targets, log_z, entropy, *known = ctx.saved_tensors
    options, counters, needed = ctx.options, ctx.options.counters, ctx.needs_input_grad[:3]
    if grad_log_probs is None:
        grad_log_probs = torch.zeros_like(log_z)
    counters.rows += hidden.shape[0]
    if options.grad_in_forward and hidden.shape[0]:
        factor = grad_log_probs[0]
        if grad_entropy is None and bool((grad_log_probs == factor).all()):
            return Gradients(*(None if g is None else g * factor.to(g.dtype) for g in known))
        counters.recomputed += 1
    wanted = grad_log_probs != 0 if grad_entropy is None else (grad_log_probs != 0) | (grad_entropy != 0)
    kept = wanted.nonzero().squeeze(-1)
    counters.rows_skipped += hidden.shape[0] - kept.numel()
    rows = Rows(hidden.to(ctx.dtype), targets, log_z, entropy, grad_log_probs, grad_entropy)
    grads = _backward_tiles(
        rows.take(kept), weight, bias, ctx.vocabulary, needed=needed, shape=ctx.shape, options=options
    )
    if grads.hidden is None:
        return grads
    return grads._replace(hidden=torch.zeros_like(hidden).index_copy_(0, kept, grads.hidden.to(hidden.dtype)))
