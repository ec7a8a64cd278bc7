"""A run that changes its number of processes: the same samples in the same update, or a refusal by name."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from hf_effi.checkpoint import SafeCheckpointer
from hf_effi.errors import MismatchError
from hf_effi.samplers import ShuffledSampler
from tests.helpers import lm_dataset, push_args, run_distributed, tiny_qwen3, tiny_tokenizer, weights_of
from tests.training.test_resume_mixin import effi, stock

ROWS, UPDATES = 8, 6
#: (processes, rows per process, accumulation steps, last update) of each part of a run
PARTS = {
    "2 -> 1 -> 2": [(2, 4, 1, 2), (1, 4, 2, 4), (2, 2, 2, 6)],
    "accumulation 4 -> 8 -> 4": [(1, 2, 4, 2), (1, 1, 8, 4), (1, 2, 4, 6)],
    "1 -> 2": [(1, 8, 1, 2), (2, 1, 4, 6)],
}


def part(folder: str, kind: str, rows: int, steps: int, last: int) -> Any:
    """Train up to update `last` in fp64, without dropout; return the weights, and the rows of each update."""
    from transformers import Trainer, TrainerCallback

    from hf_effi import EffiSFTConfig, EffiSFTTrainer, EffiTrainer, EffiTrainingArguments

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == last:
                control.should_save = control.should_training_stop = True

    over = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": steps, "max_steps": UPDATES,
            "save_steps": 100, "num_train_epochs": 3, "learning_rate": 1e-2, "bf16": False}  # fmt: skip
    model, data = tiny_qwen3().double(), lm_dataset(24)
    if kind == "stock":
        trainer = Trainer(model, push_args(folder, **over), train_dataset=data, callbacks=[Stop()])
        SafeCheckpointer().attach(trainer)
    elif kind == "SFT":
        args = push_args(folder, EffiSFTConfig, safe_checkpoints="sync", max_length=32, **over)
        rows = Dataset.from_dict({"text": [f"{i}+{i}={i + i}" for i in range(24)]})
        trainer = EffiSFTTrainer(
            model, args, train_dataset=rows, callbacks=[Stop()], processing_class=tiny_tokenizer()
        )
    else:
        args = push_args(folder, EffiTrainingArguments, **over)
        sampler = ShuffledSampler(24, seed=3)
        trainer = EffiTrainer(model, args, train_dataset=data, train_sampler=sampler, callbacks=[Stop()])
    trainer.train(resume_from_checkpoint="auto")
    return weights_of(trainer.model)


@pytest.mark.parametrize(
    ("kind", "parts"), [(kind, parts) for kind in ("stock", "sampler") for parts in PARTS] + [("SFT", "2 -> 1 -> 2")]
)
def test_the_weights_are_those_of_the_uninterrupted_run(tmp_path: Path, kind: str, parts: str) -> None:
    whole = run_distributed(part, 1, str(tmp_path / "whole"), kind, ROWS, 1, UPDATES)[0]
    for world, rows, steps, last in PARTS[parts]:
        found = run_distributed(part, world, str(tmp_path / "run"), kind, rows, steps, last)[0]
    # The loss is computed in fp32, and SFT's batches of other sizes are padded otherwise.
    allowed = 1e-7 if kind == "SFT" else 1e-9
    assert max(float((whole[name] - found[name]).abs().max()) for name in whole) <= allowed
    start = {name: value.double() for name, value in weights_of(tiny_qwen3()).items()}
    assert max(float((whole[name] - start[name]).abs().max()) for name in whole) > 1e-3


def saved(folder: str, safe: bool = True) -> None:
    trainer = stock(Path(folder), max_steps=2, save_steps=2)
    if safe:
        SafeCheckpointer().attach(trainer)
    trainer.train()


def test_other_rows_per_update_are_refused_with_a_setting_that_fits(tmp_path: Path) -> None:
    run_distributed(saved, 2, str(tmp_path))
    checkpoint = str(tmp_path / "checkpoint-2")
    stock(tmp_path, max_steps=4).train(resume_from_checkpoint=checkpoint)  # in silence, at another place in the data
    message = (
        r"checkpoint-2 was trained with 8 rows per update \(2 processes x 4 x 1 accumulation steps\), this run has 4 "
        r"\(1 x 4 x 1\).*Set gradient_accumulation_steps=2 or per_device_train_batch_size=8, or ignore_data_skip"
    )
    with pytest.raises(MismatchError, match=message):
        attached = stock(tmp_path, max_steps=4)
        SafeCheckpointer().attach(attached)
        attached.train(resume_from_checkpoint=checkpoint)
    with pytest.raises(MismatchError, match="this run has 9 .*Resume on 2 processes, or ignore"):
        attached = stock(tmp_path, max_steps=4, per_device_train_batch_size=3, gradient_accumulation_steps=3)
        SafeCheckpointer().attach(attached)
        attached.train(resume_from_checkpoint=checkpoint)
    for over in ({"gradient_accumulation_steps": 2}, {"ignore_data_skip": True}):
        attached = stock(tmp_path, max_steps=3, **over)
        SafeCheckpointer().attach(attached)
        attached.train(resume_from_checkpoint=checkpoint)


def test_a_checkpoint_without_a_manifest_is_known_by_its_updates_per_epoch(tmp_path: Path) -> None:
    stock(tmp_path, max_steps=2).train()
    with pytest.raises(MismatchError, match="trained with 10.0 updates per epoch, this run has 5.0"):
        plain(tmp_path, gradient_accumulation_steps=2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    plain(tmp_path, max_steps=3).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def plain(folder: Path, **over: Any) -> Any:
    from hf_effi import EffiTrainer, EffiTrainingArguments

    args = push_args(folder, EffiTrainingArguments, **over)
    return EffiTrainer(tiny_qwen3(), args, train_dataset=lm_dataset(40))


def test_a_new_process_gets_seeds_of_its_own_and_the_same_each_time(tmp_path: Path, monkeypatch: Any) -> None:
    from hf_effi.checkpoint.elastic import seed_new_process

    effi(tmp_path).train()
    folder = tmp_path / "checkpoint-2"
    trainer = effi(tmp_path)
    assert not seed_new_process(trainer, folder), "it has a state"
    shutil.move(folder / "rng_state.pth", folder / "rng_state_0.pth")
    assert seed_new_process(trainer, folder)
    first = torch.rand(3)
    assert seed_new_process(trainer, folder) and torch.equal(torch.rand(3), first)
    trainer.state.global_step += 1
    assert seed_new_process(trainer, folder) and not torch.equal(torch.rand(3), first)
    os.remove(folder / "rng_state_0.pth")
    assert not seed_new_process(trainer, folder), "none for anybody: the checkpoint is not whole"
