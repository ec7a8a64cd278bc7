"""What any Trainer can take: mixins for trainer classes of your own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..._faces import face

#: public name -> module that defines it
_PUBLIC = {
    "AttentionCheckMixin": "hf_effi.trainers.mixins.attention",
    "BatchTransformMixin": "hf_effi.trainers.mixins.batch_transform",
    "ChunkFlowMixin": "hf_effi.trainers.mixins.chunk_flow",
    "HubArguments": "hf_effi.trainers.mixins.hub",
    "HubMixin": "hf_effi.trainers.mixins.hub",
    "KernelArguments": "hf_effi.trainers.mixins.kernel_patch",
    "KernelPatchMixin": "hf_effi.trainers.mixins.kernel_patch",
    "OptimizerArguments": "hf_effi.trainers.mixins.optimizer",
    "OptimizerMixin": "hf_effi.trainers.mixins.optimizer",
    "LocalUpdates": "hf_effi.functional.local_updates",
    "LocalUpdatesMixin": "hf_effi.trainers.mixins.local_updates",
    "ResumeMixin": "hf_effi.trainers.mixins.resume",
    "RunRecordArguments": "hf_effi.trainers.mixins.run_record",
    "RunRecordMixin": "hf_effi.trainers.mixins.run_record",
    "SafeCheckpointArguments": "hf_effi.trainers.mixins.safe_checkpoint",
    "SafeCheckpointMixin": "hf_effi.trainers.mixins.safe_checkpoint",
    "SamplerMixin": "hf_effi.trainers.mixins.sampler",
    "ScheduleArguments": "hf_effi.trainers.mixins.schedule",
    "ScheduleMixin": "hf_effi.trainers.mixins.schedule",
    "SequenceLengthMixin": "hf_effi.trainers.mixins.sequence_length",
    "SequenceParallelArguments": "hf_effi.trainers.mixins.sequence_parallel",
    "SequenceParallelMixin": "hf_effi.trainers.mixins.sequence_parallel",
}

if TYPE_CHECKING:  # what editors, type checkers and the reference see of the lazy names
    from ...functional.local_updates import LocalUpdates as LocalUpdates
    from .attention import AttentionCheckMixin as AttentionCheckMixin
    from .batch_transform import BatchTransformMixin as BatchTransformMixin
    from .chunk_flow import ChunkFlowMixin as ChunkFlowMixin
    from .hub import HubArguments as HubArguments
    from .hub import HubMixin as HubMixin
    from .kernel_patch import KernelArguments as KernelArguments
    from .kernel_patch import KernelPatchMixin as KernelPatchMixin
    from .local_updates import LocalUpdatesMixin as LocalUpdatesMixin
    from .optimizer import OptimizerArguments as OptimizerArguments
    from .optimizer import OptimizerMixin as OptimizerMixin
    from .resume import ResumeMixin as ResumeMixin
    from .run_record import RunRecordArguments as RunRecordArguments
    from .run_record import RunRecordMixin as RunRecordMixin
    from .safe_checkpoint import SafeCheckpointArguments as SafeCheckpointArguments
    from .safe_checkpoint import SafeCheckpointMixin as SafeCheckpointMixin
    from .sampler import SamplerMixin as SamplerMixin
    from .schedule import ScheduleArguments as ScheduleArguments
    from .schedule import ScheduleMixin as ScheduleMixin
    from .sequence_length import SequenceLengthMixin as SequenceLengthMixin
    from .sequence_parallel import SequenceParallelArguments as SequenceParallelArguments
    from .sequence_parallel import SequenceParallelMixin as SequenceParallelMixin

__getattr__, __dir__, __all__ = face(__name__, _PUBLIC)
