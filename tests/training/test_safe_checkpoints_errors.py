"""What goes wrong with a checkpoint, what `"auto"` makes of it, and what a checkpointer refuses."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer, TrainerCallback

from hf_effi import EffiTrainer, EffiTrainingArguments
from hf_effi.callbacks import SafeCheckpointCallback
from hf_effi.checkpoint import SafeCheckpointer, find_resumable, list_checkpoints, verify_checkpoint
from hf_effi.checkpoint import safe as safe_module
from hf_effi.checkpoint.commit import Commit
from hf_effi.checkpoint.staging import StagedFile
from hf_effi.samplers import ShuffledSampler
from tests.helpers import assert_bitwise_equal, lm_dataset, push_args, tiny_qwen3, weights_of
from tests.training.test_resume_mixin import effi, sft, stock
from tests.training.test_safe_checkpoints import MODES, safe, small_states_are_copied_too  # noqa: F401

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
    assert (
        "has" in str(told.value)
        and str(tmp_path / "checkpoint-2") in str(told.value)
        and "GiB free" in str(told.value)
    )
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
    with pytest.raises(OSError, match="PermissionError.*has no whole checkpoint"):
        safe(tmp_path).train()


def test_a_writer_that_is_killed_is_told_and_the_next_one_works(tmp_path: Path, monkeypatch: Any) -> None:
    trainer = stock(tmp_path)
    checkpointer = SafeCheckpointer("process", on_error="warn").attach(trainer)
    monkeypatch.setattr(StagedFile, "__reduce__", _slow_to_load, raising=False)

    class Kill(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                os.kill(checkpointer._writer.pid, signal.SIGKILL)

    trainer.add_callback(Kill())
    problems = []
    monkeypatch.setattr(checkpointer, "_failed", lambda commit, problem: problems.append((commit.step, problem)))
    trainer.train()
    assert problems == [(2, "OSError: the process that writes checkpoints ended with exit code -9, as one that "
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


def test_weights_alone_are_continued_with_a_warning(tmp_path: Path, caplog: Any, monkeypatch: Any) -> None:
    from hf_effi.checkpoint import resume

    monkeypatch.setattr(resume.logger, "propagate", True)
    sft(tmp_path, save_only_model=True).train()
    sft(tmp_path, save_only_model=True, max_steps=5).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "begin anew" not in caplog.text
    sft(tmp_path, max_steps=5).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "holds weights and no optimizer.pt" in caplog.text and "begin anew" in caplog.text


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
