"""Crash-safe checkpoints through `trainer.train()`: the files of stock, sealed, in each mode and by each door."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback
from trl import DPOConfig, DPOTrainer

from hf_effi import WeightAveragingCallback
from hf_effi.callbacks import SafeCheckpointCallback
from hf_effi.checkpoint import SafeCheckpointer, find_resumable, list_checkpoints, verify_checkpoint
from hf_effi.checkpoint import safe as safe_module
from hf_effi.checkpoint.manifest import MANIFEST, read_manifest
from tests.helpers import (
    assert_bitwise_equal,
    lm_dataset,
    push_args,
    tiny_qwen3,
    tiny_tokenizer,
    weights_of,
)
from tests.training.test_resume_mixin import effi, grpo, sft, stock

MODES = ["sync", "thread", "process"]


@pytest.fixture(autouse=True)
def small_states_are_copied_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safe_module, "_SMALL", 1)


def safe(folder: Path, mode: str = "sync", **over: Any) -> Any:
    trainer = stock(folder, **over)
    SafeCheckpointer(mode).attach(trainer)
    return trainer


def contents(folder: Path) -> dict[str, Any]:
    """Return file -> what is in it, for the files that a resume reads."""
    found: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            found[path.name] = load_file(path)
        elif path.suffix in (".pt", ".pth"):
            found[path.name] = torch.load(path, weights_only=False)
        elif path.name == "trainer_state.json":
            state = json.loads(path.read_text().replace(str(folder.parent), "RUN"))
            state["stateful_callbacks"].pop("hf_effi.log_window", None)  # the one entry that ours has besides
            volatile = ("runtime", "per_second")
            state["log_history"] = [
                {key: value for key, value in row.items() if not any(part in key for part in volatile)}
                for row in state["log_history"]
            ]
            found[path.name] = state
        elif path.name != MANIFEST:
            found[path.name] = None
    return found


def assert_same(a: Any, b: Any, where: str = "") -> None:
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for index, (one, other) in enumerate(zip(a, b, strict=True)):
            assert_same(one, other, f"{where}/{index}")
    else:
        assert str(a) == str(b), where


BEST = {
    "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "loss",
}  # fmt: skip


def evaluated(folder: Path, **over: Any) -> Any:
    return Trainer(tiny_qwen3(), push_args(folder, **over), train_dataset=lm_dataset(40), eval_dataset=lm_dataset(4))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("limit", [None, 1])
def test_files_and_contents_are_those_of_stock(tmp_path: Path, mode: str, limit: int | None) -> None:
    over = {**BEST, "save_total_limit": limit}
    expected = evaluated(tmp_path / "a", **over)
    expected.train()
    ours = evaluated(tmp_path / "b", **over)
    SafeCheckpointer(mode).attach(ours)
    ours.train()
    folders = [sorted(path.name for path in (tmp_path / run).iterdir() if path.is_dir()) for run in "ab"]
    assert folders[0] == folders[1] and folders[0]
    for name in folders[0]:
        assert_same(contents(tmp_path / "a" / name), contents(tmp_path / "b" / name), name)
        report = verify_checkpoint(tmp_path / "b" / name)
        assert report.whole and report.sealed
    assert_bitwise_equal(weights_of(expected.model), weights_of(ours.model))
    assert Path(ours.state.best_model_checkpoint).is_dir()


@pytest.mark.parametrize("mode", MODES)
def test_a_stock_trainer_goes_on_to_the_bit(tmp_path: Path, mode: str) -> None:
    whole = stock(tmp_path / "whole")
    whole.train()
    safe(tmp_path / "run", mode).train()
    resumed = stock(tmp_path / "run")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert_bitwise_equal(weights_of(whole.model), weights_of(resumed.model))


def by_config(folder: Path) -> Any:
    return effi(folder, safe_checkpoints="thread")


def by_callback(folder: Path) -> Any:
    trainer = stock(folder)
    return Trainer(
        trainer.model,
        trainer.args,
        train_dataset=trainer.train_dataset,
        callbacks=[SafeCheckpointCallback("thread")],
    )


def by_callback_added_later(folder: Path) -> Any:
    trainer = stock(folder)
    trainer.add_callback(SafeCheckpointCallback("thread"))
    return trainer


def by_attach(folder: Path) -> Any:
    return safe(folder, "thread")


def of_sft(folder: Path) -> Any:
    return sft(folder, safe_checkpoints="thread")


def of_grpo(folder: Path) -> Any:
    return grpo(folder, safe_checkpoints="thread", num_iterations=2, save_steps=1)


def of_dpo(folder: Path) -> Any:
    from datasets import Dataset

    rows = Dataset.from_dict({"prompt": ["1+1="] * 8, "chosen": ["2"] * 8, "rejected": ["3"] * 8})
    args = push_args(folder, DPOConfig, max_length=16)
    trainer = DPOTrainer(
        tiny_qwen3(), args=args, train_dataset=rows, processing_class=tiny_tokenizer(), peft_config=LoraConfig()
    )
    SafeCheckpointer("thread").attach(trainer)
    return trainer


@pytest.mark.parametrize("make", [by_config, by_callback, by_callback_added_later, by_attach, of_sft, of_grpo, of_dpo])
def test_every_door_and_trainer(tmp_path: Path, make: Any) -> None:
    make(tmp_path).train()
    reports = list_checkpoints(tmp_path, "content")
    assert reports and all(report.whole and report.sealed for report in reports)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".hf_effi")]


@pytest.mark.parametrize("mode", MODES)
def test_an_adapter_is_resumed_to_the_bit(tmp_path: Path, mode: str) -> None:
    def make(folder: Path, **over: Any) -> Any:
        torch.manual_seed(0)
        model = get_peft_model(tiny_qwen3(), LoraConfig(r=2, lora_dropout=0.1))
        trainer = Trainer(model, push_args(folder, **over), train_dataset=lm_dataset(40))
        SafeCheckpointer(mode).attach(trainer)
        return trainer

    whole = make(tmp_path / "whole")
    whole.train()
    assert "adapter_model.safetensors" in read_manifest(tmp_path / "whole" / "checkpoint-2")["files"]
    last = sorted((tmp_path / "whole").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))[-1]
    last.rename(tmp_path / "gone")
    resumed = make(tmp_path / "whole")
    resumed.train(resume_from_checkpoint="auto")
    assert_bitwise_equal(weights_of(whole.model), weights_of(resumed.model))


@pytest.mark.parametrize("mode", MODES)
def test_what_our_parts_keep_is_sealed_too(tmp_path: Path, mode: str) -> None:
    averaging = WeightAveragingCallback(last=2, every_steps=1)
    trainer = effi(tmp_path, safe_checkpoints=mode, callbacks=[averaging])
    trainer.train()
    files = read_manifest(find_resumable(tmp_path).path)["files"]
    assert "effi_sampler.pt" in files and averaging.side_file in files
    resumed = effi(tmp_path, safe_checkpoints=mode, callbacks=[WeightAveragingCallback(last=2, every_steps=1)])
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_bitwise_equal(weights_of(trainer.model), weights_of(resumed.model))


def test_grpo_is_resumed_inside_of_a_block_with_its_buffers(tmp_path: Path) -> None:
    over = {"num_iterations": 2, "save_steps": 1, "safe_checkpoints": "process"}
    whole = grpo(tmp_path / "run", **over)
    whole.train()
    assert any(name.startswith("effi_") for name in read_manifest(tmp_path / "run" / "checkpoint-1")["files"])
    resumed = grpo(tmp_path / "run", **over)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert_bitwise_equal(weights_of(whole.model), weights_of(resumed.model))


# --- what is in the file is what was there when it was saved ---------------------------------------------------------


class Gate:
    """Holds the writer back until it is opened."""

    def __init__(self, checkpointer: SafeCheckpointer) -> None:
        self.opened, self.seen = threading.Event(), []
        checkpointer.at = self

    def __call__(self, phase: str) -> None:
        self.seen.append(phase)
        if phase == "write" and len(self.seen) == 1:
            assert self.opened.wait(60)


class OpenAfter(TrainerCallback):
    def __init__(self, gate: Gate, step: int) -> None:
        self.gate, self.step = gate, step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.gate.opened.set()


def test_training_goes_on_while_it_is_written_and_does_not_reach_the_file(tmp_path: Path) -> None:
    expected = stock(tmp_path / "a")
    expected.train()
    trainer = stock(tmp_path / "b")
    checkpointer = SafeCheckpointer("thread")
    gate = Gate(checkpointer)
    trainer.add_callback(OpenAfter(gate, 3))
    checkpointer.attach(trainer)
    trainer.train()
    assert gate.seen[0] == "write" and len(checkpointer.stalls) == len(checkpointer.writes) > 1
    assert_same(contents(tmp_path / "a" / "checkpoint-2"), contents(tmp_path / "b" / "checkpoint-2"))


def test_a_callback_may_write_into_a_checkpoint_that_is_on_its_way(tmp_path: Path) -> None:
    class Notes(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            folder.mkdir(exist_ok=True)
            (folder / "notes.txt").write_text(str(state.global_step))
            gate.opened.set()

    trainer = stock(tmp_path)
    checkpointer = SafeCheckpointer("thread")
    gate = Gate(checkpointer)
    trainer.add_callback(Notes())
    checkpointer.attach(trainer)
    trainer.train()
    for report in list_checkpoints(tmp_path, "content"):
        assert report.whole and (report.path / "notes.txt").read_text() == str(report.step)


def test_a_checkpoint_of_the_same_step_takes_the_place_of_the_older(tmp_path: Path) -> None:
    trainer = safe(tmp_path)
    trainer.train()
    step = trainer.state.global_step
    with torch.no_grad():
        trainer.model.get_input_embeddings().weight.zero_()
    trainer._save_checkpoint(trainer.model, None)
    folder = tmp_path / f"checkpoint-{step}"
    assert verify_checkpoint(folder).whole
    assert not load_file(folder / "model.safetensors")["model.embed_tokens.weight"].any()


@pytest.mark.parametrize("mode", MODES)
def test_pushes_begin_once_the_checkpoint_has_its_name(tmp_path: Path, mode: str) -> None:
    class Pushing(Trainer):
        def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
            self.callback_handler.on_push_begin(self.args, self.state, self.control)
            pushed.append((Path(checkpoint_folder).name, verify_checkpoint(checkpoint_folder).whole))

        def _finish_current_push(self) -> None:
            pass

    pushed: list[tuple[str, bool]] = []
    like = stock(tmp_path, lr_scheduler_type="constant")
    averaging = WeightAveragingCallback(last=2, every_steps=1)
    trainer = Pushing(like.model, like.args, train_dataset=like.train_dataset, callbacks=[averaging])
    trainer.args.push_to_hub = True
    SafeCheckpointer(mode).attach(trainer)
    trainer.train()
    names = [report.path.name for report in list_checkpoints(tmp_path)]
    assert pushed == [(name, True) for name in names] and len(names) > 1
    assert averaging.side_file in read_manifest(tmp_path / names[-1])["files"]
