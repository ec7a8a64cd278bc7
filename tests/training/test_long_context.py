"""A longer rotary base and sparse layers, through `Trainer.train()` beyond the model's old length."""

from __future__ import annotations

from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from hf_effi.attention.varlen import (
    PATTERNS_FIELD,
    VARLEN_ATTENTION,
    register_varlen_attention,
    set_attention_patterns,
)
from hf_effi.recipes.long_context import LongContextStage, extend_rope, lambda_patterns, longgen_patterns
from tests.helpers import compare_runs, lm_dataset, tiny_llama

OLD, NEW = 16, 64


def train(folder, patterns=None, extended=True):
    tiny_llama(num_hidden_layers=3, max_position_embeddings=OLD).save_pretrained(folder)
    config = LlamaForCausalLM.config_class.from_pretrained(folder)
    config = extend_rope(config, NEW) if extended else config
    model = LlamaForCausalLM.from_pretrained(folder, config=config, attn_implementation=register_varlen_attention())
    if patterns:
        set_attention_patterns(model, patterns)
    stage = LongContextStage(
        NEW, config.rope_parameters["rope_theta"], steps=2, tokens_per_step=2 * NEW, learning_rate=1e-2
    )
    args = TrainingArguments(
        str(folder),
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        **stage.training_arguments(devices=1),
    )
    trainer = Trainer(model, args, train_dataset=lm_dataset(8, length=NEW))
    trainer.train()
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_longer_base_trains_beyond_the_old_length(tmp_path):
    longer, same = train(tmp_path), train(tmp_path, extended=False)
    assert longer.model.config.max_position_embeddings == NEW
    assert longer.state.global_step == 2 and losses(longer)[0] != losses(same)[0]


def test_patterns_train_and_full_windows_change_nothing(tmp_path):
    full = train(tmp_path)
    compare_runs(full, train(tmp_path, longgen_patterns(3, window=NEW)))
    hybrid = train(tmp_path, longgen_patterns(3, window=4, sink=1))
    both_sparse = train(tmp_path, lambda_patterns(3, window=4, sink=1))
    assert len({losses(run)[0] for run in (full, hybrid, both_sparse)}) == 3
    assert getattr(hybrid.model.config, PATTERNS_FIELD)[1] is None
    assert hybrid.model.config._attn_implementation == VARLEN_ATTENTION
