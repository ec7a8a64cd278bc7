"""Packing and padding-free training on `hf_effi_varlen`, through SFTTrainer and GRPOTrainer."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import XGLMConfig, XGLMForCausalLM
from trl import GRPOTrainer, SFTConfig, SFTTrainer

from hf_effi import EffiTrainer, EffiTrainingArguments
from hf_effi.attention import varlen
from hf_effi.attention.varlen import VARLEN_ATTENTION, register_varlen_attention, set_attention_patterns
from hf_effi.callbacks.layer_modes import SelectiveCheckpointCallback
from hf_effi.errors import RefusedError
from hf_effi.functional.segment_attention import AttentionPattern
from hf_effi.patching import probing
from tests.helpers import grpo_args, run_grpo, sft_dataset, tiny_qwen3, tiny_tokenizer, weights_of

STEPS = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_steps": 1,
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "max_length": 48,
    "learning_rate": 1e-2,
}


def sft(folder, attention, *callbacks, patterns=None, **over):
    model = tiny_qwen3()
    model.set_attn_implementation(attention)
    if patterns:
        set_attention_patterns(model, patterns)
    args = SFTConfig(str(folder), **{"gradient_checkpointing": False, **STEPS, **over})
    trainer = SFTTrainer(
        model, args=args, train_dataset=sft_dataset(64), processing_class=tiny_tokenizer(), callbacks=list(callbacks)
    )
    trainer.train()
    return trainer


def assert_same_run(left, right, tolerance=2e-4):
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (left, right)]
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)
    mine = weights_of(right.model)
    for name, weight in weights_of(left.model).items():
        assert torch.allclose(weight, mine[name], atol=2e-3), name


@pytest.fixture(autouse=True)
def _registered():
    register_varlen_attention()


@pytest.fixture
def masks(monkeypatch):
    """What reaches the attention as a mask, and how many documents it finds."""
    seen = []

    def spy(module, query, key, value, attention_mask, **kwargs):
        bounds = kwargs.get("cu_seq_lens_q")
        if not probing():
            seen.append((attention_mask, 0 if bounds is None else len(bounds) - 1))
        return varlen.varlen_attention_forward(module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setitem(varlen.AttentionInterface._global_mapping, VARLEN_ATTENTION, spy)
    return seen


@pytest.mark.parametrize("over", [{"packing": True}, {"padding_free": True, "max_length": None}, {}], ids=str)
def test_sft_trains_as_with_sdpa(tmp_path, masks, over):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(packing|padding|attention).*")
        ours = sft(tmp_path, VARLEN_ATTENTION, **over)
    assert_same_run(sft(tmp_path, "sdpa", **over), ours)
    assert masks
    if over:  # no mask at all, and the collator's bounds of several documents
        assert all(mask is None and documents > 1 for mask, documents in masks)


def test_sft_packing_with_selective_checkpointing(tmp_path):
    plain = sft(tmp_path, VARLEN_ATTENTION, packing=True)
    selective = sft(
        tmp_path, VARLEN_ATTENTION, SelectiveCheckpointCallback(), packing=True, gradient_checkpointing=True
    )
    assert_same_run(plain, selective, tolerance=1e-6)


def test_sft_with_one_sparse_layer(tmp_path):
    full = sft(tmp_path, VARLEN_ATTENTION, packing=True)
    wide = sft(tmp_path, VARLEN_ATTENTION, packing=True, patterns=[AttentionPattern(window=10**6, sink=1), None])
    assert_same_run(full, wide, tolerance=1e-6)
    narrow = sft(tmp_path, VARLEN_ATTENTION, packing=True, patterns=[AttentionPattern(window=2, sink=1), None])
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (full, narrow)]
    assert all(abs(a - b) > 1e-4 for a, b in zip(*losses, strict=True))


def test_grpo_generates_and_trains_as_with_sdpa(tmp_path):
    def run(attention):
        model = tiny_qwen3(end_tokens=10)
        model.set_attn_implementation(attention)
        return run_grpo(GRPOTrainer, grpo_args(tmp_path, learning_rate=1e-4), model=model)

    assert_same_run(run("sdpa"), run(VARLEN_ATTENTION), tolerance=1e-2)


def test_a_class_that_computes_its_attention_itself_is_refused_by_our_trainers(tmp_path):
    register_varlen_attention()
    config = XGLMConfig(
        vocab_size=64, d_model=16, attention_heads=2, num_layers=2, ffn_dim=16, max_position_embeddings=32
    )
    model = XGLMForCausalLM(config)
    config._attn_implementation_internal = VARLEN_ATTENTION  # as loading with the name leaves it
    args = EffiTrainingArguments(tmp_path, use_cpu=True, report_to=[])
    with pytest.raises(
        RefusedError, match="XGLMForCausalLM was given hf_effi_varlen and computes its attention in its"
    ):
        EffiTrainer(model, args, train_dataset=sft_dataset(4))
