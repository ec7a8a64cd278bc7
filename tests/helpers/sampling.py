"""Trainers for sampler tests: they note which row numbers each step was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_effi.trainers.mixins.sampler import SamplerMixin

from .compare import record_run
from .data import lm_dataset
from .models import tiny_qwen3


class SamplerTrainer(SamplerMixin, Trainer):
    """The thin subclass that a user writes."""


class _Rows:
    """A collator that keeps the row number beside the tokens; picklable, for workers."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "labels", "row")}


def _noting(cls: type) -> type:
    class Noting(cls):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            rows = inputs.pop("row")
            self.seen.append([int(row) for row in self.accelerator.gather(rows)])
            return super().training_step(model, inputs, num_items_in_batch)

    Noting.__name__ = Noting.__qualname__ = cls.__name__
    return Noting


class StopAt(TrainerCallback):
    """Save, and end the run, after this step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def sampler_trainer(
    output_dir: str | Path, trainer_cls: type = SamplerTrainer, rows: int = 24, callbacks: Any = (), **over: Any
) -> Any:
    """
    Return an untrained trainer of 24 rows in batches of 4 whose `seen` lists the rows of every batch, all ranks.

    `train_sampler`, `eval_dataset` and other constructor arguments that are no training arguments may be given in
    `over`.
    """
    dataset = over.pop("train_dataset", None)
    if dataset is None:
        dataset = lm_dataset(rows, length=8).add_column("row", list(range(rows)))
    extra = {key: over.pop(key) for key in ("train_sampler", "eval_dataset", "compute_metrics") if key in over}
    settings: dict[str, Any] = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "num_train_epochs": 3,
        "per_device_train_batch_size": 4,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "ddp_find_unused_parameters": False,
        "seed": 7,
    }
    trainer = _noting(trainer_cls)(
        model=over.pop("model", None) or tiny_qwen3(num_hidden_layers=1),
        args=TrainingArguments(**{**settings, **over}),
        train_dataset=dataset,
        data_collator=_Rows(),
        callbacks=list(callbacks),
        **extra,
    )
    trainer.seen = []
    return trainer


def stop_and_resume(output_dir: str | Path, make: Any, step: int) -> tuple[Any, Any, list[list[int]]]:
    """
    Train once without a break and once stopped after `step`; `make(folder, callbacks)` builds the trainer.

    Returns:
        The two [`Run`]s and the rows of the broken run, before and after the break; compare with `Run.rows`.
    """
    whole = make(Path(output_dir) / "whole", [])
    whole.train()
    first = make(Path(output_dir) / "broken", [StopAt(step)])
    first.train()
    second = make(Path(output_dir) / "broken", [])
    second.train(resume_from_checkpoint=str(Path(output_dir) / "broken" / f"checkpoint-{step}"))
    runs = record_run(whole), record_run(second)
    for run in runs:  # the run summary of a resumed run averages over its own steps only
        run.log_history = [entry for entry in run.log_history if "train_runtime" not in entry]
    return (*runs, [whole.seen, first.seen + second.seen])


def ragged_rows(lengths: list[int]) -> list[dict[str, Any]]:
    """Return rows of these lengths for a plain `Trainer`, numbered in the column `row`."""
    tokens = lm_dataset(len(lengths), length=max(lengths))["input_ids"]
    return [{"input_ids": tokens[i][:length], "row": i} for i, length in enumerate(lengths)]


def pad_rows(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Collate [`ragged_rows`]: padded on the right, no loss on padding."""
    width = max(len(row["input_ids"]) for row in rows)

    def padded(fill: int, key: str | None = None) -> torch.Tensor:
        cells = [row[key] if key else [1] * len(row["input_ids"]) for row in rows]
        return torch.tensor([cell + [fill] * (width - len(cell)) for cell in cells])

    return {
        "input_ids": padded(0, "input_ids"),
        "attention_mask": padded(0),
        "labels": padded(-100, "input_ids"),
        "row": torch.tensor([row["row"] for row in rows]),
    }


def ragged_trainer(output_dir: str | Path, lengths: list[int], sampler: Any = None, callbacks: Any = (), **over: Any):
    """
    Return an untrained trainer of [`ragged_rows`] whose `seen` lists the rows of every micro-batch of this process.
    """

    class Noting(over.pop("trainer_cls", SamplerTrainer)):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            self.seen.append(inputs.pop("row").tolist())
            return super().training_step(model, inputs, num_items_in_batch)

    settings: dict[str, Any] = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "num_train_epochs": 2,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "ddp_find_unused_parameters": False,
        "seed": 7,
    }
    trainer = Noting(
        model=over.pop("model", None) or tiny_qwen3(num_hidden_layers=1),
        args=TrainingArguments(**{**settings, **over}),
        train_dataset=ragged_rows(lengths),
        data_collator=pad_rows,
        callbacks=list(callbacks),
        **({} if sampler is None else {"train_sampler": sampler}),
    )
    trainer.seen = []
    return trainer
