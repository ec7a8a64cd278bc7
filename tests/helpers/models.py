"""Tiny random causal language models in fp32, built from configs: no download, about 40 000 parameters each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from .tokenizer import CHARACTERS, EOS_ID, PAD_ID, SPECIAL_TOKENS, VOCAB_SIZE

# The default of 0.02 gives a uniform next-token distribution at this width: every entropy is log(vocab), every
# log-probability nearly equal, and a wrong gather or shift would not show.
_INIT_RANGE = 0.25

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": _INIT_RANGE,
    "tie_word_embeddings": False,
    "pad_token_id": PAD_ID,
    "eos_token_id": EOS_ID,
    "bos_token_id": None,
}


def _make(
    model_class: type[PreTrainedModel], config_class: type, settings: dict[str, Any], seed: int, end_tokens: int
) -> PreTrainedModel:
    config = config_class(**settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).to(torch.float32)
    ends = [EOS_ID, *range(len(SPECIAL_TOKENS), len(SPECIAL_TOKENS) + end_tokens)]
    if end_tokens > len(CHARACTERS):
        raise ValueError(f"end_tokens={end_tokens}: the tokenizer has only {len(CHARACTERS)} characters.")
    model.generation_config.pad_token_id = PAD_ID
    model.generation_config.eos_token_id = ends if end_tokens else EOS_ID
    return model


def tiny_qwen3(seed: int = 0, *, end_tokens: int = 0, **over: Any) -> PreTrainedModel:
    """
    Return a tiny Qwen3 (rotary positions, grouped-query attention, q/k norms).

    Args:
        seed (`int`, *optional*, defaults to 0):
            Seed of the weights. The global random state is left as it was.
        end_tokens (`int`, *optional*, defaults to 0):
            This many ordinary characters end a completion too, through `generation_config.eos_token_id`. A random
            model emits EOS about once in 100 tokens, so `end_tokens=10` gives the ragged lengths of a trained one.
        over:
            Fields of the config.
    """
    return _make(Qwen3ForCausalLM, Qwen3Config, {**_COMMON, **over}, seed, end_tokens)


def tiny_llama(seed: int = 0, *, end_tokens: int = 0, **over: Any) -> PreTrainedModel:
    """Return a tiny Llama; arguments as in [`tiny_qwen3`]."""
    return _make(LlamaForCausalLM, LlamaConfig, {**_COMMON, **over}, seed, end_tokens)


def tiny_mistral(seed: int = 0, *, end_tokens: int = 0, **over: Any) -> PreTrainedModel:
    """Return a tiny Mistral (sliding-window attention); arguments as in [`tiny_qwen3`]."""
    return _make(MistralForCausalLM, MistralConfig, {**_COMMON, "sliding_window": 16, **over}, seed, end_tokens)


def tiny_gemma(seed: int = 0, *, end_tokens: int = 0, **over: Any) -> PreTrainedModel:
    """Return a tiny Gemma 2 (soft-capped logits, alternating sliding window, `(1 + weight)` norms)."""
    settings = {**_COMMON, "sliding_window": 16, "query_pre_attn_scalar": 8, "attn_implementation": "eager", **over}
    return _make(Gemma2ForCausalLM, Gemma2Config, settings, seed, end_tokens)


def tiny_gpt2(seed: int = 0, *, end_tokens: int = 0, **over: Any) -> PreTrainedModel:
    """Return a tiny GPT-2: learned absolute positions, so that a wrong `position_ids` shows; no dropout."""
    settings = {
        "vocab_size": VOCAB_SIZE,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 256,
        "initializer_range": _INIT_RANGE,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "pad_token_id": PAD_ID,
        "eos_token_id": EOS_ID,
        "bos_token_id": None,
        **over,
    }
    return _make(GPT2LMHeadModel, GPT2Config, settings, seed, end_tokens)


def save_tiny(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: str | Path) -> str:
    """Save both into `directory` and return it as a string: what a trainer takes as a model name, fully offline."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)
