"""TrainerCallbacks for a stock Trainer, and the limits and findings of its doctors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._faces import face

#: public name -> module that defines it
_PUBLIC = {
    "AccuracyGradientCallback": "hf_effi.callbacks.adaptive_lr",
    "ActivationOffloadCallback": "hf_effi.callbacks.layer_modes",
    "AdaLoRACallback": "hf_effi.callbacks.adalora",
    "AutoLRSCallback": "hf_effi.callbacks.auto_lrs",
    "BudgetPromptCallback": "hf_effi.callbacks.length_budget",
    "CauseMoment": "hf_effi.callbacks.cause_parts",
    "CausePart": "hf_effi.callbacks.cause_parts",
    "CausesCallback": "hf_effi.callbacks.causes",
    "EMACallback": "hf_effi.callbacks.ema",
    "FastForwardCallback": "hf_effi.callbacks.fast_forward",
    "Finding": "hf_effi.functional.findings",
    "ForecastCallback": "hf_effi.callbacks.forecast",
    "GRPODoctor": "hf_effi.callbacks.doctor",
    "GRPOLimits": "hf_effi.functional.findings",
    "GRPOScheduleCallback": "hf_effi.callbacks.grpo_schedule",
    "GenerationCapCallback": "hf_effi.callbacks.length_budget",
    "GradientNormsCallback": "hf_effi.callbacks.gradient_norms",
    "GradientSNRCallback": "hf_effi.callbacks.adaptive_lr",
    "HypergradientCallback": "hf_effi.callbacks.adaptive_lr",
    "InjectionCallback": "hf_effi.callbacks.injection",
    "KernelPatchCallback": "hf_effi.callbacks.kernel_patch",
    "LRScheduleCallback": "hf_effi.callbacks.lr_schedule",
    "LoaderWaitCallback": "hf_effi.callbacks.loader_wait",
    "MIGUCallback": "hf_effi.callbacks.migu",
    "MemoryBudgetCallback": "hf_effi.callbacks.layer_modes",
    "MultigridLRCallback": "hf_effi.callbacks.multigrid",
    "OSFProjectionCallback": "hf_effi.callbacks.osf",
    "PassRateHistoryCallback": "hf_effi.callbacks.pass_rate_history",
    "PatchCallback": "hf_effi.callbacks.patch",
    "QKClipCallback": "hf_effi.callbacks.qk_clip",
    "RandomLTDCallback": "hf_effi.callbacks.random_ltd",
    "ReptileCallback": "hf_effi.callbacks.reptile",
    "RewindCallback": "hf_effi.callbacks.rewind",
    "RunRecordCallback": "hf_effi.callbacks.run_record",
    "SafeCheckpointCallback": "hf_effi.callbacks.safe_checkpoint",
    "SamplerCallback": "hf_effi.callbacks.sampler",
    "ScheduleFreeCallback": "hf_effi.callbacks.schedule_free",
    "SelectiveCheckpointCallback": "hf_effi.callbacks.layer_modes",
    "Sharpness": "hf_effi.callbacks.sharpness",
    "SharpnessProbe": "hf_effi.callbacks.sharpness",
    "StabilityGapCallback": "hf_effi.callbacks.stability_gap",
    "StragglerCallback": "hf_effi.callbacks.straggler",
    "TrainDoctor": "hf_effi.callbacks.doctor",
    "TrainLimits": "hf_effi.functional.findings",
    "WeightAveragingCallback": "hf_effi.callbacks.weight_averaging",
    "in_probe": "hf_effi.callbacks.probing",
    "outside_probes": "hf_effi.callbacks.probing",
    "still3": "hf_effi.callbacks.grpo_schedule",
    "trained_steps": "hf_effi.callbacks.probing",
    "trained_total": "hf_effi.callbacks.probing",
}

if TYPE_CHECKING:  # what editors, type checkers and the reference see of the lazy names
    from ..functional.findings import Finding as Finding
    from ..functional.findings import GRPOLimits as GRPOLimits
    from ..functional.findings import TrainLimits as TrainLimits
    from .adalora import AdaLoRACallback as AdaLoRACallback
    from .adaptive_lr import AccuracyGradientCallback as AccuracyGradientCallback
    from .adaptive_lr import GradientSNRCallback as GradientSNRCallback
    from .adaptive_lr import HypergradientCallback as HypergradientCallback
    from .auto_lrs import AutoLRSCallback as AutoLRSCallback
    from .cause_parts import CauseMoment as CauseMoment
    from .cause_parts import CausePart as CausePart
    from .causes import CausesCallback as CausesCallback
    from .doctor import GRPODoctor as GRPODoctor
    from .doctor import TrainDoctor as TrainDoctor
    from .ema import EMACallback as EMACallback
    from .fast_forward import FastForwardCallback as FastForwardCallback
    from .forecast import ForecastCallback as ForecastCallback
    from .gradient_norms import GradientNormsCallback as GradientNormsCallback
    from .grpo_schedule import GRPOScheduleCallback as GRPOScheduleCallback
    from .grpo_schedule import still3 as still3
    from .injection import InjectionCallback as InjectionCallback
    from .kernel_patch import KernelPatchCallback as KernelPatchCallback
    from .layer_modes import ActivationOffloadCallback as ActivationOffloadCallback
    from .layer_modes import MemoryBudgetCallback as MemoryBudgetCallback
    from .layer_modes import SelectiveCheckpointCallback as SelectiveCheckpointCallback
    from .length_budget import BudgetPromptCallback as BudgetPromptCallback
    from .length_budget import GenerationCapCallback as GenerationCapCallback
    from .loader_wait import LoaderWaitCallback as LoaderWaitCallback
    from .lr_schedule import LRScheduleCallback as LRScheduleCallback
    from .migu import MIGUCallback as MIGUCallback
    from .multigrid import MultigridLRCallback as MultigridLRCallback
    from .osf import OSFProjectionCallback as OSFProjectionCallback
    from .pass_rate_history import PassRateHistoryCallback as PassRateHistoryCallback
    from .patch import PatchCallback as PatchCallback
    from .probing import in_probe as in_probe
    from .probing import outside_probes as outside_probes
    from .probing import trained_steps as trained_steps
    from .probing import trained_total as trained_total
    from .qk_clip import QKClipCallback as QKClipCallback
    from .random_ltd import RandomLTDCallback as RandomLTDCallback
    from .reptile import ReptileCallback as ReptileCallback
    from .rewind import RewindCallback as RewindCallback
    from .run_record import RunRecordCallback as RunRecordCallback
    from .safe_checkpoint import SafeCheckpointCallback as SafeCheckpointCallback
    from .sampler import SamplerCallback as SamplerCallback
    from .schedule_free import ScheduleFreeCallback as ScheduleFreeCallback
    from .sharpness import Sharpness as Sharpness
    from .sharpness import SharpnessProbe as SharpnessProbe
    from .stability_gap import StabilityGapCallback as StabilityGapCallback
    from .straggler import StragglerCallback as StragglerCallback
    from .weight_averaging import WeightAveragingCallback as WeightAveragingCallback

__getattr__, __dir__, __all__ = face(__name__, _PUBLIC)
