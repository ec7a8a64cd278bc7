"""`EffiSFTTrainer`: `trl.SFTTrainer` with hf_effi's methods in its config."""

from __future__ import annotations

from dataclasses import dataclass

from trl import SFTConfig, SFTTrainer

from ._sampler_mixin import SamplerMixin
from ._schedule_mixin import ScheduleArguments, ScheduleMixin


@dataclass
class EffiSFTConfig(ScheduleArguments, SFTConfig):
    """`SFTConfig` plus `lr_schedule`, `lr_schedule_kwargs` and `lr_schedule_on_mismatch`."""

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "lr_schedule_kwargs"]


class EffiSFTTrainer(SamplerMixin, ScheduleMixin, SFTTrainer):
    """`trl.SFTTrainer` that follows `args.lr_schedule` and takes a `train_sampler`. With every method off it is the stock one to the bit."""
