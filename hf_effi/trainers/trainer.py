"""`EffiTrainer`: `transformers.Trainer` with hf_effi's methods in its config."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import Trainer, TrainingArguments

from ._common import EffiArguments, EffiMixin
from .mixins._signatures import with_signatures_of


@dataclass
class EffiTrainingArguments(EffiArguments, TrainingArguments):
    """
    `TrainingArguments` plus `lr_schedule`, `lr_schedule_kwargs`, `lr_schedule_on_mismatch`, `sequence_parallel_size`,
    `kernel_patch`, `run_record`, `hub_wait_seconds`, `safe_checkpoints` and `optim_groups`.

    Example:
    ```python
    args = EffiTrainingArguments("out", lr_schedule="wsd", lr_schedule_kwargs={"warmup_steps": 100})
    ```
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "lr_schedule_kwargs", "kernel_patch", "optim_groups"]


@with_signatures_of(Trainer)
class EffiTrainer(EffiMixin, Trainer):
    """
    `transformers.Trainer` that follows `args.lr_schedule`, takes a `train_sampler`, holds `args.kernel_patch` while it
    trains and splits sequences over `args.sequence_parallel_size` ranks. With every method off it is the stock Trainer
    to the bit.

    Example:
    ```python
    trainer = EffiTrainer(model, EffiTrainingArguments("out", lr_schedule="wsd"), train_dataset=dataset)
    ```
    """
