"""`EffiSFTTrainer`: `trl.SFTTrainer` with hf_effi's methods in its config."""

from __future__ import annotations

from dataclasses import dataclass

from trl import SFTConfig, SFTTrainer

from ._common import EffiArguments, EffiMixin


@dataclass
class EffiSFTConfig(EffiArguments, SFTConfig):
from ._hub_mixin import HubArguments, HubMixin
from ._kernel_mixin import KernelArguments, KernelPatchMixin
from ._record_mixin import RunRecordArguments, RunRecordMixin
from ._sampler_mixin import SamplerMixin
from ._schedule_mixin import ScheduleArguments, ScheduleMixin
from ._sequence_parallel import SequenceParallelArguments, SequenceParallelMixin


@dataclass
class EffiSFTConfig(
    HubArguments, KernelArguments, RunRecordArguments, ScheduleArguments, SequenceParallelArguments, SFTConfig
):
    """
    `SFTConfig` plus `lr_schedule`, `lr_schedule_kwargs`, `lr_schedule_on_mismatch`, `sequence_parallel_size`,
    `kernel_patch`, `run_record` and `hub_wait_seconds`.
    """

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "lr_schedule_kwargs", "kernel_patch"]


class EffiSFTTrainer(EffiMixin, SFTTrainer):
class EffiSFTTrainer(
    KernelPatchMixin, SamplerMixin, HubMixin, RunRecordMixin, ScheduleMixin, SequenceParallelMixin, SFTTrainer
):
    """
    `trl.SFTTrainer` that follows `args.lr_schedule`, takes a `train_sampler`, holds `args.kernel_patch` while it trains
    and splits sequences over `args.sequence_parallel_size` ranks, packed ones included. With every method off it is the
    stock one to the bit.
    """
