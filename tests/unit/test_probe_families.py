"""
The right answer for twelve model families, question by question; where a plain forward can show it, it is asked as
well.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from hf_effi.attention import _varlen_probe, register_varlen_attention
from hf_effi.attention.shared_prefix import check_shared_prefix
from hf_effi.errors import RefusedError
from hf_effi.kernels import tile_mlp
from hf_effi.memory import stream_layers
from hf_effi.memory.chunk_probe import chunks_are_exact
from hf_effi.patching import (
    draws_random_numbers,
    length_dependent_positions,
    longest_exact_call,
    moved_in_padding,
    rows_see_each_other,
)
from tests.helpers.odd_models import picture

_VOCABULARY = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA = {
    **_VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.25,
}
_OPT = {"ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32, "init_std": 0.25}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
_LONG = {
    "original_max_position_embeddings": 32,
    "max_position_embeddings": 128,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 32,
    },
}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _LLAMA),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
    "initializer_range": 0.25}),
    "opt": ("OPTForCausalLM", "OPTConfig", {"hidden_size": 32, "max_position_embeddings": 64, **_OPT}),
    "mamba": ("MambaForCausalLM", "MambaConfig", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {**_LLAMA, **_LONG}),
    "llama4": ("Llama4ForCausalLM", "Llama4TextConfig", {**_LLAMA, "num_local_experts": 2, "intermediate_size_mlp": 64,
    "attention_chunk_size": 32}),
    "bloom": ("BloomForCausalLM", "BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4,
    "initializer_range": 0.25}),
    "nemotron": ("NemotronForCausalLM", "NemotronConfig", {**_LLAMA, "hidden_act": "relu2"}),
    "seed_oss": ("SeedOssForCausalLM", "SeedOssConfig", _LLAMA),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**_LLAMA, "query_pre_attn_scalar": 8, "sliding_window": 32}),
    "t5": ("T5ForConditionalGeneration", "T5Config", {**_T5, "dropout_rate": 0.0}),
    "t5 with dropout": ("T5ForConditionalGeneration", "T5Config", _T5),
}  # fmt: skip
#: families whose answer is not "equal"
DIFFERENT: dict[str, set[str]] = {
    "chance": {"gpt2", "opt", "seed_oss", "t5 with dropout"},
    "other rows": set(),
    "padding": {"gpt2", "t5", "t5 with dropout"},
    "length": {"phi3"},
    "chunks": {"opt", "bloom"},
    "chunks of packed rows": {"opt", "bloom"},
    "chunks of rows padded on the left": {"gpt2", "opt", "bloom"},
}
#: no keys and values that a chunk could be given, or another loss than one of next tokens
NOT_IN_CHUNKS = {"mamba", "t5", "t5 with dropout"}
ASK = {
    "chance": draws_random_numbers,
    "other rows": rows_see_each_other,
    "padding": moved_in_padding,
    "length": length_dependent_positions,
    "chunks": chunks_are_exact,
    "chunks of packed rows": lambda model: chunks_are_exact(model, "packed"),
    "chunks of rows padded on the left": lambda model: chunks_are_exact(model, "padded on the left"),
}


def make(family: str, **over: Any) -> PreTrainedModel:
    name, config, settings = FAMILIES[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, name)(getattr(transformers, config)(**{**_VOCABULARY, **settings, **over}))


@pytest.mark.parametrize("question", ASK)
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, question):
    model = make(family)
    before = picture(model)
    found = ASK[question](model)
    assert picture(model) == before
    if "chunks" in question and family in NOT_IN_CHUNKS:
        assert not found.looked and found.reason
        return
    assert found.looked, str(found)
    assert found.equal == (family not in DIFFERENT[question]), str(found)
    assert found.equal or found.gap > 1e-3


# --- the same, without a probe ---------------------------------------------------------------------------------------


def _plain(family: str) -> nn.Module:
    """In evaluation mode, where dropout of the configs does not matter; Bloom gives NaN in double precision."""
    return make(family).eval()


@torch.no_grad()
def _logits(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, attention_mask=mask, use_cache=False, **decoder).logits


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).abs().max() / one.abs().max()).item()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_forward_says_the_same_of_padding_and_rows(family):
    model, ids = _plain(family), torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    alone = _logits(model, ids[:1], torch.ones(1, 9, dtype=torch.long))[0]
    together = _logits(model, ids, torch.ones(2, 9, dtype=torch.long))[0]
    assert (_apart(alone, together) < 1e-4) == (family not in DIFFERENT["other rows"])
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids[:1]], dim=1)
    mask = (padded != 0).long()
    assert (_apart(alone, _logits(model, padded, mask)[0, 4:]) < 1e-4) == (family not in DIFFERENT["padding"])


@pytest.mark.parametrize("family", FAMILIES)
def test_two_seeds_say_the_same_of_chance(family):
    model, ids, results = make(family).train(), torch.arange(3, 21)[None], []
    for seed in range(3):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            results.append(_logits(model, ids))
    assert all(torch.equal(results[0], other) for other in results) == (family not in DIFFERENT["chance"])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_long_call_says_the_same_of_positions(family):
    """The logits of the first tokens of a causal model, in a call within and in one beyond the length of before."""
    if FAMILIES[family][0].startswith("T5"):
        return  # its encoder sees what follows
    model, ids = _plain(family), torch.randint(3, 64, (1, 60), generator=torch.Generator().manual_seed(1))
    same = _apart(_logits(model, ids[:, :20]), _logits(model, ids)[:, :20]) < 1e-4
    assert same == (family not in DIFFERENT["length"])


def test_the_longest_exact_call_of_long_rope_is_its_first_length():
    assert longest_exact_call(make("phi3")) == 32
    assert longest_exact_call(make("llama")) is None


# --- what is refused, and what the message says ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "layout", "answer"),
    [
        *(("llama", layout, "equal") for layout in ("plain", "packed", "padded")),
        ("gemma3", "packed", "equal"),
        ("nemotron", "padded", "equal"),
        ("mamba", "packed", "the results: a relative difference"),
        ("bloom", "packed", "the results: a relative difference"),
        ("llama4", "packed", "whose mask of 32 tokens is neither causal, nor a sliding window"),
        ("seed_oss", "plain", "hf_effi_varlen has no dropout, got 0.1"),
        ("t5", "plain", "does not read position_bias"),
    ],
)
def test_varlen_attention(family, layout, answer):
    model, name = make(family), register_varlen_attention()
    model.set_attn_implementation(name)
    before = picture(model)
    with torch.no_grad():
        found = _varlen_probe._ask(model, layout, name)
    assert picture(model) == before
    assert found.equal == (answer == "equal") and (found.equal or answer in str(found)), str(found)


@pytest.mark.parametrize(
    ("family", "over", "message"),
    [
        ("llama", {}, None),
        ("gemma3", {}, None),
        ("phi3", {}, None),
        ("nemotron", {}, "does not give the results of separate rows where they share a prompt: the "),
        ("llama4", {"attention_chunk_size": 4}, "whose mask of 4 tokens is neither causal"),
        ("opt", {}, "Completions of a prompt would share its random numbers: .*bernoulli_"),
        ("bloom", {}, "not a transformers model that hands the arguments of a call to its attention"),
    ],
)
def test_shared_prefix(family, over, message):
    model = make(family, **over)
    model.set_attn_implementation(register_varlen_attention())
    if message is None:
        assert check_shared_prefix(model) is None
        return
    with pytest.raises(RefusedError, match=message):
        check_shared_prefix(model)


@pytest.mark.parametrize(
    ("change", "family", "message"),
    [
        (stream_layers, "llama", None),
        (stream_layers, "nemotron", None),
        (stream_layers, "gemma3", None),
        (stream_layers, "opt", "the layers draw random numbers.*bernoulli_.*config.dropout"),
        (stream_layers, "seed_oss", "the layers draw random numbers.*dropout"),
        (stream_layers, "mamba", "has no decoder layer that can be streamed"),
        (tile_mlp, "llama", None),
        (tile_mlp, "gemma3", None),
        (tile_mlp, "seed_oss", r"does not compute down\(act\(gate\(x\)\) \* up\(x\)\) in training: the output"),
        (tile_mlp, "bloom", "has no gated MLP"),
    ],
)
def test_layers_and_mlps(change, family, message):
    model = make(family)
    before = picture(model)
    if message is None:
        change(model).revert()
    else:
        with pytest.raises(RefusedError, match=message):
            change(model)
    assert picture(model) == before
