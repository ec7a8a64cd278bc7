"""Shared prompts through `train()`: the losses and weights of padded rows, fewer tokens, exact resume."""

from __future__ import annotations

import functools

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from hf_effi import EffiTrainer, EffiTrainingArguments
from hf_effi.attention import register_varlen_attention
from hf_effi.data import SharedPrefixCollator, group_by_prompt
from hf_effi.errors import RefusedError
from tests.helpers import assert_bitwise_equal, compare_runs, record_run, tiny_llama, tiny_qwen3, tiny_tokenizer
from tests.helpers.prompts import answers, pad_answers
from tests.helpers.sampling import StopAt

COUNT = 20
SETTINGS = {
    "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
    "logging_steps": 1,
    "learning_rate": 5e-3, "max_steps": 5, "seed": 7, "per_device_train_batch_size": 2, "dataloader_pin_memory": False,
    "gradient_accumulation_steps": 2, "remove_unused_columns": False, "include_num_input_tokens_seen": "all",
}  # fmt: skip


def make(folder, shared, make_model=tiny_qwen3, cls=Trainer, arguments=TrainingArguments, callbacks=(), **over):
    """A run on 20 prompts: padded rows on SDPA, or shared prompts."""
    model = make_model()
    if shared:
        model.set_attn_implementation(register_varlen_attention())
    extra = {"processing_class": tiny_tokenizer()} if cls is SFTTrainer else {}
    rows = Dataset.from_list(answers(COUNT))
    args = arguments(str(folder), **{**SETTINGS, **over})
    collate = SharedPrefixCollator(model) if shared else pad_answers
    return cls(
        model, args, train_dataset=rows, eval_dataset=rows.select(range(4)), data_collator=collate,
        callbacks=list(callbacks), **extra,
    )  # fmt: skip


def run(*args, **kwargs):
    trainer = make(*args, **kwargs)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def padded_run(tmp_path_factory):
    """The run on padded rows, trained once for each kind of model and trainer."""
    return functools.cache(lambda *args: run(tmp_path_factory.mktemp("padded"), False, *args))


def series(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def assert_same_run(padded, shared):
    for key in ("loss", "grad_norm"):
        assert series(padded, key) == pytest.approx(series(shared, key), rel=2e-5), key
    state = shared.model.state_dict()
    for name, weight in padded.model.state_dict().items():
        torch.testing.assert_close(state[name], weight, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("make_model", [tiny_qwen3, tiny_llama])
@pytest.mark.parametrize("over", [{}, {"gradient_checkpointing": True}, {"dataloader_num_workers": 1}], ids=str)
def test_a_stock_trainer_gives_the_run_of_padded_rows(tmp_path, padded_run, make_model, over):
    """
    Two prompts per micro-batch, two micro-batches per update: the mean is over the completions' tokens of the update.
    """
    padded = padded_run(make_model)
    shared = run(tmp_path, True, make_model, **over)
    assert_same_run(padded, shared)
    assert shared.state.num_input_tokens_seen < 0.75 * padded.state.num_input_tokens_seen


def test_tokens_forwarded_are_those_of_the_layout(tmp_path):
    trainer = run(tmp_path, True, per_device_train_batch_size=COUNT, gradient_accumulation_steps=1, max_steps=1)
    tokens = 0
    for row in answers(COUNT):
        branches = [1 + len(completion) for completion in row["completion_ids"]]
        tokens += len(row["prompt_ids"]) - 1 + sum(branches)
    assert trainer.state.num_input_tokens_seen == tokens


def test_evaluation(tmp_path):
    """One batch, so that the mean of the trainer is over the same tokens."""
    padded, shared = (make(tmp_path, on, per_device_eval_batch_size=4) for on in (False, True))
    assert padded.evaluate()["eval_loss"] == pytest.approx(shared.evaluate()["eval_loss"], rel=1e-5)


def test_sft_trainer(tmp_path):
    sft = {"cls": SFTTrainer, "arguments": SFTConfig, "dataset_kwargs": {"skip_prepare_dataset": True}}
    padded, shared = (run(tmp_path, on, **sft) for on in (False, True))
    assert_same_run(padded, shared)
    assert series(padded, "mean_token_accuracy") == pytest.approx(series(shared, "mean_token_accuracy"))
    assert series(shared, "num_tokens") < series(padded, "num_tokens")


def test_effi_trainer(tmp_path, padded_run):
    assert_same_run(padded_run(tiny_qwen3), run(tmp_path, True, cls=EffiTrainer, arguments=EffiTrainingArguments))


def test_resume_is_exact(tmp_path):
    whole = run(tmp_path / "whole", True)
    run(tmp_path / "broken", True, callbacks=[StopAt(3)])
    resumed = make(tmp_path / "broken", True)
    resumed.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-3"))
    runs = [record_run(trainer) for trainer in (whole, resumed)]
    for record in runs:
        record.log_history = [entry for entry in record.log_history if "train_runtime" not in entry]
    compare_runs(*runs)
    assert_bitwise_equal(whole.model, resumed.model)


def test_grouped_rows_of_a_flat_dataset_train_alike(tmp_path):
    """All rows in one update: it does not matter how a prompt's completions are spread over rows."""
    flat = [
        {"prompt_ids": row["prompt_ids"], "completion_ids": completion}
        for row in answers(COUNT)
        for completion in row["completion_ids"]
    ]
    losses = []
    for most in (None, 2, 1):
        rows = group_by_prompt(Dataset.from_list(flat), max_completions=most)
        trainer = make(
            tmp_path, True, per_device_train_batch_size=4, gradient_accumulation_steps=-(-len(rows) // 4), max_steps=1
        )
        trainer.train_dataset = rows
        trainer.train()
        losses.append(series(trainer, "loss") + series(trainer, "grad_norm"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] == pytest.approx(losses[2], rel=1e-5)


def test_what_a_newcomer_forgets(tmp_path):
    model = tiny_qwen3()
    with pytest.raises(RefusedError, match="register_varlen_attention"):
        SharedPrefixCollator(model)
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        run(tmp_path, True, remove_unused_columns=True)
    trainer = make(tmp_path, True)
    trainer.train_dataset = Dataset.from_list([{"prompt_ids": [1, 2], "completion_ids": [3]}] * 4)
    with pytest.raises(ValueError, match="group_by_prompt"):
        trainer.train()
    trainer = make(tmp_path, True)
    trainer.model.set_attn_implementation("sdpa")
    with pytest.raises(RefusedError, match="'sdpa' would not see the shared prompt"):
        trainer.train()
