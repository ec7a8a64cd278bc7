"""
`hyperparameter_search`: a trial keeps its checkpoints in a folder of its own, and so do callbacks what belongs to
them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import HPSearchBackend

import hf_effi
from hf_effi import EffiTrainer, EffiTrainingArguments, WeightAveragingCallback
from hf_effi.callbacks._side_file import SideFileCallback
from hf_effi.checkpoint.run_folder import run_folder
from hf_effi.errors import RefusedError
from hf_effi.hub import callback as hub_callback
from tests.helpers import callback_cases, lm_dataset, push_args, tiny_qwen3
from tests.helpers.callback_cases import CASES, STEPS, PairsArguments, PairsTrainer, flat, rows, settings_of


class Trial(dict):
    """Stands for optuna's: a number, and the values that it proposes."""

    def __init__(self, number: int, **params: Any) -> None:
        super().__init__(params)
        self.number, self.params = number, params


@pytest.fixture(autouse=True)
def without_optuna(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)


def searching(trainer: Trainer, names: Any = None) -> Trainer:
    """Put a trainer into the state in which `hyperparameter_search(backend="optuna")` runs its trials."""
    trainer.hp_search_backend = HPSearchBackend.OPTUNA
    trainer.hp_space = lambda trial: trial.params
    trainer.hp_name = names
    trainer._report_to_hp_search = lambda trial, step, metrics: None
    return trainer


def search(folder: Path, name: str) -> tuple[Any, list[torch.Tensor]]:
    """Run two trials with the same values, with one callback; return it and the weights of each."""
    settings, model = settings_of([name])
    settings = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "lr_scheduler_type": "constant",
        "save_strategy": "steps",
        "save_steps": 29 if name != "AutoLRSCallback" else 10,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 3,
        "seed": 3,
        **settings,
    }
    lengths = settings.pop("sequence_length", None)
    args = PairsArguments(str(folder), **settings)
    trainer = PairsTrainer(
        args=args, model_init=model, train_dataset=rows(), eval_dataset=rows(4), sequence_length=lengths
    )
    trainer.remove_callback(PrinterCallback)
    callback = CASES[name].make(trainer)
    trainer.add_callback(callback)
    searching(trainer)
    found = []
    for number in range(2):
        trainer.train(trial=Trial(number, learning_rate=1e-2))
        found.append(flat(trainer.model))
    return callback, found


@pytest.mark.parametrize("name", sorted(CASES))
def test_every_callback_keeps_its_files_with_the_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    callback_cases.without_network(monkeypatch)
    pushed: list[Path] = []
    monkeypatch.setattr(hub_callback, "push_checkpoint", lambda uploader, out, folder, message: pushed.append(folder))
    callback, (first, second) = search(tmp_path, name)
    assert torch.equal(first, second), "the second trial is not that of a new callback"
    assert not list(tmp_path.glob("checkpoint-*"))
    folders = [folder for number in range(2) for folder in (tmp_path / f"run-{number}").glob("checkpoint-*")]
    assert all((folder / "trainer_state.json").is_file() for folder in folders)
    if isinstance(callback, SideFileCallback) and name not in callback_cases.NOTHING_TO_KEEP:
        with_file = [folder for folder in folders if (folder / callback.side_file).is_file()]
        assert {folder.parent.name for folder in with_file} == {"run-0", "run-1"}
    if name == "WeightAveragingCallback":
        assert all((tmp_path / f"run-{number}" / "averaged" / "average.json").is_file() for number in range(2))
    if name == "HubCallback":
        assert pushed and all(folder.is_dir() and folder.parent.name.startswith("run-") for folder in pushed)


def test_an_effi_trainer_and_names_of_trials(tmp_path: Path) -> None:
    args = push_args(tmp_path, EffiTrainingArguments, save_steps=3, lr_scheduler_type="constant")
    callbacks = [WeightAveragingCallback(last=3, every_steps=1)]
    trainer = EffiTrainer(
        args=args, model_init=lambda: tiny_qwen3(), train_dataset=lm_dataset(16), callbacks=callbacks
    )
    searching(trainer, lambda trial: f"lr-{trial['learning_rate']}")
    trainer.train(trial=Trial(0, learning_rate=1e-3))
    assert (tmp_path / "lr-0.001" / "checkpoint-3" / "effi_average.pt").is_file()


def test_a_state_that_no_trainer_holds_is_named(tmp_path: Path) -> None:
    state = hf_effi.checkpoint.run_folder.TrainerState(is_hyper_param_search=True)
    with pytest.raises(RefusedError, match="the folder of the trial is not known"):
        run_folder(TrainingArguments(str(tmp_path), use_cpu=True, bf16=False), state)


def test_a_checkpoint_of_a_trial_is_resumed_as_a_run_of_its_own(tmp_path: Path) -> None:
    def make(folder: Path) -> Trainer:
        callbacks = [WeightAveragingCallback(last=3, every_steps=1)]
        args = push_args(folder, save_steps=3, lr_scheduler_type="constant")
        return Trainer(args=args, model_init=lambda: tiny_qwen3(), train_dataset=lm_dataset(16), callbacks=callbacks)

    searching(make(tmp_path)).train(trial=Trial(0, learning_rate=1e-3))
    again = make(tmp_path / "run-0")
    again.train(resume_from_checkpoint=str(tmp_path / "run-0" / "checkpoint-3"))
    assert again.state.is_hyper_param_search and (tmp_path / "run-0" / "averaged" / "average.json").is_file()
