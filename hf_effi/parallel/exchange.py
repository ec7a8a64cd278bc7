"""The collectives of sequence parallelism with their gradients."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from .groups import SequenceGroup

GatherGradient = Literal["sum", "slice"]


def _exchange(tensors: Sequence[Tensor], group: SequenceGroup, to_heads: bool) -> list[Tensor]:
    """
    Swap who holds what with one all-to-all for all tensors.

    `to_heads`: `(B, H, S/P, D)` of every head -> `(B, H/P, S, D)` of this rank's heads. Otherwise the way back.
    """
    size = group.size
    blocks = [_outgoing(x, size, to_heads) for x in tensors]
    lengths = [block[0].numel() for block in blocks]
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in tensors))
    sent = torch.empty(size, sum(lengths), dtype=dtype, device=tensors[0].device)
    for part, block in zip(sent.split(lengths, dim=1), blocks, strict=True):
        part.view(block.shape).copy_(block)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group.process_group)
    parts = received.split(lengths, dim=1)
    return [_incoming(part.view(block.shape), to_heads) for part, block in zip(parts, blocks, strict=True)]


def _outgoing(x: Tensor, size: int, to_heads: bool) -> Tensor:
    """View `x` as `(destination, B, heads, tokens, D)`."""
    batch, heads, tokens, width = x.shape
    if to_heads:
        return x.reshape(batch, size, heads // size, tokens, width).transpose(0, 1)
    return x.reshape(batch, heads, size, tokens // size, width).permute(2, 0, 1, 3, 4)


def _incoming(blocks: Tensor, to_heads: bool) -> Tensor:
    """Join `(source, B, heads, tokens, D)`: sources hold consecutive tokens (`to_heads`) or consecutive heads."""
    size, batch, heads, tokens, width = blocks.shape
    if to_heads:
        return blocks.permute(1, 2, 0, 3, 4).reshape(batch, heads, size * tokens, width)
    return blocks.transpose(0, 1).reshape(batch, size * heads, tokens, width)


class _Exchange(torch.autograd.Function):
    """A permutation across ranks, so that its gradient is the exchange in the other direction."""

    @staticmethod
    def forward(ctx: Any, group: SequenceGroup, to_heads: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.to_heads = group, to_heads
        return tuple(_exchange(tensors, group, to_heads))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return None, None, *_exchange(gradients, ctx.group, not ctx.to_heads)


def heads_from_sequence(query: Tensor, key: Tensor, value: Tensor, group: SequenceGroup) -> tuple[Tensor, ...]:
    """
    Give this rank all tokens of its share of the heads, in one all-to-all (arXiv 2309.14509, section 3.1).

    With fewer key/value heads than ranks each is repeated `P / Hk` times first; autograd adds the copies' gradients.

    Args:
        query (`Tensor`): `(B, Hq, S/P, D)`.
        key, value (`Tensor`): `(B, Hk, S/P, D)`.
        group ([`SequenceGroup`]): The ranks of the sequence, `P` of them.

    Returns:
        `tuple[Tensor, Tensor, Tensor]`: `(B, Hq/P, S, D)` and twice `(B, max(1, Hk/P), S, D)`.
    """
    copies = max(1, group.size // key.size(1))
    if copies > 1:
        key, value = key.repeat_interleave(copies, dim=1), value.repeat_interleave(copies, dim=1)
    return _Exchange.apply(group, True, query, key, value)


def sequence_from_heads(output: Tensor, group: SequenceGroup) -> Tensor:
    """
    Give this rank all heads of its share of the tokens: the inverse of [`heads_from_sequence`].

    Args:
        output (`Tensor`): `(B, Hq/P, S, D)`.

    Returns:
        `Tensor`: `(B, Hq, S/P, D)`.
    """
    return _Exchange.apply(group, False, output)[0]


def _all_gather(x: Tensor, group: SequenceGroup) -> Tensor:
    sent = x.contiguous().to(torch.uint8) if x.dtype == torch.bool else x.contiguous()
    parts = [torch.empty_like(sent) for _ in range(group.size)]
    dist.all_gather(parts, sent, group=group.process_group)
    return torch.cat(parts, dim=1).to(x.dtype)


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: SequenceGroup, gradient: GatherGradient) -> Tensor:
        ctx.group, ctx.gradient, ctx.part = group, gradient, x.size(1)
        return _all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        if ctx.gradient == "sum":
            gradient = gradient.contiguous().clone()
            dist.all_reduce(gradient, group=ctx.group.process_group)
        start = ctx.group.rank * ctx.part
        return gradient[:, start : start + ctx.part].contiguous(), None, None


def gather_sequence(x: Tensor, group: SequenceGroup, gradient: GatherGradient) -> Tensor:
    """
    Join the shards of dimension 1 on every rank.

    All ranks then compute the same loss from the whole sequence. What their copies of the gradient become depends on
    who averages later:

    - `"sum"`: the copies are added, `P` times the gradient. Right when each of the `W` ranks averages over the world
      and a batch is processed once by its group (replicated batches).
    - `"slice"`: each rank keeps its part of its own copy. Right when the group processes the batches of all its `P`
      ranks in turn (rounds).

    Args:
        x (`Tensor`): `(B, S/P, ...)`.
        group ([`SequenceGroup`]): The ranks of the sequence.
        gradient (`str`): `"sum"` or `"slice"`.

    Returns:
        `Tensor`: `(B, S, ...)`.
    """
    if not x.is_floating_point():
        return _all_gather(x, group)
    return _GatherSequence.apply(x, group, gradient)
