"""`EffiSFTTrainer`: `trl.SFTTrainer` with hf_effi's methods in its config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import datasets
from trl import SFTConfig, SFTTrainer

from ._common import EffiArguments, EffiMixin
from .mixins._signatures import with_signatures_of


@dataclass
class EffiSFTConfig(EffiArguments, SFTConfig):
    """
    `SFTConfig` plus `lr_schedule`, `lr_schedule_kwargs`, `lr_schedule_on_mismatch`, `sequence_parallel_size`,
    `kernel_patch`, `run_record`, `hub_wait_seconds`, `safe_checkpoints` and `optim_groups`.
    """

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "lr_schedule_kwargs", "kernel_patch", "optim_groups"]


@with_signatures_of(SFTTrainer)
class EffiSFTTrainer(EffiMixin, SFTTrainer):
    """
    `trl.SFTTrainer` that follows `args.lr_schedule`, takes a `train_sampler`, holds `args.kernel_patch` while it
    trains and splits sequences over `args.sequence_parallel_size` ranks, packed ones included. With every method off
    it is the stock one to the bit.
    """

    def __init__(
        self,
        model: Any,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        *rest: Any,
        **kwargs: Any,
    ):
        if data_collator is None and kwargs.get("formatting_func") is None:
            _check_columns(train_dataset, args)
        super().__init__(model, args, data_collator, train_dataset, *rest, **kwargs)


def _check_columns(dataset: Any, args: Any) -> None:
    """Say what is missing before a model is loaded; stock stops with a `KeyError` while it tokenizes."""
    if not isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
        return  # TRL says what it takes
    columns = dataset.column_names
    if not columns or (getattr(args, "dataset_kwargs", None) or {}).get("skip_prepare_dataset"):
        return
    text = getattr(args, "dataset_text_field", "text")
    if {text, "messages", "conversations", "input_ids"} & set(columns) or {"prompt", "completion"} <= set(columns):
        return
    old, new = (columns[-1], "completion") if "prompt" in columns else (columns[0], text)
    raise ValueError(
        f"train_dataset has nothing to train on: its columns are {', '.join(map(str, columns))}. SFT reads `{text}` "
        "(named by dataset_text_field), `messages`, `prompt` together with `completion`, or `input_ids`. Rename "
        f"columns, e.g. dataset.rename_column({old!r}, {new!r})."
    )
