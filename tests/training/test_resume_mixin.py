"""Resuming at the end of a run, and from a checkpoint that a killed process left half-written."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from transformers import Trainer, TrainerCallback
from trl import GRPOTrainer

from hf_effi import (
    EffiGRPOConfig,
    EffiGRPOTrainer,
    EffiSFTConfig,
    EffiSFTTrainer,
    EffiTrainer,
    EffiTrainingArguments,
    WeightAveragingCallback,
)
from hf_effi.checkpoint.resume import check_checkpoint
from hf_effi.checkpoint.structure import first_broken
from hf_effi.errors import BrokenFileError
from hf_effi.samplers import ShuffledSampler
from tests.helpers import (
    assert_bitwise_equal,
    grpo_args,
    lm_dataset,
    push_args,
    run_grpo,
    tiny_qwen3,
    tiny_tokenizer,
    weights_of,
)
from tests.helpers.distributed import start_children


def effi(folder: Path, **over: Any) -> Any:
    callbacks = over.pop("callbacks", [])
    args = push_args(folder, EffiTrainingArguments, **{"lr_scheduler_type": "constant", **over})
    rows = lm_dataset(16 if args.num_train_epochs == 1 else 40)
    return EffiTrainer(
        tiny_qwen3(), args, train_dataset=rows, callbacks=callbacks, train_sampler=ShuffledSampler(len(rows))
    )


def sft(folder: Path, **over: Any) -> Any:
    args = push_args(folder, EffiSFTConfig, **over)
    rows = Dataset.from_dict({"text": [f"{i}+1={i + 1}" for i in range(40)]})
    return EffiSFTTrainer(tiny_qwen3(), args, train_dataset=rows, processing_class=tiny_tokenizer())


def grpo(folder: Path, **over: Any) -> Any:
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, **over}
    return run_grpo(EffiGRPOTrainer, grpo_args(folder, EffiGRPOConfig, **settings), train=False)


def stock(folder: Path, **over: Any) -> Any:
    return Trainer(tiny_qwen3(), push_args(folder, **over), train_dataset=lm_dataset(40))


class Steps(TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(state.global_step)


@pytest.mark.parametrize("make", [effi, sft, grpo])
@pytest.mark.parametrize("inside_of_a_pass", [True, False])
def test_a_finished_run_trains_nothing_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any, inside_of_a_pass: bool
) -> None:
    over = {} if inside_of_a_pass else {"num_train_epochs": 1, "max_steps": -1, "save_strategy": "epoch"}
    first = make(tmp_path, **over)
    first.train()
    said: list[str] = []
    monkeypatch.setattr("hf_effi.trainers.mixins.resume.logger.warning", said.append)
    for _ in range(2):  # as a job that restarts by itself
        steps = Steps()
        again = make(tmp_path, **over)
        again.add_callback(steps)
        again.train(resume_from_checkpoint=True)
        assert steps.seen == [] and again.state.global_step == first.state.global_step
        assert_bitwise_equal(first.model, again.model)
    assert len(said) == 2 and all("The run had reached its end" in sentence for sentence in said)
    assert not list(tmp_path.glob(f"checkpoint-{first.state.global_step + 1}"))


def test_stock_trains_one_more_update(tmp_path: Path) -> None:
    """The difference that README states; where this fails, stock has been repaired."""
    stock(tmp_path).train()
    steps, again = Steps(), stock(tmp_path)
    again.add_callback(steps)
    again.train(resume_from_checkpoint=True)
    assert steps.seen == [5]


def test_a_longer_run_goes_on(tmp_path: Path) -> None:
    effi(tmp_path).train()
    assert effi(tmp_path, max_steps=6).train(resume_from_checkpoint=True).global_step == 6


# --- half a checkpoint ----------------------------------------------------------------------------------------------

FILES = {
    "trainer_state.json",
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "config.json",
    "effi_average.pt",
    "effi_sampler.pt",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    effi(folder, callbacks=[WeightAveragingCallback(last=4, every_steps=1)]).train()
    return folder


@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize("left", [0, 1, 0.5, -1])
def test_a_file_that_ends_early_is_named_with_the_newest_whole_checkpoint(
    run: Path, tmp_path: Path, name: str, left: float
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    path = folder / "checkpoint-4" / name
    content = path.read_bytes()
    keep = int(len(content) * left) if isinstance(left, float) else left
    if name.endswith(".json") and left == -1:
        keep = -2  # the line break behind the last brace is not missed
    path.write_bytes(content[:keep])
    callback = WeightAveragingCallback(last=4, every_steps=1)
    for resume in (True, str(folder / "checkpoint-4")):
        with pytest.raises(BrokenFileError) as caught:
            effi(folder, callbacks=[callback]).train(resume_from_checkpoint=resume)
        text = str(caught.value)
        assert f"checkpoint-4 is no whole checkpoint, as where a process was killed inside of a save: {name} " in text
        assert f"resume_from_checkpoint={str(folder / 'checkpoint-2')!r}" in text
    again = effi(folder, callbacks=[callback])
    assert again.train(resume_from_checkpoint=str(folder / "checkpoint-2")).global_step == 4


def test_what_is_read_is_looked_at_and_nothing_else(run: Path, tmp_path: Path) -> None:
    found = {path.name for path in (run / "checkpoint-4").iterdir()}
    assert found >= FILES
    checkpoint = tmp_path / "checkpoint-4"
    shutil.copytree(run / "checkpoint-4", checkpoint)
    for name in ("training_args.bin", "notes.json", "README.md", "generation_config.json"):
        (checkpoint / name).write_text("{")
    check_checkpoint(checkpoint)
    (checkpoint / "trainer_state.json").unlink()
    with pytest.raises(BrokenFileError, match="trainer_state.json is missing. No other checkpoint in .* is whole"):
        check_checkpoint(checkpoint)
    check_checkpoint(tmp_path / "none")  # stock says so


def test_shards_and_older_formats(run: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-4"
    shutil.copytree(run / "checkpoint-4", checkpoint)
    (checkpoint / "model.safetensors").unlink()
    tiny_qwen3().save_pretrained(checkpoint, max_shard_size="20KB")
    shards = sorted(checkpoint.glob("model-*.safetensors"))
    assert len(shards) > 1 and first_broken(checkpoint) is None
    shards[0].unlink()
    assert first_broken(checkpoint) == f"{shards[0].name} is missing, which model.safetensors.index.json names"
    torch.save({"a": torch.zeros(3)}, checkpoint / "scheduler.pt", _use_new_zipfile_serialization=False)
    (checkpoint / "model.safetensors.index.json").unlink()
    assert first_broken(checkpoint) is None
    for text in ("null", "[]", "3"):
        (checkpoint / "trainer_state.json").write_text(text)
        assert first_broken(checkpoint) == "trainer_state.json holds no state"


def half_a_file(folder: str, name: str) -> None:
    """Train until one file of a checkpoint is half written, and wait there."""

    def half(module: Any, function: str) -> None:
        whole = getattr(module, function)

        def write(state: Any, path: Any, *args: Any, **kwargs: Any) -> None:
            whole(state, path, *args, **kwargs)
            if Path(str(path)).name == name and "checkpoint-4" in str(path):
                content = Path(path).read_bytes()
                Path(path).write_bytes(content[: len(content) // 2])
                Path(folder, "waits").touch()
                time.sleep(60)

        setattr(module, function, write)

    half(torch, "save")
    half(transformers.modeling_utils, "safe_save_file")
    effi(folder).train()


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt"])
def test_killed_inside_of_a_save(tmp_path: Path, name: str) -> None:
    children = start_children(half_a_file, 1, tmp_path / "child", str(tmp_path), name)
    try:
        children.wait(200, until=(tmp_path / "waits").exists)
    finally:
        children.kill()
    assert (tmp_path / "waits").exists(), children.output(0).read_text()[-2000:]
    with pytest.raises(BrokenFileError, match=rf"inside of a save: {name} .*Resume from .*checkpoint-2'"):
        effi(tmp_path).train(resume_from_checkpoint=True)
    resumed = effi(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    whole = effi(tmp_path / "whole")
    whole.train()
    assert_bitwise_equal(weights_of(whole.model), weights_of(resumed.model))


def test_grpo_names_its_own_files(tmp_path: Path) -> None:
    trainer = grpo(tmp_path, num_iterations=2, save_steps=1)
    trainer.train()
    assert isinstance(trainer, GRPOTrainer)
    for name in ("effi_state.json", "effi_rollouts_0.pt"):
        path = tmp_path / "checkpoint-3" / name
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(BrokenFileError, match=f"{name} ends early.*checkpoint-4"):
            grpo(tmp_path, num_iterations=2).train(resume_from_checkpoint=str(path.parent))
        path.write_bytes(content)
