"""
What the loaded model itself says about exact savings: does a row give the same alone, unpadded, and in other company?
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...attention.shared_prefix import rows_to_compare
from ...attention.switch import switched_attention
from ...attention.varlen_masks import LEDGER
from ...functional.shared_prefix import plan_shared_prefix
from ...patching import (
    Finding,
    Results,
    agreed,
    compare,
    draws_random_numbers,
    gradients,
    length_dependent_positions,
    looking,
    moved_in_padding,
    rows_see_each_other,
    tiny_tokens,
    tiny_tokens_or_none,
)
from .packed import FlatRows, flat_scores

#: Layer types whose state runs over padding columns; they only name what was measured.
_RECURRENT_LAYERS = ("linear_attention", "mamba", "mamba2", "recurrent", "conv")


def measured_reasons(
    model: nn.Module, names: tuple[str, ...], longest: int | None, pad_token_id: int
) -> dict[str, str]:
    """
    Measure which savings would change what a model computes, and return the reasons by name; exact ones are absent.

    All run through TRL's own forward, its fused head and adapters included. Every rank asks the same questions and
    gets the same answers.

    Args:
        model (`nn.Module`): The unwrapped policy.
        names (`tuple[str, ...]`): The savings in question, of `EXACT_SAVINGS`.
        longest (`int`, *optional*): The longest row of the run, where that is known.
        pad_token_id (`int`): The tokenizer's.
    """
    reasons: dict[str, str] = {}

    def ask(finding: Finding, affected: tuple[str, ...], text: str) -> None:
        if not (found := agreed(finding)).equal:
            for name in affected:
                reasons.setdefault(name, f"{text}: {found}.")

    def open_ones(*affected: str) -> tuple[str, ...]:
        return tuple(name for name in affected if name in names and name not in reasons)

    if affected := open_ones("trim", "sort", "skip", "pack", "share"):
        text = "the model draws random numbers in training, other ones for other rows and widths"
        found = draws_random_numbers(model, _some_log_probs)
        ask(found, affected, f"{text} (set disable_dropout=True where it is dropout)")
    if affected := open_ones("trim", "sort", "skip", "pack", "share"):
        ask(rows_see_each_other(model, log_probs_by_token), affected, "the result of a row depends on the other rows")
    if affected := open_ones("trim", "pack", "share"):
        text = named_positions(model) or "the result of a row depends on its place in the padding"
        ask(moved_in_padding(model, log_probs_by_token, pad_token_id), affected, text)
    if affected := open_ones("trim", "pack", "share"):
        text = "the model's positions depend on the length of a call, which trimming changes"
        ask(length_dependent_positions(model, longest), affected, text)
    flat = flat_reasons(model, open_ones("pack", "share"))
    return {**flat, **reasons}


def flat_reasons(model: nn.Module, names: tuple[str, ...]) -> dict[str, str]:
    """
    Measure whether rows may stand end to end, and share a prompt there; return the reasons against it by name.

    Args:
        model (`nn.Module`): With TRL's fused head.
        names (`tuple[str, ...]`): `pack`, `share`, both or none.
    """
    reasons: dict[str, str] = {}
    if "share" in names and not (found := agreed(in_one_row(model, share=True))).equal:
        reasons["share"] = f"rows that share a prompt in one sequence differ: {found}."
    # Rows that shared a prompt stood end to end as well.
    if "pack" in names and ("share" not in names or "share" in reasons):
        if not (found := agreed(in_one_row(model, share=False))).equal:
            reasons["pack"] = f"rows that stand end to end in one sequence differ: {found}."
    return reasons


def in_one_row(model: nn.Module, share: bool) -> Finding:
    """
    Compare rows one by one, under the attention that the model has, with one flat row under `hf_effi_varlen`.

    Args:
        model (`nn.Module`): With TRL's fused head.
        share (`bool`): Whether a prompt of two of the rows comes once.
    """
    if isinstance(tokens := tiny_tokens_or_none(model, 1, 1), Finding):
        return tokens  # no vocabulary
    rows = FlatRows(*map(list, zip(*rows_to_compare(model), strict=True)))
    layout = plan_shared_prefix(rows.prompts, [len(completion) for completion in rows.completions], share)

    def alone(model: nn.Module) -> Results:
        scores = []
        for prompt, completion in zip(rows.prompts, rows.completions, strict=True):
            row = torch.tensor([prompt + completion], device=tokens.device)
            scores.append(log_probs_by_token(model, row, torch.ones_like(row))[0, len(prompt) - 1 : -1])
        return with_gradients(model, torch.cat(scores))

    def flat(model: nn.Module) -> Results:
        with switched_attention(model):
            log_probs, _ = flat_scores(model, layout, rows, tokens.device)
        index = layout.completion_index().to(log_probs.device)
        return with_gradients(model, torch.cat([log_probs[where[where >= 0]] for where in index]))

    return compare(model, alone, flat)


def with_gradients(model: nn.Module, scores: Tensor) -> Results:
    """Return scores, and what a loss of them gives to the weights."""
    return {"the log-probs": scores, **gradients(model, scores)}


def shortest_window(model: nn.Module) -> int | None:
    """Return the shortest window among the masks of a forward over a few tokens; `None` where there is none."""
    with looking(model, None, training=False, with_graph=False), switched_attention(model):
        _some_log_probs(model)
        return LEDGER.reach()


def log_probs_by_token(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """
    Return the log-prob of each next token `(rows, columns)` as TRL's trainer asks for them; 0 where there is none.
    """
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    outputs = model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, fused_lm_head=True)
    return F.pad(outputs.log_probs, (0, 1))


def _some_log_probs(model: nn.Module) -> Tensor:
    tokens = tiny_tokens(model, 2, 12)
    return log_probs_by_token(model, tokens, torch.ones_like(tokens))


def named_positions(model: nn.Module) -> str | None:
    """Say what it is that moves with the padding, where the config or a table of positions tells."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    kinds = {str(kind) for kind in getattr(text, "layer_types", None) or ()}
    if kinds & set(_RECURRENT_LAYERS):
        return f"the model has recurrent layers ({', '.join(sorted(kinds & set(_RECURRENT_LAYERS)))})"
    table = position_table(model)
    return table and f"the model has learned absolute positions ({table}), which TRL counts over left padding"


def position_table(model: nn.Module) -> str | None:
    """Return the name of the embedding table that has one row for each position, or `None`."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and module.num_embeddings != getattr(config, "vocab_size", None):
            # OPT keeps two extra rows for padding.
            if positions is not None and 0 <= module.num_embeddings - positions <= 2:
                return name
    return None
