"""Crash-safe checkpoints through `trainer.train()`: the files of stock, sealed, in each mode and by each door."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback
from trl import DPOConfig, DPOTrainer

from hf_effi import EffiTrainer, EffiTrainingArguments, WeightAveragingCallback
from hf_effi.callbacks import SafeCheckpointCallback
from hf_effi.checkpoint import SafeCheckpointer, find_resumable, list_checkpoints, verify_checkpoint
from hf_effi.checkpoint import safe as safe_module
from hf_effi.checkpoint.commit import Commit
from hf_effi.checkpoint.manifest import MANIFEST, read_manifest
from hf_effi.checkpoint.staging import StagedFile
from hf_effi.samplers import ShuffledSampler
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
    monkeypatch.setattr(safe_module, "_SMALL", 0)


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


# --- what goes wrong -------------------------------------------------------------------------------------------------


def full_disk(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def failing(monkeypatch: pytest.MonkeyPatch, mode: str, step: int) -> None:
    """Let the writes of one step fail as on a full disk."""
    real_finish = Commit.finish

    def finish(self: Commit) -> None:
        if self.step == step:
            monkeypatch.setattr(Commit, "sync_files", full_disk)
        try:
            real_finish(self)
        finally:
            monkeypatch.setattr(Commit, "sync_files", real_sync)

    real_sync = Commit.sync_files
    monkeypatch.setattr(Commit, "finish", finish)


@pytest.mark.parametrize("mode", ["sync", "thread"])
def test_a_full_disk_ends_the_run_and_loses_nothing(tmp_path: Path, monkeypatch: Any, mode: str) -> None:
    failing(monkeypatch, mode, 4)
    trainer = safe(tmp_path, mode)
    with pytest.raises(
        OSError, match=r"checkpoint-4 could not be saved \(OSError: .*No space left.*untouched"
    ) as told:
        trainer.train()
    assert "newest whole checkpoint is" in str(told.value) and "GiB free" in str(told.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2"]
    assert verify_checkpoint(tmp_path / "checkpoint-2").whole


@pytest.mark.parametrize("mode", ["sync", "thread"])
def test_a_failed_save_can_be_a_warning(tmp_path: Path, monkeypatch: Any, caplog: Any, mode: str) -> None:
    failing(monkeypatch, mode, 2)
    trainer = stock(tmp_path)
    SafeCheckpointer(mode, on_error="warn").attach(trainer)
    monkeypatch.setattr(safe_module.logger, "propagate", True)
    trainer.train()
    assert [report.step for report in list_checkpoints(tmp_path)] == [4]
    assert "checkpoint-2 could not be saved" in caplog.text and "goes on without it" in caplog.text


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: Any) -> None:
    def refused(self: Commit) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path))

    monkeypatch.setattr(Commit, "begin", refused)
    with pytest.raises(OSError, match="PermissionError.*No whole checkpoint is in .* so far"):
        safe(tmp_path).train()


def test_a_writer_that_is_killed_is_told_and_the_next_one_works(tmp_path: Path, monkeypatch: Any) -> None:
    trainer = stock(tmp_path)
    checkpointer = SafeCheckpointer("process", on_error="warn").attach(trainer)
    monkeypatch.setattr(StagedFile, "__reduce__", _slow_to_load, raising=False)

    class Kill(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                os.kill(checkpointer._writer._process.pid, signal.SIGKILL)

    trainer.add_callback(Kill())
    problems = []
    monkeypatch.setattr(checkpointer, "_failed", lambda commit, problem: problems.append((commit.step, problem)))
    trainer.train()
    assert problems == [(2, "WriterEnded: the process that writes checkpoints ended with exit code -9, as one that "
                         "the system ended for its memory does")]  # fmt: skip
    steps = [report.step for report in list_checkpoints(tmp_path, "content") if report.whole]
    assert steps and 2 not in steps and not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def _wait_a_second(*args: Any) -> StagedFile:
    time.sleep(1)
    return StagedFile(*args)


def _slow_to_load(self: StagedFile) -> Any:
    return _wait_a_second, (self.path, self.kind, self.content, self.metadata)


def test_an_error_of_the_training_leaves_the_last_checkpoint_whole(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                raise KeyboardInterrupt

    trainer = safe(tmp_path, "thread")
    trainer.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert [(report.step, report.whole) for report in list_checkpoints(tmp_path, "content")] == [(2, True)]


# --- resume_from_checkpoint="auto" -----------------------------------------------------------------------------------


def test_auto_starts_fresh_then_skips_what_is_broken_and_says_why(
    tmp_path: Path, caplog: Any, monkeypatch: Any
) -> None:
    from hf_effi.checkpoint import resume

    monkeypatch.setattr(resume.logger, "propagate", True)
    whole = safe(tmp_path)
    whole.train(resume_from_checkpoint="auto")
    assert "has no whole checkpoint, the run starts fresh" in caplog.text
    newest = find_resumable(tmp_path).path
    content = bytearray((newest / "optimizer.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (newest / "optimizer.pt").write_bytes(content)
    resumed = safe(tmp_path)
    resumed.train(resume_from_checkpoint="auto")
    assert f"{newest.name}: optimizer.pt was changed: its crc32" in caplog.text
    assert "goes on from" in caplog.text and "checkpoint-" in caplog.text
    assert_bitwise_equal(weights_of(whole.model), weights_of(resumed.model))
    assert verify_checkpoint(newest).whole, "written again"


def test_auto_of_an_effi_trainer_needs_no_safe_checkpoints(tmp_path: Path) -> None:
    whole = effi(tmp_path)
    whole.train(resume_from_checkpoint="auto")
    newest = find_resumable(tmp_path)
    (newest.path / "scheduler.pt").unlink()
    resumed = effi(tmp_path)
    resumed.train(resume_from_checkpoint="auto")
    assert_bitwise_equal(weights_of(whole.model), weights_of(resumed.model))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_missing_half_is_a_named_error_where_stock_restarts_it(tmp_path: Path, name: str) -> None:
    effi(tmp_path).train()
    (tmp_path / "checkpoint-2" / name).unlink()
    stock(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))  # in silence
    with pytest.raises(ValueError, match=f"{name} is missing"):
        effi(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_weights_alone_are_continued_only_where_that_is_said(tmp_path: Path) -> None:
    sft(tmp_path, save_only_model=True).train()
    with pytest.raises(ValueError, match="holds weights and no optimizer.pt.*set save_only_model=True"):
        sft(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    sft(tmp_path, save_only_model=True).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


# --- owners, and nothing left behind ---------------------------------------------------------------------------------


def test_one_trainer_one_checkpointer(tmp_path: Path) -> None:
    trainer = stock(tmp_path)
    before = dict(vars(trainer))
    checkpointer = SafeCheckpointer().attach(trainer)
    with pytest.raises(ValueError, match="Another SafeCheckpointer saves for this Trainer already"):
        SafeCheckpointer().attach(trainer)
    with pytest.raises(ValueError, match="attached to a Trainer already"):
        checkpointer.attach(stock(tmp_path))
    with pytest.raises(TypeError, match="takes a transformers.Trainer or a subclass, not str"):
        SafeCheckpointer().attach("out")
    checkpointer.detach()
    assert vars(trainer) == before
    with pytest.raises(ValueError, match="Two callbacks want to save the checkpoints"):
        Trainer(trainer.model, trainer.args, callbacks=[SafeCheckpointCallback(), SafeCheckpointCallback()])
    args = push_args(tmp_path, EffiTrainingArguments, safe_checkpoints="sync")
    with pytest.raises(ValueError, match="safe_checkpoints='sync' and SafeCheckpointCallback"):
        EffiTrainer(trainer.model, args, train_dataset=lm_dataset(8), callbacks=[SafeCheckpointCallback()])


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"mode": "fast"}, "mode='fast' is not one of 'sync', 'thread', 'process'"),
        ({"digest": "md5"}, "digest='md5' is not one of"),
        ({"on_error": "ignore"}, "on_error='ignore' is not one of 'raise', 'warn'"),
    ],
)
def test_arguments_out_of_range(over: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SafeCheckpointer(**over)
    with pytest.raises(ValueError, match=message):
        SafeCheckpointCallback(**over)


def test_a_config_names_the_modes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="safe_checkpoints='fast' is not one of 'sync', 'thread', 'process'"):
        push_args(tmp_path, EffiTrainingArguments, safe_checkpoints="fast")


@pytest.mark.parametrize("mode", MODES)
def test_no_thread_descriptor_process_or_memory_is_left(tmp_path: Path, mode: str) -> None:
    def state() -> tuple[int, int, int]:
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        return threading.active_count(), len(os.listdir("/proc/self/fd")), len(children)

    safe(tmp_path / "first", mode, save_steps=1).train()
    before, shared = state(), sorted(os.listdir("/dev/shm"))
    trainer = safe(tmp_path / "second", mode, save_steps=1, num_train_epochs=4, save_total_limit=1)
    trainer.train()
    assert state() == before and sorted(os.listdir("/dev/shm")) == shared
    assert [path.name for path in (tmp_path / "second").iterdir()] == [f"checkpoint-{trainer.state.global_step}"]


def test_a_sampler_of_ours_in_a_stock_trainer(tmp_path: Path) -> None:
    from hf_effi.callbacks import SamplerCallback

    def make() -> Any:
        return Trainer(
            tiny_qwen3(),
            push_args(tmp_path),
            train_dataset=lm_dataset(40),
            callbacks=[SamplerCallback(ShuffledSampler(40)), SafeCheckpointCallback("process")],
        )

    whole = make()
    whole.train()
    resumed = make()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_bitwise_equal(weights_of(whole.model), weights_of(resumed.model))
