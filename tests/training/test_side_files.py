"""A Trainer pushes before it calls `on_save`: what callbacks store is there when the upload looks at the folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from peft import AdaLoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback

from hf_effi import RunRecordCallback, WeightAveragingCallback
from hf_effi.callbacks import AdaLoRACallback, AutoLRSCallback, HypergradientCallback
from hf_effi.callbacks.reptile import ReptileCallback
from hf_effi.samplers import ShuffledSampler
from hf_effi.trainers.mixins import SamplerMixin
from tests.helpers import lm_dataset, push_args, tiny_qwen3


class Hub:
    """Stands for the Hub's client, and notes what lies in a folder at the moment of its upload."""

    def __init__(self) -> None:
        self.seen: dict[str, list[str]] = {}
        self.records: list[str] = []

    def upload_folder(self, *, folder_path: str, **kwargs: Any) -> Future[None]:
        folder = Path(folder_path)
        self.seen[folder.name] = sorted(path.name for path in folder.iterdir())
        if (folder / "effi" / "effi_events.jsonl").exists():
            self.records.append((folder / "effi" / "effi_events.jsonl").read_text())
        done: Future[None] = Future()
        done.set_result(None)
        return done


class Pushing(Trainer):
    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        self.hub_model_id, self.push_in_progress = "tester/run", None


class Ordered(SamplerMixin, Pushing):
    pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    client = Hub()
    monkeypatch.setattr("transformers.trainer.hf_api", lambda *args, **kwargs: client)
    return client


def train(folder: Path, callback: TrainerCallback, model: Any = None, cls: type = Pushing, **over: Any) -> Any:
    kwargs = {"train_sampler": over.pop("train_sampler")} if "train_sampler" in over else {}
    settings = {"push_to_hub": True, "hub_strategy": "all_checkpoints", "hub_always_push": True, "save_steps": 3}
    settings["lr_scheduler_type"] = "constant"
    args = push_args(folder, **{**settings, **over})
    callbacks = [] if callback is None else [callback]
    trainer = cls(model or tiny_qwen3(), args, train_dataset=lm_dataset(16), callbacks=callbacks, **kwargs)
    trainer.train()
    return trainer


def adalora() -> Any:
    config = AdaLoraConfig(init_r=4, target_r=2, tinit=1, tfinal=1, deltaT=1, total_step=4, target_modules=["q_proj"])
    return get_peft_model(tiny_qwen3(), config)


CASES: dict[str, Callable[[Path], Any]] = {
    "effi_reptile.pt": lambda folder: train(folder, ReptileCallback(2, 0.5)),
    "effi_average.pt": lambda folder: train(folder, WeightAveragingCallback(last=3, every_steps=1)),
    "hf_effi_hypergradient.pt": lambda folder: train(folder, HypergradientCallback()),
    "effi_adalora.pt": lambda folder: train(folder, AdaLoRACallback(), adalora()),
    # The first search takes six updates.
    "hf_effi_auto_lrs_0.pt": lambda folder: train(
        folder,
        AutoLRSCallback(1e-4, 1e-2, stage_steps=6, probes=2, validation=False),
        max_steps=14,
    ),
    "effi_sampler.pt": lambda folder: train(folder, None, cls=Ordered, train_sampler=ShuffledSampler(16)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_file_is_there_when_the_checkpoint_is_pushed(tmp_path: Path, hub: Hub, name: str) -> None:
    CASES[name](tmp_path / "out")
    assert name in hub.seen["checkpoint-3"] and "trainer_state.json" in hub.seen["checkpoint-3"]
    assert not [other for other in hub.seen["checkpoint-3"] if other.startswith("_")]


def test_the_file_is_written_once_a_save_and_at_every_save(tmp_path: Path, hub: Hub, monkeypatch: Any) -> None:
    written: list[tuple[str, int]] = []
    monkeypatch.setattr(
        "hf_effi.callbacks._side_file.save_state", lambda path, state: written.append((path.parent.name, len(state)))
    )
    callback = WeightAveragingCallback(last=4, every_steps=1)
    for pushed in (True, False):
        train(tmp_path, callback, save_steps=1, push_to_hub=pushed)
    steps = [f"checkpoint-{step}" for step in (1, 2, 3, 4)]
    assert [folder for folder, _ in written] == steps * 2


def test_a_finished_model_is_pushed_without_touching_the_last_checkpoint(tmp_path: Path, hub: Hub) -> None:
    trainer = train(tmp_path, AdaLoRACallback(), adalora(), save_steps=4)
    path = tmp_path / "checkpoint-4" / "effi_adalora.pt"
    before = path.stat().st_mtime_ns
    trainer.callback_handler.on_push_begin(trainer.args, trainer.state, trainer.control)  # as push_to_hub() does
    assert path.stat().st_mtime_ns == before


def test_the_pushed_record_knows_of_the_checkpoint(tmp_path: Path, hub: Hub) -> None:
    train(tmp_path / "out", RunRecordCallback())
    for number, text in enumerate(hub.records, 1):
        kinds = [json.loads(line)["event"] for line in text.splitlines()]
        assert kinds.count("checkpoint") == number and kinds[-1] == "checkpoint"
    events = [json.loads(line) for line in (tmp_path / "out" / "effi" / "effi_events.jsonl").read_text().splitlines()]
    assert [event["path"] for event in events if event["event"] == "checkpoint"] == ["checkpoint-3", "checkpoint-4"]


def test_an_average_does_not_replace_what_is_no_average(tmp_path: Path) -> None:
    (tmp_path / "averaged").mkdir()
    (tmp_path / "averaged" / "thesis.tex").write_text("...")
    with pytest.raises(ValueError, match="averaged exists and holds no average.*Choose another folder="):
        train(tmp_path, WeightAveragingCallback(last=1), push_to_hub=False)
    assert (tmp_path / "averaged" / "thesis.tex").exists()
    for _ in range(2):  # its own it does replace
        train(tmp_path, WeightAveragingCallback(last=1, folder="mean"), push_to_hub=False)
    assert (tmp_path / "mean" / "average.json").exists() and not list(tmp_path.glob("_*"))
