"""What the Effi trainers and their configs have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .mixins.attention import AttentionCheckMixin
from .mixins.hub import HubArguments, HubMixin
from .mixins.kernel_patch import KernelArguments, KernelPatchMixin, layers_from_config
from .mixins.optimizer import OptimizerArguments, OptimizerMixin
from .mixins.resume import ResumeMixin
from .mixins.run_record import RunRecordArguments, RunRecordMixin
from .mixins.safe_checkpoint import SafeCheckpointArguments, SafeCheckpointMixin
from .mixins.sampler import SamplerMixin
from .mixins.schedule import ScheduleArguments, ScheduleMixin
from .mixins.sequence_parallel import SequenceParallelArguments, SequenceParallelMixin, resolve_size


@dataclass
class EffiArguments(
    KernelArguments,
    HubArguments,
    RunRecordArguments,
    SafeCheckpointArguments,
    ScheduleArguments,
    SequenceParallelArguments,
    OptimizerArguments,
):
    """
    The fields that every Effi config gains: `lr_schedule`, `lr_schedule_kwargs`, `lr_schedule_on_mismatch`,
    `sequence_parallel_size`, `kernel_patch`, `run_record`, `hub_wait_seconds`, `safe_checkpoints` and `optim_groups`;
    `optim` takes the names of [`optimizer_names`] too.
    """


class EffiMixin(
    SafeCheckpointMixin,
    ResumeMixin,
    AttentionCheckMixin,
    KernelPatchMixin,
    SamplerMixin,
    HubMixin,
    RunRecordMixin,
    ScheduleMixin,
    SequenceParallelMixin,
    OptimizerMixin,
):
    """What every Effi trainer can do beside its base: follow these fields, and take a `train_sampler`."""


def check_config(args: Any) -> None:
    """
    Check the fields that the mixins read when a trainer is built, which is after its model was loaded.

    Raises:
        ValueError: a kernel patch or a sequence parallel size that no trainer would take, or an option of GRPO whose
            method is off.
    """
    layers_from_config(args)
    resolve_size(None, args.sequence_parallel_size)
    if hasattr(args, "prune_rate"):
        from .grpo.selection_objects import SelectionObjects  # which imports this module
        from .grpo.settings import GRPOSettings

        SelectionObjects().check(GRPOSettings.of(args))
