"""`lazy=True`: what is in the files is what was there at the save, though it is copied while training goes on."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback

from hf_effi.callbacks import SafeCheckpointCallback
from hf_effi.checkpoint import SafeCheckpointer, find_resumable, list_checkpoints
from hf_effi.checkpoint import safe as safe_module
from hf_effi.checkpoint.copies import Copies
from tests.helpers import assert_bitwise_equal, push_args, weights_of
from tests.training.test_safe_checkpoints import assert_same, contents, small_states_are_copied_too  # noqa: F401


class Net(torch.nn.Module):
    """With running averages, which a forward changes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        out = self.head(self.norm(x)).squeeze(-1)
        return {"loss": (out - labels).square().mean(), "logits": out}


def made(folder: Path, *callbacks: TrainerCallback, **over: Any) -> Trainer:
    torch.manual_seed(0)
    rows = Dataset.from_dict({"x": torch.randn(64, 4).tolist(), "labels": torch.randn(64).tolist()})
    settings = {"max_steps": 4, "save_steps": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    args = push_args(folder, **{**settings, "learning_rate": 0.1, **over})
    return Trainer(Net(), args, train_dataset=rows, callbacks=list(callbacks))


class HeldBack(TrainerCallback):
    """Lets the copies of a save begin once a forward and a backward have run after it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gate, self.means, self.nbytes = threading.Event(), [], []
        real = Copies._run

        def run(copies: Copies) -> None:
            self.nbytes.append(copies.nbytes)
            assert self.gate.wait(60)
            real(copies)

        monkeypatch.setattr(Copies, "_run", run)

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.gate.clear()
        self.means.append(model.norm.running_mean.clone())

    def on_substep_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.means:
            assert not torch.equal(self.means[-1], model.norm.running_mean), "the forward changed it"
        self.gate.set()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.gate.set()


@pytest.mark.parametrize("mode", ["thread", "process"])
def test_the_files_are_those_of_stock_though_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    stock = made(tmp_path / "a")
    stock.train()
    held = HeldBack(monkeypatch)
    ours = made(tmp_path / "b", held)
    SafeCheckpointer(mode, lazy=True).attach(ours)
    # The last save has no forward after it.
    finalize = ours._finalize_training
    monkeypatch.setattr(ours, "_finalize_training", lambda *args: held.gate.set() or finalize(*args))
    ours.train()
    for step in range(1, 5):
        name = f"checkpoint-{step}"
        assert_same(contents(tmp_path / "a" / name), contents(tmp_path / "b" / name), name)
    # 4 + 4 + 4 + 1 weights, and of each two states of Adam; one `step` for each of the four parameters.
    assert held.nbytes == [4 * (3 * 13 + 4)] * 4
    assert_bitwise_equal(weights_of(stock.model), weights_of(ours.model))
    assert all(report.whole and report.sealed for report in list_checkpoints(tmp_path / "b", "content"))


def test_the_update_waits_for_a_slow_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            running.append([thread.name for thread in threading.enumerate() if "copies" in thread.name])

    running: list[list[str]] = []
    real = Copies._run
    monkeypatch.setattr(Copies, "_run", lambda copies: (time.sleep(0.2), real(copies)))
    trainer = made(tmp_path, Clock(), max_steps=3)
    checkpointer = SafeCheckpointer("thread", lazy=True).attach(trainer)
    trainer.train()
    assert running == [[], [], []] and len(checkpointer.writes) == 3
    assert find_resumable(tmp_path).path == tmp_path / "checkpoint-3"


class Meddling(TrainerCallback):
    """Changes a weight between a save and the next update."""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 2:
            with torch.no_grad():
                model.head.weight.mul_(2)


@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_who_changes_a_weight_meanwhile_fails_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any, on_error: Any
) -> None:
    monkeypatch.setattr(safe_module.logger, "propagate", True)
    trainer = made(tmp_path, Meddling())
    SafeCheckpointer("thread", lazy=True, on_error=on_error).attach(trainer)
    message = "checkpoint-2 could not be saved (RefusedError: 1 of 16 tensors were changed between a save"
    if on_error == "raise":
        with pytest.raises(OSError) as told:
            trainer.train()
        assert message in str(told.value) and "lazy=False" in str(told.value)
    else:
        trainer.train()
        assert message in caplog.text
    left = [report.step for report in list_checkpoints(tmp_path, "content") if report.whole]
    assert left == ([1] if on_error == "raise" else [1, 3, 4])
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_an_error_after_a_save_leaves_the_checkpoint(tmp_path: Path) -> None:
    class Failing(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                raise KeyError("mine")

    trainer = made(tmp_path, SafeCheckpointCallback("thread", lazy=True), Failing())
    with pytest.raises(KeyError, match="mine"):
        trainer.train()
    assert find_resumable(tmp_path).path == tmp_path / "checkpoint-2"


def test_lazy_needs_the_background() -> None:
    for cls in (SafeCheckpointer, SafeCheckpointCallback):
        with pytest.raises(ValueError, match='lazy=True copies in the background, and mode="sync" writes at once'):
            cls(lazy=True)
