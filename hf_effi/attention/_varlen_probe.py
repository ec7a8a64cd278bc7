"""
What a model computes under `hf_effi_varlen` against its own attention, asked once, when it makes its first masks.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import PreTrainedModel

from ..patching import Finding, call, compare, is_sharded, output_of, probing, tiny_tokens

#: field of the model config with one entry per layer: the arguments of an `AttentionPattern`, or `None` for full
#: attention
PATTERNS_FIELD = "hf_effi_attention_patterns"
#: How the rows of a call are laid out: single ones, several documents in a row, or rows with padding.
Layout = Literal["plain", "packed", "padded"]
_LENGTHS = (5, 7, 4)
_found: weakref.WeakKeyDictionary[nn.Module, dict[Layout, Finding]] = weakref.WeakKeyDictionary()


def running_model() -> nn.Module | None:
    """Return the model of transformers whose forward is running: an attention function is told of its layer only."""
    frame, found = sys._getframe(1), None
    while frame is not None:
        owner = frame.f_locals.get("self") if "self" in frame.f_code.co_varnames else None
        if isinstance(owner, PreTrainedModel):
            found = owner
        frame = frame.f_back
    return found


def packs_documents() -> bool:
    """
    Return whether the model whose forward is running was given positions that begin again within a row, or
    `cu_seq_lens`.

    Its attention need not be told: some layers hand on nothing, and some do without positions.
    """
    frame = sys._getframe(1)
    while frame is not None:
        names = frame.f_locals if isinstance(frame.f_locals.get("self"), PreTrainedModel) else {}
        given = {**(names.get("kwargs") or {}), **names}
        if given.get("cu_seq_lens_q") is not None:
            return True
        positions = given.get("position_ids")
        if isinstance(positions, Tensor) and positions.shape[-1] > 1:
            return bool((positions.diff(dim=-1) < 0).any())
        frame = frame.f_back
    return False


def ask(model: nn.Module | None, layout: Layout, name: str) -> Finding | None:
    """
    Measure, the first time, whether a model gives the same under attention `name` as under its own; `None`: unknown
    model.

    Args:
        model (`nn.Module`, *optional*): The model whose forward is running.
        layout (`str`): Of the rows.
        name (`str`): The attention implementation.
    """
    if model is None or probing():
        return None
    known = _found.setdefault(model, {})
    if layout not in known:
        # Inside of a forward: what watches its operations, such as selective checkpointing, is not to see these.
        with _disable_current_modes():
            known[layout] = _ask(model, layout, name)
    return known[layout]


def _ask(model: nn.Module, layout: Layout, name: str) -> Finding:
    if is_sharded(model):
        return Finding(None, reason="the weights are sharded, and their forward is running")

    def stock(model: nn.Module) -> Tensor:
        _without_patterns(model)
        _set_implementation(model, name, "sdpa" if getattr(model, "_supports_sdpa", False) else "eager")
        return _rows_alone(model) if layout == "packed" else _forward(model, layout)

    def ours(model: nn.Module) -> Tensor:
        _without_patterns(model)
        return _forward(model, layout)

    return compare(model, stock, ours, with_graph=False)


def _set_implementation(model: nn.Module, before: str, after: str) -> None:
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) == before:
            vars(config)["_attn_implementation_internal"] = after


def _without_patterns(model: nn.Module) -> None:
    """Patterns are there to give something else."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, PATTERNS_FIELD, None):
            vars(config)[PATTERNS_FIELD] = None


def _documents(model: nn.Module) -> list[Tensor]:
    tokens = tiny_tokens(model, len(_LENGTHS), max(_LENGTHS))
    return [row[None, :length] for row, length in zip(tokens, _LENGTHS, strict=True)]


def _rows_alone(model: nn.Module) -> Tensor:
    return torch.cat([output_of(call(model, row))[0] for row in _documents(model)])


def _forward(model: nn.Module, layout: Layout) -> Tensor:
    rows = _documents(model)
    if layout == "packed":
        positions = torch.cat([torch.arange(row.shape[1], device=row.device) for row in rows])[None]
        return output_of(call(model, torch.cat(rows, dim=1), position_ids=positions))[0]
    tokens = tiny_tokens(model, len(_LENGTHS), max(_LENGTHS))
    if layout == "plain":
        return output_of(call(model, tokens))
    lengths = torch.tensor(_LENGTHS, device=tokens.device)[:, None]
    real = torch.arange(max(_LENGTHS), device=tokens.device) >= max(_LENGTHS) - lengths
    return output_of(call(model, tokens, real.long()))[real]


def problem_of(finding: Finding | None, layout: Layout) -> str | None:
    """Return what a finding says against a call, or `None`."""
    if finding is None or finding.equal:
        return None
    what = {"plain": "rows", "packed": "documents that share a row", "padded": "rows with padding"}[layout]
    return f"does not give what its own attention gives for {what}: {finding}"


def forget(model: Any) -> None:
    """Ask again at the next forward."""
    _found.pop(model, None)
