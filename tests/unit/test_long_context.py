"""RoPE bases and long-context recipes: configs that transformers reads, and errors by name."""

from __future__ import annotations

import pytest
import torch
from transformers import Gemma3TextConfig, GPT2Config, LlamaConfig, LlamaForCausalLM, TrainingArguments
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from hf_effi.functional.rope import extended_rope_base
from hf_effi.functional.segment_attention import AttentionPattern
from hf_effi.recipes.long_context import (
    LongContextStage,
    extend_rope,
    lambda_patterns,
    longgen_patterns,
    prolong_stages,
)
from tests.helpers import tiny_llama

SMALL = LlamaConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=64
)


@pytest.mark.parametrize("factor", [2, 8, 100.5])
def test_the_slowest_rotation_ends_where_it_ended(factor):
    """theta'^(-(d-2)/d) * factor = theta^(-(d-2)/d): the definition of the rule."""
    dim, base = 128, 10_000
    slowest = base ** (-(dim - 2) / dim)
    assert extended_rope_base(base, factor, dim) ** (-(dim - 2) / dim) * factor == pytest.approx(slowest)
    assert extended_rope_base(base, 1, dim) == base


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((10_000, 0.5, 8), "factor=0.5"),
        ((0, 2, 8), "base=0"),
        ((10_000, 2, 2), "rotary_dim=2"),
        ((10_000, 2, 7), "rotary_dim=7"),
    ],
)
def test_bad_arguments(arguments, word):
    with pytest.raises(ValueError, match=word):
        extended_rope_base(*arguments)


def test_a_model_from_the_config_rotates_by_the_new_base():
    config = extend_rope(SMALL, 256)
    assert SMALL.rope_parameters["rope_theta"] == 10_000, "the given config is left alone"
    assert config.max_position_embeddings == 256
    theta = config.rope_parameters["rope_theta"]
    assert theta == extended_rope_base(10_000, 4, 8)
    expected = theta ** -(torch.arange(0, 8, 2) / 8)
    assert torch.allclose(LlamaRotaryEmbedding(config).inv_freq, expected)
    assert extend_rope(SMALL, 256, theta=5e5).rope_parameters["rope_theta"] == 5e5


def test_the_new_base_survives_saving(tmp_path):
    model = LlamaForCausalLM(extend_rope(SMALL, 256))
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert again.config.rope_parameters == model.config.rope_parameters
    assert torch.equal(again.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)


def test_loading_weights_into_the_longer_config(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    config = extend_rope(LlamaConfig.from_pretrained(tmp_path), 1024)
    model = LlamaForCausalLM.from_pretrained(tmp_path, config=config)
    assert model.config.max_position_embeddings == 1024
    assert model.model.rotary_emb.inv_freq[-1] < tiny_llama().model.rotary_emb.inv_freq[-1]


def test_layer_types_with_their_own_bases():
    config = extend_rope(Gemma3TextConfig(max_position_embeddings=64), 128)
    assert config.rope_parameters["sliding_attention"]["rope_theta"] == 10_000
    assert config.rope_parameters["full_attention"]["rope_theta"] > 1_000_000


def test_partial_rotation_counts_its_own_dimensions():
    config = LlamaConfig(
        **{
            **SMALL.to_diff_dict(),
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        }
    )
    assert extend_rope(config, 128).rope_parameters["rope_theta"] == extended_rope_base(1e4, 2, 4)


@pytest.mark.parametrize(
    ("config", "length", "theta", "word"),
    [
        (GPT2Config(), 2048, None, "GPT2Config has no rope_parameters"),
        (SMALL, 64, None, "max_length=64 must be above the 64"),
        (SMALL, 128, 9e3, "theta=9000.0 must be above"),
        (
            LlamaConfig(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}),
            10**5,
            None,
            "rope_type='linear' already",
        ),
    ],
)
def test_what_cannot_be_extended_is_named(config, length, theta, word):
    with pytest.raises(ValueError, match=word):
        extend_rope(config, length, theta=theta)


def test_stages_give_arguments_that_a_trainer_takes(tmp_path):
    for stage in prolong_stages():
        arguments = stage.training_arguments(devices=16, sequence_parallel_size=8)
        args = TrainingArguments(str(tmp_path), use_cpu=True, **arguments)
        tokens = stage.max_length * 2 * args.gradient_accumulation_steps
        assert tokens == stage.tokens_per_step and args.max_steps == stage.steps
    with pytest.raises(ValueError, match="3 devices in groups of 1"):
        prolong_stages()[0].training_arguments(devices=3)
    with pytest.raises(ValueError, match="groups of 8"):
        prolong_stages()[0].training_arguments(devices=4, sequence_parallel_size=8)
    with pytest.raises(ValueError, match="no multiple"):
        LongContextStage(1024, 1e6, 1, 1024, 1e-5).training_arguments(devices=2)


def test_longgen_keeps_the_middle_full():
    patterns = longgen_patterns(32, window=8, sink=2)
    full = [index for index, pattern in enumerate(patterns) if pattern is None]
    assert full == list(range(10, 21))
    assert set(patterns) - {None} == {AttentionPattern(window=8, sink=2)}
    assert longgen_patterns(3, window=4, full_fraction=0) == [AttentionPattern(window=4)] * 3
    assert longgen_patterns(3, window=4, full_fraction=1) == [None] * 3
    assert longgen_patterns(1, window=4, stride=2, stride_block=8)[0].stride_block == 8
    with pytest.raises(ValueError, match="full_fraction=2"):
        longgen_patterns(3, window=4, full_fraction=2)


def test_lambda_mask_by_hand():
    (pattern,) = lambda_patterns(1, window=2, sink=1)
    assert pattern.mask(5).int().tolist()[4] == [1, 0, 0, 1, 1]
