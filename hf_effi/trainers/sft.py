"""`EffiSFTTrainer`: `trl.SFTTrainer` with hf_effi's methods in its config."""

from __future__ import annotations

from dataclasses import dataclass

from trl import SFTConfig, SFTTrainer

from ._hub_mixin import HubArguments, HubMixin
from ._record_mixin import RunRecordArguments, RunRecordMixin
from ._sampler_mixin import SamplerMixin
from ._schedule_mixin import ScheduleArguments, ScheduleMixin


@dataclass
class EffiSFTConfig(HubArguments, RunRecordArguments, ScheduleArguments, SFTConfig):
    """`SFTConfig` plus `lr_schedule`, `lr_schedule_kwargs`, `lr_schedule_on_mismatch` and `run_record`."""

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "lr_schedule_kwargs"]


class EffiSFTTrainer(HubMixin, RunRecordMixin, SamplerMixin, ScheduleMixin, SFTTrainer):
    """`trl.SFTTrainer` that follows `args.lr_schedule` and takes a `train_sampler`. With every method off it is the stock one to the bit."""
