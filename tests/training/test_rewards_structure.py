"""Rewards of structure through `trainer.train()`: stock TRL and EffiGRPOTrainer see the same, and log each part."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForTokenClassification, Trainer, TrainingArguments
from trl import GRPOConfig, GRPOTrainer

from hf_effi.data import StepLabelCollator
from hf_effi.rewards import BLEUReward, StepReward, classification, long_form, structured
from hf_effi.selection import SideColumn
from hf_effi.trainers.grpo.config import EffiGRPOConfig
from hf_effi.trainers.grpo.trainer import EffiGRPOTrainer
from tests.helpers import assert_bitwise_equal, grpo_args, prompt_dataset, run_grpo, tiny_qwen3, tiny_tokenizer


def outcome(completions: list[str], **columns: Any) -> list[float | None]:
    return [None if text.startswith("a") else 1.0 - 2.0 * (len(text) % 2) for text in completions]


def digits(steps: list[list[str]]) -> list[list[float]]:
    return [[float(any(map(str.isdigit, step))) for step in one] for one in steps]


async def judged(completions: list[str], **columns: Any) -> list[float]:
    return [0.5 for _ in completions]


def formatted(completions: list[str], **columns: Any) -> list[float]:
    return [len(text) / 10 for text in completions]


def letters(text: str) -> list[str]:
    return list(text)


def rows() -> Any:
    data = prompt_dataset(16).remove_columns("answer")
    answers = ['"x"' if number % 2 else "[1, 2]" for number in range(len(data))]
    references = [None if number % 5 == 0 else "".join(map(chr, range(48, 123))) for number in range(len(data))]
    return data.add_column("answer", answers).add_column("reference", references)


def rewards() -> list[Any]:
    """All at once: a preset with its columns, BLEU, a preset's judge that is awaited, steps."""
    preset = structured({"type": ["string", "integer", "array"]}, column="answer", weights={"valid": 1, "content": 1})
    gate = classification(['"x"', "[1, 2]"], formatted, judge=judged, patterns=["overall"]).trainer["reward_funcs"]
    steps = StepReward(digits, letters, "decayed", outcome)
    return [*preset.trainer["reward_funcs"], BLEUReward(tiny_tokenizer(), max_n=1, smoothing="none"), *gate, steps]


def train(tmp_path: Any, cls: type, config: type, functions: list[Any], **over: Any) -> Any:
    args = grpo_args(tmp_path, config, **{"per_device_train_batch_size": 4, "max_steps": 2, **over})
    return run_grpo(cls, args, reward_funcs=functions, train_dataset=rows())


def last_log(trainer: Any) -> dict[str, Any]:
    return [entry for entry in trainer.state.log_history if "reward" in entry][-1]


def test_stock_and_ours_learn_the_same_and_log_each_part(tmp_path: Any):
    alone = [fn for fn in rewards() if not isinstance(fn, SideColumn)]
    stock = train(tmp_path, GRPOTrainer, GRPOConfig, alone)
    ours = train(tmp_path, EffiGRPOTrainer, EffiGRPOConfig, rewards(), exact_savings="off")
    assert_bitwise_equal(stock.model, ours.model)
    assert not torch.equal(ours.model.lm_head.weight, tiny_qwen3(end_tokens=10).lm_head.weight)
    told, last = last_log(stock), last_log(ours)
    for name in ("json_reward", "bleu_reward", "class_in_tag_reward", "formatted", "judge_when_right", "step_reward"):
        assert last[f"rewards/{name}/mean"] == told[f"rewards/{name}/mean"], name
    assert last["rewards/judge_when_right/mean"] == 0.0 and last["rewards/bleu_reward/mean"] > 0
    parts = last["rewards/json_reward_valid/mean"], last["rewards/json_reward_content/mean"]
    assert last["rewards/json_reward/mean"] == pytest.approx(sum(parts) / 2)
    logged = last_log(train(tmp_path, GRPOTrainer, GRPOConfig, rewards()))
    assert (logged["json_reward_valid"], logged["json_reward_content"]) == pytest.approx(parts)


def test_a_preset_is_arguments_of_config_and_trainer(tmp_path: Any):
    preset = long_form(2, 4, 8, quality=outcome, format_reward=formatted, unit="tokens")
    args = grpo_args(tmp_path, GRPOConfig, **{**preset.config, "max_steps": 1})
    trainer = run_grpo(GRPOTrainer, args, train_dataset=rows(), **preset.trainer)
    assert trainer.multi_objective_aggregation == "normalize_then_sum"
    assert trainer.reward_weights.tolist() == pytest.approx([1 / 3] * 3)
    logged = next(entry for entry in trainer.state.log_history if "reward" in entry)
    assert 0 < logged["rewards/length_band_reward/mean"] <= 1


def test_labels_of_steps_train_a_classifier_on_a_stock_trainer(tmp_path: Any):
    from datasets import Dataset

    solved = [{"prompt": "1+1=", "completions": ["1+1", "2"], "labels": [1, 1]},
              {"prompt": "1+2=", "completions": ["1+2", "x"], "labels": [1, 0]}] * 4  # fmt: skip
    config = tiny_qwen3().config
    config.num_labels = 2
    torch.manual_seed(0)
    model = AutoModelForTokenClassification.from_config(config)
    collator = StepLabelCollator(tiny_tokenizer())
    args = TrainingArguments(
        str(tmp_path), max_steps=30, per_device_train_batch_size=8, learning_rate=1e-2, remove_unused_columns=False,
        use_cpu=True, report_to="none", save_strategy="no", logging_steps=30, disable_tqdm=True
    )  # fmt: skip
    Trainer(model, args, train_dataset=Dataset.from_list(solved), data_collator=collator).train()
    batch = collator(solved[:2])
    said = model.eval()(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits.argmax(-1)
    at = batch["labels"] != -100
    assert at.sum() == 4 and torch.equal(said[at], batch["labels"][at])
