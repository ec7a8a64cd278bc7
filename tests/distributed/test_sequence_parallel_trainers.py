"""Sequence parallelism through `trainer.train()`: the same loss and grad_norm series on 1, 2 and 4 ranks."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import pytest
import torch
from datasets import Dataset

from hf_effi import EffiSFTConfig, EffiSFTTrainer, EffiTrainer, EffiTrainingArguments
from tests.helpers import lm_dataset, run_distributed, sft_dataset, tiny_llama, tiny_tokenizer

ROWS = 8  # a step, on any number of ranks


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def settings(size: int, **over: Any) -> dict[str, Any]:
    return {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": ROWS // 2 // (world() // size),
        "per_device_eval_batch_size": ROWS // 2 // world(),
        "gradient_accumulation_steps": 2,
        "sequence_parallel_size": size,
        "max_steps": 3,
        "learning_rate": 0.1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.5,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "ddp_find_unused_parameters": False,
        **over,
    }


def rows_of_uneven_labels(size: int = 32, length: int = 13) -> Dataset:
    """An odd length, and prompts of different length: some shards have no label."""
    data = lm_dataset(size, length=length)
    labels = [
        [-100] * (index % (length - 2)) + row[index % (length - 2) :] for index, row in enumerate(data["labels"])
    ]
    return data.remove_columns("labels").add_column("labels", labels)


def model_of(**over: Any) -> torch.nn.Module:
    return tiny_llama(num_attention_heads=8, attn_implementation="sdpa", **over)


def run_trainer(size: int, **over: Any) -> dict[str, Any]:
    data = rows_of_uneven_labels()
    args = EffiTrainingArguments(**settings(size, **over))
    return series(EffiTrainer(model_of(), args, train_dataset=data, eval_dataset=data.select(range(8))))


def run_sft(size: int, **over: Any) -> dict[str, Any]:
    data = sft_dataset(64)
    over = {"max_length": 21, "gradient_checkpointing": True, "per_device_eval_batch_size": 1, **over}
    args = EffiSFTConfig(**settings(size, **over))
    trainer = EffiSFTTrainer(
        model_of(),
        args=args,
        train_dataset=data,
        eval_dataset=data.select(range(8)),
        processing_class=tiny_tokenizer(),
    )
    return series(trainer)


def series(trainer: Any) -> dict[str, Any]:
    trainer.train()
    logs = trainer.state.log_history
    keys = ("loss", "grad_norm", "eval_loss", "num_tokens", "mean_token_accuracy", "rewards/margins", "rewards/kl")
    return {key: [float(entry[key]) for entry in logs if key in entry] for key in keys}


LOCAL = {"average_tokens_across_devices": False, "gradient_accumulation_steps": 1, "per_device_eval_batch_size": 1}
RUNS = {
    "Trainer": (run_trainer, {}),
    "Trainer, checkpointing": (run_trainer, {"gradient_checkpointing": True}),
    "Trainer, local counts": (run_trainer, LOCAL),
    "SFT": (run_sft, {}),
    "SFT, packed": (run_sft, {"packing": True, "eval_packing": False}),
}


def runs(sizes: tuple[int, ...]) -> dict[tuple[str, int], dict[str, Any]]:
    return {(name, size): run(size, **over) for name, (run, over) in RUNS.items() for size in sizes}


def assert_same_series(found: dict[str, Any], true: dict[str, Any], what: Any) -> None:
    for key, values in true.items():
        assert found[key] == pytest.approx(values, rel=1e-5, abs=1e-6), (what, key, found[key], values)
    assert len(true["loss"]) == 3 and true["grad_norm"][0] > 0.5, (what, true)


def test_series_are_those_of_one_rank() -> None:
    true = runs((1,))
    ranks = run_distributed(runs, 4, (2, 4))
    for (name, size), found in ranks[0].items():
        if name == "Trainer, local counts" and size == 2:
            continue  # two groups average their own means, as two data-parallel ranks do
        assert_same_series(found, true[name, 1], (name, size))
    assert all(rank == ranks[0] for rank in ranks)
