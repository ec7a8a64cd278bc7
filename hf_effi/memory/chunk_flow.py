"""ChunkFlow: long sequences in dependent chunks, joined by the keys and values of a cache and by their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from .._compat import CACHE_ARGUMENT
from ..errors import RefusedError
from ..functional.sequence import plan_chunks

IGNORED = -100
#: what a batch may carry; the last ones say where segments begin, as `position_ids` do
_KNOWN = {"input_ids", "labels", "attention_mask", "position_ids"}
_SEGMENTS = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}


@dataclass(frozen=True)
class ChunkFlow:
    """
    How to cut batches into chunks.

    Args:
        chunk_size (`int`): Tokens of a chunk, at least 1. Sequences that are longer are cut; shorter ones share a
            chunk.
        max_live_chunks (`int`, *optional*, defaults to 1): `K`: chunks of a sequence whose activations may exist at
            once, at least 1. A sequence of `N` chunks is run forward `(N - K) / N` times more than once.

    Raises:
        ValueError: a number out of range.
    """

    chunk_size: int
    max_live_chunks: int = 1

    def __post_init__(self) -> None:
        for name in ("chunk_size", "max_live_chunks"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r} must be an integer of at least 1.")


class _CarryGradients(torch.autograd.Function):
    """The loss, whose backward also enters the graph at `states` with gradients that are known from elsewhere."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Sequence[Tensor], *states: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # As they are: the backward that they come from had the loss's scale already.
        return grad, None, *ctx.gradients


