"""Multiple choice by the likelihood of the answers themselves, which small and early models can be told apart by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from .options import refuse_idle
from .probes import probing_model

Normalise = Literal["none", "chars", "tokens", "unconditional"]
_WAYS = ("none", "chars", "tokens", "unconditional")
_PROMPT = "Answer:"


def cloze_choices(
    model: torch.nn.Module,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    normalise: Normalise = "chars",
    *,
    unconditional_prompt: str = _PROMPT,
    batch_size: int = 32,
) -> list[int]:
    """
    Return which choice of each row a model finds likeliest; of equal ones the first.

    Formula: `log p(choice | prompt)`, summed over the tokens of the choice, and divided by its characters, by its
    tokens, or less `log p(choice | unconditional prompt)`.

    Args:
        model: A causal language model; called in evaluation mode, without gradients, as `model(input_ids=...,
            attention_mask=...).logits`. Its modes are put back.
        tokenizer: Called as `tokenizer(text, add_special_tokens=...)["input_ids"]`. A prompt has its special tokens, a
            choice has none.
        rows (`Sequence[Mapping]`): `prompt`, and `choices`, at least 2. A choice brings the blank that stands before
            it: `" Paris"`. Scored by letters, choices are `" A"`, `" B"`, ... and the prompt lists the answers.
        normalise (`str`, *optional*, defaults to `"chars"`): `"none"`, `"chars"`, `"tokens"` or `"unconditional"`.
        unconditional_prompt (`str`, *optional*, defaults to `"Answer:"`): What stands before a choice that is scored
            alone; acts with `"unconditional"`.
        batch_size (`int`, *optional*, defaults to 32): Sequences of one forward, at least 1.

    Raises:
        ValueError: an argument out of range, a row without prompt or choices, or a text without tokens.
    """
    if normalise not in _WAYS:
        raise ValueError(f"normalise={normalise!r} is not one of {', '.join(map(repr, _WAYS))}.")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r} must be a whole number of at least 1.")
    alone = normalise == "unconditional"
    refuse_idle("unconditional_prompt", unconditional_prompt, _PROMPT, alone, "with normalise='unconditional'")
    pairs: list[tuple[list[int], list[int]]] = []
    for number, row in enumerate(rows):
        prompt, choices = row.get("prompt"), row.get("choices")
        if not isinstance(prompt, str) or not isinstance(choices, Sequence) or len(choices) < 2:
            raise ValueError(f"Row {number} needs a prompt (text) and at least 2 choices, it has {str(row)[:120]}.")
        pairs += [(_ids(tokenizer, prompt, True), _ids(tokenizer, choice, False)) for choice in choices]
    texts = [choice for row in rows for choice in row["choices"]]
    scores = _scores(model, pairs, batch_size)
    if alone:
        start = _ids(tokenizer, unconditional_prompt, True)
        base = _scores(model, [(start, choice) for _, choice in pairs], batch_size)
        scores = [score - less for score, less in zip(scores, base, strict=True)]
    elif normalise == "chars":
        scores = [score / len(text) for score, text in zip(scores, texts, strict=True)]
    elif normalise == "tokens":
        scores = [score / len(choice) for score, (_, choice) in zip(scores, pairs, strict=True)]
    found, place = [], 0
    for row in rows:
        own = scores[place : place + len(row["choices"])]
        found.append(own.index(max(own)))
        place += len(own)
    return found


def cloze_accuracy(
    model: torch.nn.Module,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    normalise: Normalise = "chars",
    *,
    unconditional_prompt: str = _PROMPT,
    batch_size: int = 32,
) -> float:
    """
    Return the share of rows whose likeliest choice is the right one.

    Args:
        model, tokenizer, normalise, unconditional_prompt, batch_size: As in [`cloze_choices`].
        rows (`Sequence[Mapping]`): `prompt`, `choices`, and `answer`, the place of the right one from 0.

    Raises:
        ValueError: as [`cloze_choices`]; no rows, or an answer that is no place of a choice.
    """
    if not rows:
        raise ValueError("There are no rows to be right about. Pass at least one.")
    for number, row in enumerate(rows):
        answer = row.get("answer")
        if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(row.get("choices", ())):
            raise ValueError(f"Row {number} has answer={answer!r}, which is no place of its choices, counted from 0.")
    chosen = cloze_choices(
        model, tokenizer, rows, normalise, unconditional_prompt=unconditional_prompt, batch_size=batch_size
    )
    return sum(one == row["answer"] for one, row in zip(chosen, rows, strict=True)) / len(rows)


def _ids(tokenizer: Any, text: Any, special: bool) -> list[int]:
    if not isinstance(text, str) or not text:
        raise ValueError(f"{text!r} must be a text that is not empty.")
    ids = [int(one) for one in tokenizer(text, add_special_tokens=special)["input_ids"]]
    if not ids:
        raise ValueError(f"The tokenizer makes no token of {text!r}, so that nothing can be scored.")
    return ids


@torch.no_grad()
def _scores(model: torch.nn.Module, pairs: Sequence[tuple[list[int], list[int]]], batch_size: int) -> list[float]:
    """Return `log p(second | first)` of each pair of token lists."""
    device = next(model.parameters()).device
    modes = [(module, module.training) for module in model.modules()]
    found: list[float] = []
    model.eval()
    try:
        with probing_model(model):
            for start in range(0, len(pairs), batch_size):
                found += _batch(model, pairs[start : start + batch_size], device)
    finally:
        for module, mode in modes:
            module.training = mode
    return found


def _batch(model: torch.nn.Module, pairs: Sequence[tuple[list[int], list[int]]], device: torch.device) -> list[float]:
    longest = max(len(prompt) + len(choice) for prompt, choice in pairs)
    ids = torch.zeros(len(pairs), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, (prompt, choice) in enumerate(pairs):
        whole = torch.tensor([*prompt, *choice])
        ids[i, : len(whole)], mask[i, : len(whole)] = whole, 1  # padding stands behind, where no token looks
    logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
    scores = []
    for i, (prompt, choice) in enumerate(pairs):
        first = len(prompt)
        rows = logits[i, first - 1 : first + len(choice) - 1].float().log_softmax(-1)
        scores.append(float(rows.gather(1, ids[i, first : first + len(choice), None].to(device)).sum()))
    return scores
