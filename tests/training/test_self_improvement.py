"""Rounds of self-improvement around a stock Trainer, killed and started again; and on two processes."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_effi.data import GreedyAnswers, SelfImprovement
from tests.helpers import assert_bitwise_equal, tiny_qwen3, tiny_tokenizer, weights_of

BASE = [{"prompt": f"{letter}>", "completion": letter} for letter in "abcdefgh"]


def problem(level: int, rng: random.Random) -> str:
    return "".join(rng.sample("abcdefgh", level)) + ">"


def collate(rows):
    tokenizer = tiny_tokenizer()
    ids = [tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"] for row in rows]
    width = max(map(len, ids))
    return {
        "input_ids": torch.tensor([row + [0] * (width - len(row)) for row in ids]),
        "labels": torch.tensor([row + [-100] * (width - len(row)) for row in ids]),
    }


def trainer_of(model, rows, folder):
    args = TrainingArguments(
        str(folder),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    return Trainer(model, args, train_dataset=rows, data_collator=collate)


def rounds(folder, stop_in: int | None = None):
    """The script that a user writes. Returns the rows of each round and the final model."""
    improve = SelfImprovement(folder / "rounds", BASE, problem, levels=(2, 3, 4), per_round=6)
    model = (
        AutoModelForCausalLM.from_pretrained(improve.checkpoint) if improve.checkpoint else tiny_qwen3(end_tokens=20)
    )
    seen = []
    while not improve.done:
        seen.append(improve.extend(GreedyAnswers(model, tiny_tokenizer(), max_new_tokens=16)))
        if improve.finished == stop_in:
            return seen, model
        trainer_of(model, seen[-1], folder).train()
        improve.finish(model)
    return seen, model


def test_rounds_that_are_started_again_end_in_the_same_weights(tmp_path):
    wanted, whole = rounds(tmp_path / "whole")
    assert len(wanted) == 3 and all(len(rows) > 8 for rows in wanted)
    first, _ = rounds(tmp_path / "broken", stop_in=1)  # before the training of round 2
    rest, broken = rounds(tmp_path / "broken")
    assert first == wanted[:2] and rest == wanted[1:]
    assert_bitwise_equal(weights_of(whole), weights_of(broken))
    assert sorted(path.name for path in (tmp_path / "broken" / "rounds").glob("model-*")) == [
        "model-1",
        "model-2",
        "model-3",
    ]


def test_rounds_change_training_and_no_rounds_do_not(tmp_path):
    model, plain = tiny_qwen3(end_tokens=20), tiny_qwen3(end_tokens=20)
    improve = SelfImprovement(tmp_path / "rounds", BASE, problem, levels=(), per_round=6)
    assert improve.done
    trainer_of(model, improve.rows, tmp_path).train()
    trainer_of(plain, BASE, tmp_path).train()
    assert_bitwise_equal(weights_of(model), weights_of(plain))
    _, improved = rounds(Path(tmp_path) / "on")
    assert any(not torch.equal(a, b) for a, b in zip(improved.parameters(), plain.parameters(), strict=True))