class ChunkGroup:
    """
    Chunks of one row of tokens, each of which attends to the ones before it.

    Args:
        tokens (`dict[str, torch.Tensor]`): `input_ids`, `shift_labels` and `position_ids`, each `(1, length)`.
        bounds (`Sequence[tuple[int, int]]`): The chunks.
        cache_name (`str`, *optional*): The model's argument for earlier keys and values; that of upstream's models.
    """

    def __init__(
        self, tokens: dict[str, Tensor], bounds: Sequence[tuple[int, int]], cache_name: str = CACHE_ARGUMENT
    ) -> None:
        self.tokens, self.bounds, self.cache_name = tokens, bounds, cache_name
        #: of each layer, keys and values: those of all chunks so far, their gradients, and the leaves that a chunk saw
        self._states: list[Tensor] = []
        self._gradients: list[Tensor] = []
        self._leaves: dict[int, list[Tensor]] = {}
        self._own: dict[int, list[Tensor]] = {}

    def __len__(self) -> int:
        return len(self.bounds)

    def inputs(self, index: int) -> dict[str, Any]:
        """Return what the model takes for a chunk; with more than one chunk, a cache that holds the ones before it."""
        start, end = self.bounds[index]
        inputs: dict[str, Any] = {name: value[:, start:end].contiguous() for name, value in self.tokens.items()}
        inputs["labels"] = inputs["shift_labels"]
        inputs["use_cache"] = len(self) > 1
        if len(self) > 1:
            leaves = [state[..., :start, :].detach().requires_grad_(torch.is_grad_enabled()) for state in self._states]
            self._leaves[index] = leaves if start else []
            inputs[self.cache_name] = cache = DynamicCache()
            for layer in range(len(self._leaves[index]) // 2):
                cache.update(leaves[2 * layer], leaves[2 * layer + 1], layer)
        return inputs

    def ran(self, index: int, cache: DynamicCache | None) -> None:
        """Note the keys and values of a chunk that was run."""
        if cache is None:
            return
        start, end = self.bounds[index]
        whole = [state for layer in cache.layers for state in (layer.keys, layer.values)]
        if not whole or any(state is None or state.shape[-2] != end for state in whole):
            raise RefusedError("The model did not put the keys and values of every layer and token into its cache.")
        if not self._states or self._states[0].shape[-2] < end:
            self._states = [state.detach() for state in whole]
        if torch.is_grad_enabled():
            self._own[index] = [state[..., start:end, :] for state in whole]

    def with_gradients(self, index: int, loss: Tensor) -> Tensor:
        """Return the loss of a chunk joined to the gradients that later chunks have for its keys and values."""
        own = self._own.pop(index, [])
        if index == len(self) - 1:
            return loss
        start, end = self.bounds[index]
        trained = [
            (state, gradient[..., start:end, :].to(state.dtype))
            for state, gradient in zip(own, self._gradients, strict=True)
            if state.requires_grad
        ]
        return _CarryGradients.apply(loss, [gradient for _, gradient in trained], *(state for state, _ in trained))

    def leaves(self, index: int) -> list[Tensor]:
        """
        Return the keys and values of earlier chunks that a chunk was run with, of which its backward is to get
        gradients.
        """
        return self._leaves.get(index, [])

    def went_back(self, index: int) -> None:
        """Add what the chunk's backward left for the keys and values before it."""
        for position, leaf in enumerate(self._leaves.pop(index, [])):
            if not self._gradients:
                # Half precision would round the sum at every chunk.
                self._gradients = [
                    torch.zeros_like(state, dtype=torch.promote_types(state.dtype, torch.float32))
                    for state in self._states
                ]
            if leaf.grad is not None:
                self._gradients[position][..., : leaf.shape[-2], :] += leaf.grad


def make_groups(batch: dict[str, Any], chunk_size: int, cache_name: str = CACHE_ARGUMENT) -> list[ChunkGroup]:
    """
    Cut a batch into groups of chunks: those of long sequences first, then chunks of short sequences, packed.

    Padding goes, and so do sequences without a label, which have no gradient. Labels are shifted within the row, as
    the model would, before it is cut: the last token of a chunk predicts the first of the next.

    Args:
        batch (`dict`): `input_ids` and `labels` `(rows, tokens)`; optionally `attention_mask`, and `position_ids` that
            begin at 0 with each packed segment.
        chunk_size (`int`): Tokens of a chunk.
        cache_name (`str`, *optional*): The model's argument for earlier keys and values; that of upstream's models.

    Raises:
        RefusedError: an input that is not known, positions that skip, or a label that padding would have to predict.
    """
    unknown = [name for name in batch if name not in _KNOWN | _SEGMENTS and isinstance(batch[name], Tensor)]
    if unknown or "labels" not in batch:
        raise RefusedError(f"ChunkFlow cuts {sorted(_KNOWN)}; the batch has {sorted(batch)}.")
    if _SEGMENTS & batch.keys() and batch.get("position_ids") is None:
        raise RefusedError("The batch is packed but has no position_ids, which tell where segments begin.")
    sequences = [sequence for row in _rows(batch) for sequence in _segments(*row)]
    if not sequences:  # a backward is needed all the same, by the other ranks
        sequences = [(batch["input_ids"][0, :1], torch.full_like(batch["input_ids"][0, :1], IGNORED))]
    plan = plan_chunks([len(ids) for ids, _ in sequences], chunk_size)
    groups = [ChunkGroup(_pack([sequences[index]]), bounds, cache_name) for index, bounds in plan.dependent]
    for members in plan.standalone:
        tokens = _pack([sequences[index] for index in members])
        groups.append(ChunkGroup(tokens, [(0, tokens["input_ids"].shape[1])], cache_name))
    return groups


def _rows(batch: dict[str, Any]) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """Return `(ids, shifted labels, positions)` of each row without its padding."""
    ids, positions = batch["input_ids"], batch.get("position_ids")
    shifted = F.pad(batch["labels"], (0, 1), value=IGNORED)[:, 1:]
    mask = batch.get("attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    if (shifted[~real] != IGNORED).any():
        raise RefusedError(
            "A padding token would have to predict a label. Pad on the right and label padding -100, or give the "
            "first token of left-padded rows the label -100."
        )
    if positions is None:
        return [(row[keep], labels[keep], None) for row, labels, keep in zip(ids, shifted, real, strict=True)]
    positions = positions.expand_as(ids)
    return [
        (row[keep], labels[keep], where[keep])
        for row, labels, keep, where in zip(ids, shifted, real, positions, strict=True)
    ]


def _segments(ids: Tensor, labels: Tensor, positions: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    if positions is None:
        lengths = [len(ids)]
    else:
        if len(ids) and (positions[0] != 0 or ((positions[1:] != positions[:-1] + 1) & (positions[1:] != 0)).any()):
            raise RefusedError("position_ids must count from 0 in each segment of a row, without gaps.")
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
        lengths = [after - before for before, after in zip(starts, starts[1:], strict=False)]
    parts = zip(ids.split(lengths), labels.split(lengths), strict=True)
    return [(part, target) for part, target in parts if (target != IGNORED).any()]


def _pack(sequences: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    ids, labels = (torch.cat(parts)[None] for parts in zip(*sequences, strict=True))
    positions = torch.cat([torch.arange(len(part), device=ids.device) for part, _ in sequences])[None]
    return {"input_ids": ids, "shift_labels": labels, "position_ids": positions}
