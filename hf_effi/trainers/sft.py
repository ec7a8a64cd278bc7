"""`EffiSFTTrainer`: `trl.SFTTrainer` with hf_effi's methods in its config."""

from __future__ import annotations

from dataclasses import dataclass

from trl import SFTConfig, SFTTrainer

from ._sampler_mixin import SamplerMixin
from ._schedule_mixin import ScheduleArguments, ScheduleMixin
from ._sequence_parallel import SequenceParallelArguments, SequenceParallelMixin


@dataclass
class EffiSFTConfig(ScheduleArguments, SequenceParallelArguments, SFTConfig):
    """
    `SFTConfig` plus `lr_schedule`, `lr_schedule_kwargs`, `lr_schedule_on_mismatch` and `sequence_parallel_size`.
    """

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "lr_schedule_kwargs"]


class EffiSFTTrainer(SamplerMixin, ScheduleMixin, SequenceParallelMixin, SFTTrainer):
    """
    `trl.SFTTrainer` that follows `args.lr_schedule`, takes a `train_sampler` and splits sequences over
    `args.sequence_parallel_size` ranks, packed ones included. With every method off it is the stock one to the bit.
    """
