"""`EffiSFTTrainer`: `trl.SFTTrainer` with hf_effi's methods in its config."""

from __future__ import annotations

from dataclasses import dataclass

from trl import SFTConfig, SFTTrainer

from ._kernel_mixin import KernelArguments, KernelPatchMixin
from ._sampler_mixin import SamplerMixin
from ._schedule_mixin import ScheduleArguments, ScheduleMixin


@dataclass
class EffiSFTConfig(KernelArguments, ScheduleArguments, SFTConfig):
    """`SFTConfig` plus `lr_schedule`, `lr_schedule_kwargs`, `lr_schedule_on_mismatch` and `kernel_patch`."""

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "lr_schedule_kwargs", "kernel_patch"]


class EffiSFTTrainer(KernelPatchMixin, SamplerMixin, ScheduleMixin, SFTTrainer):
    """
    `trl.SFTTrainer` that follows `args.lr_schedule`, holds `args.kernel_patch` while it trains and takes a `train_sampler`.

    With every method off it is the stock one to the bit.
    """
