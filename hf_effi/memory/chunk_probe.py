"""What a loaded model says about ChunkFlow: loss and gradients of a few tokens, in one call and in chunks."""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._compat import cache_argument
from ..functional.sequence import chunk_schedule
from ..patching import Finding, Results, call, compare, gradients, short_reach, tiny_tokens
from ..patching._inputs import _CannotLook
from .chunk_flow import IGNORED, make_groups

#: How the rows of a batch are laid out.
Layout = Literal["padded", "padded on the left", "packed"]
#: the first row is cut into three chunks, the others share one
_LENGTHS, _CHUNK = (15, 3, 2), 6


def chunks_are_exact(model: nn.Module, layout: Layout = "padded") -> Finding:
    """
    Ask whether chunks with the keys and values of the ones before them give the loss and gradients of whole rows.

    Chunked attention, states that are not keys and values, positions of their own, layers that ignore a cache,
    documents that see each other in one row, and losses that are means over a call give other ones.

    Args:
        model (`nn.Module`): A causal language model with a loss.
        layout (`str`, *optional*, defaults to `"padded"`): Of the whole rows.
    """
    return compare(model, functools.partial(_whole, layout=layout), functools.partial(_in_chunks, layout=layout))


def layout_of(batch: dict[str, Any]) -> Layout:
    """Return how the rows of a batch are laid out."""
    positions, mask = batch.get("position_ids"), batch.get("attention_mask")
    if positions is not None and int((positions == 0).sum()) > positions.shape[0]:
        return "packed"
    return "padded on the left" if mask is not None and not bool(mask[:, 0].all()) else "padded"


def cache_name_of(model: nn.Module) -> str:
    """Return under which name the forward of a model, which PEFT may have wrapped, takes a cache."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return cache_argument(base.forward)


def _batch(model: nn.Module, layout: Layout) -> dict[str, Tensor]:
    tokens = tiny_tokens(model, len(_LENGTHS), max(_LENGTHS))
    rows = [row[:length] for row, length in zip(tokens, _LENGTHS, strict=True)]
    if layout == "packed":
        ids = torch.cat(rows)[None]
        positions = torch.cat([torch.arange(length, device=ids.device) for length in _LENGTHS])[None]
        return {"input_ids": ids, "labels": ids.masked_fill(positions == 0, IGNORED), "position_ids": positions}
    places = torch.arange(max(_LENGTHS), device=tokens.device)
    lengths = torch.tensor(_LENGTHS, device=tokens.device)[:, None]
    before = max(_LENGTHS) - lengths if layout == "padded on the left" else torch.zeros_like(lengths)
    real = (places >= before) & (places < before + lengths)
    source = (places - before).clamp(min=0, max=max(_LENGTHS) - 1)
    ids = tokens.gather(1, source)
    # The first token has nothing before it that could predict it.
    labels = ids.masked_fill(~real | (places == before), IGNORED)
    return {"input_ids": ids, "labels": labels, "attention_mask": real.long()}


def _whole(model: nn.Module, layout: Layout) -> Results:
    batch = _batch(model, layout)
    count = (batch["labels"] != IGNORED).sum()
    with short_reach(model, _CHUNK + 1):
        loss = _loss(call(model, **batch, num_items_in_batch=count))
    return {"the loss": loss, **gradients(model, loss)}


def _in_chunks(model: nn.Module, layout: Layout) -> Results:
    batch = _batch(model, layout)
    count = (batch["labels"] != IGNORED).sum()
    totals: dict[str, Tensor] = {"the loss": torch.zeros((), device=count.device)}
    with short_reach(model, _CHUNK + 1):
        for group in make_groups(batch, _CHUNK, cache_name_of(model)):
            for action, index in chunk_schedule(len(group), 1):
                with torch.set_grad_enabled(action != "prefix"):
                    inputs = group.inputs(index)
                    outputs = call(model, **inputs, num_items_in_batch=count)
                    group.ran(index, inputs.get(group.cache_name))
                if action == "prefix":
                    continue
                loss = _loss(outputs)
                joined = group.with_gradients(index, loss)
                found = {"the loss": loss, **gradients(model, joined, also=group.leaves(index))}
                group.went_back(index)
                totals = {name: totals[name] + t if name in totals else t for name, t in found.items()}
    return totals


def _loss(outputs: Any) -> Tensor:
    loss = getattr(outputs, "loss", None)
    if not isinstance(loss, Tensor):
        raise _CannotLook("the model returns no loss")
    return loss
