"""`EffiSFTTrainer`: `trl.SFTTrainer` with hf_effi's methods in its config."""

from __future__ import annotations

from dataclasses import dataclass

from trl import SFTConfig, SFTTrainer

from ._common import EffiArguments, EffiMixin


@dataclass
class EffiSFTConfig(EffiArguments, SFTConfig):
    """
    `SFTConfig` plus `lr_schedule`, `lr_schedule_kwargs`, `lr_schedule_on_mismatch`, `sequence_parallel_size`,
    `kernel_patch`, `run_record` and `hub_wait_seconds`.
    """

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "lr_schedule_kwargs", "kernel_patch"]


class EffiSFTTrainer(EffiMixin, SFTTrainer):
    """
    `trl.SFTTrainer` that follows `args.lr_schedule`, takes a `train_sampler`, holds `args.kernel_patch` while it trains
    and splits sequences over `args.sequence_parallel_size` ranks, packed ones included. With every method off it is the
    stock one to the bit.
    """
