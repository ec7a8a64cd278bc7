"""The distributions that `generate` samples from, computed again in one forward, and what rules that out."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ...errors import RefusedError
from ...patching import (
    agreed,
    draws_random_numbers,
    length_dependent_positions,
    moved_in_padding,
    rows_see_each_other,
    tiny_tokens,
)
from .host import Host

#: fields of a `GenerationConfig` that are reproduced, or that do not change what a token is drawn from
_KNOWN = frozenset(
    "temperature top_k top_p min_p max_new_tokens max_length pad_token_id bos_token_id eos_token_id "
    "decoder_start_token_id use_cache cache_implementation cache_config max_cache_len disable_compile compile_config "
    "output_attentions output_hidden_states output_scores output_logits return_dict_in_generate renormalize_logits "
    "length_penalty early_stopping transformers_version prefill_chunk_size".split()
)
#: the values of other fields with which they do nothing
_NEUTRAL: dict[str, Any] = {
    "do_sample": True,
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1,
    "encoder_repetition_penalty": 1,
    "typical_p": 1,
    "guidance_scale": 1,
    "min_length": 0,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
}


def sampling_config(host: Host) -> GenerationConfig:
    """Return what TRL hands to `generate`, with what the model's own config adds where TRL leaves a field open."""
    config = copy.deepcopy(host.generation_config)
    own = getattr(host.accelerator.unwrap_model(host.model), "generation_config", None)
    for name, value in (own.to_dict() if own is not None else {}).items():
        if getattr(config, name, None) is None and not name.startswith("_"):
            setattr(config, name, value)
    return config


def check_sampling(host: Host) -> None:
    """
    Refuse settings of sampling that one forward cannot reproduce.

    Raises:
        RefusedError: the field, its value and what it has to be.
    """
    config = sampling_config(host)
    own = {"max_new_tokens": host.max_completion_length, "eos_token_id": host.eos_token_ids}
    for name, wanted in own.items():
        if getattr(config, name) != wanted:
            raise RefusedError(
                f"rollout_reuse needs completions that end where TRL looks for their end: {name} must be {wanted!r}, "
                f"generation_kwargs make it {getattr(config, name)!r}. Leave it out there, or drop rollout_reuse."
            )
    for name, value in vars(config).items():
        if name in _KNOWN or name.startswith("_") or value is None:
            continue
        if name in _NEUTRAL and value == _NEUTRAL[name] or name not in _NEUTRAL and value is False:
            continue
        if name.startswith(("assistant_", "num_assistant", "target_lookbehind", "max_matching")):
            continue  # of an assistant, which TRL does not pass
        fix = f"set it to {_NEUTRAL[name]!r}" if name in _NEUTRAL else "leave it out"
        raise RefusedError(
            "rollout_reuse computes anew what was sampled from, with temperature, top_k, top_p and min_p. "
            f"{name}={value!r} changes that: {fix}, or drop rollout_reuse."
        )


def sampling_warpers(host: Host) -> LogitsProcessorList:
    """Return transformers' own processors, in the order of `generate`."""
    config = sampling_config(host)
    warpers = LogitsProcessorList()
    if config.temperature not in (None, 1.0):
        warpers.append(TemperatureLogitsWarper(config.temperature))
    if config.top_k:
        warpers.append(TopKLogitsWarper(config.top_k))
    if config.top_p is not None and config.top_p < 1.0:
        warpers.append(TopPLogitsWarper(config.top_p))
    if config.min_p is not None:
        warpers.append(MinPLogitsWarper(config.min_p))
    return warpers


def logits_of(
    policy: nn.Module,
    unwrapped: nn.Module,
    rows: Sequence[tuple[list[int], list[int]]],
    pad_token_id: int,
    device: Any,
) -> Tensor:
    """
    Return the logits at each completion token, shape `(rows, longest completion, vocabulary)`.

    Args:
        policy (`nn.Module`): What is called, wrapped or not.
        unwrapped (`nn.Module`): The same without its wrapper, which knows its arguments.
        rows (`Sequence`): Prompt and completion of each.
    """
    left, right = max(len(prompt) for prompt, _ in rows), max(len(tokens) for _, tokens in rows)
    ids = torch.full((len(rows), left + right), pad_token_id)
    mask = torch.zeros_like(ids)
    for i, (prompt, tokens) in enumerate(rows):
        place = slice(left - len(prompt), left + len(tokens))
        ids[i, place], mask[i, place] = torch.tensor(prompt + tokens), 1
    fewer = {"logits_to_keep": right + 1} if _takes(unwrapped, "logits_to_keep") else {}
    logits = _forward(policy, unwrapped, ids.to(device), mask.to(device), **fewer)
    return logits[:, -right - 1 : -1]


def check_model(host: Host) -> None:
    """
    Measure on the loaded model that one padded forward gives what `generate` draws from. Every rank asks.

    Raises:
        RefusedError: what differs, with the measured difference.
    """
    model, pad = host.accelerator.unwrap_model(host.model), host._tokenizer.pad_token_id
    questions = {
        "the model draws random numbers in training (set disable_dropout=True where it is dropout)": (
            lambda: draws_random_numbers(model, _some_logits)
        ),
        "the result of a row depends on the other rows": lambda: rows_see_each_other(model, _as_generated),
        "the result of a row depends on its padding": lambda: moved_in_padding(model, _as_generated, pad),
        "the model's positions depend on the length of a call": lambda: length_dependent_positions(model, None),
    }
    for text, ask in questions.items():
        if not (found := agreed(ask())).equal:
            raise RefusedError(
                f"rollout_reuse needs one forward to give what completions were sampled from: {text}: {found}. Drop "
                "rollout_reuse, or use another model."
            )


def _as_generated(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    return _forward(model, model, input_ids, attention_mask)


def _some_logits(model: nn.Module) -> Tensor:
    tokens = tiny_tokens(model, 2, 12)
    return _as_generated(model, tokens, torch.ones_like(tokens))


def _forward(policy: nn.Module, unwrapped: nn.Module, ids: Tensor, mask: Tensor, **more: Any) -> Tensor:
    """A forward with the positions that `generate` gives: padding has none."""
    if _takes(unwrapped, "position_ids"):
        more["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
    return policy(input_ids=ids, attention_mask=mask, use_cache=False, **more).logits


def _takes(model: Any, name: str) -> bool:
    # An adapter passes on whatever it is given to the model below.
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    return name in inspect.signature(model.forward).parameters
