"""hf_effi: keep the Trainer you have, add one line, train for less.

Public names are loaded on first use: `import hf_effi` imports neither trl nor triton.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

#: public name -> module that defines it
_PUBLIC = {
    "AccuracyGradientCallback": "hf_effi.callbacks.adaptive_lr",
    "AutoLRSCallback": "hf_effi.callbacks.auto_lrs",
    "BatchTransform": "hf_effi.trainers._batch_mixin",
    "BatchTransformMixin": "hf_effi.trainers._batch_mixin",
    "EffiGRPOConfig": "hf_effi.trainers.grpo_config",
    "EffiGRPOTrainer": "hf_effi.trainers.grpo",
    "EffiSFTConfig": "hf_effi.trainers.sft",
    "EffiSFTTrainer": "hf_effi.trainers.sft",
    "EffiTrainer": "hf_effi.trainers.trainer",
    "EffiTrainingArguments": "hf_effi.trainers.trainer",
    "FusedLMHead": "hf_effi.kernels.trl_head",
    "FusedLoRALinear": "hf_effi.kernels.fused_lora",
    "GradientSNRCallback": "hf_effi.callbacks.adaptive_lr",
    "HypergradientCallback": "hf_effi.callbacks.adaptive_lr",
    "KernelMismatchError": "hf_effi.kernels",
    "KernelPatchCallback": "hf_effi.callbacks.kernel_patch",
    "KernelPatchMixin": "hf_effi.trainers._kernel_mixin",
    "LRScheduleCallback": "hf_effi.callbacks.lr_schedule",
    "METHODS": "hf_effi.methods",
    "Method": "hf_effi.methods",
    "MaskingRatioCurriculum": "hf_effi.trainers._masking",
    "MetadataCollator": "hf_effi.trainers._metadata",
    "MetadataConditioning": "hf_effi.trainers._metadata",
    "PatchError": "hf_effi.kernels",
    "SamplerCallback": "hf_effi.callbacks.sampler",
    "SamplerMixin": "hf_effi.trainers._sampler_mixin",
    "SequenceLengthMixin": "hf_effi.trainers._length_mixin",
    "Schedule": "hf_effi.functional.schedules",
    "TokenCounter": "hf_effi.functional.schedules",
    "branch_cooldown": "hf_effi.callbacks.branch",
    "constant": "hf_effi.functional.schedules",
    "cosine": "hf_effi.functional.schedules",
    "cosine_power": "hf_effi.functional.schedules",
    "damped_cosine": "hf_effi.functional.schedules",
    "extend_to": "hf_effi.functional.schedules",
    "infinite": "hf_effi.functional.schedules",
    "inverse_sqrt": "hf_effi.functional.schedules",
    "join": "hf_effi.functional.schedules",
    "layerwise_param_groups": "hf_effi.functional.schedules",
    "linear": "hf_effi.functional.schedules",
    "lr_range_test": "hf_effi.callbacks.lr_range_test",
    "one_cycle": "hf_effi.functional.schedules",
    "patch": "hf_effi.kernels",
    "plot_schedules": "hf_effi.report.schedule_plot",
    "power": "hf_effi.functional.schedules",
    "refined_by_gradient_norm": "hf_effi.functional.schedules",
    "rewarm_redecay": "hf_effi.functional.schedules",
    "rex": "hf_effi.functional.schedules",
    "scale": "hf_effi.functional.schedules",
    "slow_start_fast_decay": "hf_effi.functional.schedules",
    "table": "hf_effi.functional.schedules",
    "to_lambda_lr": "hf_effi.functional.schedules",
    "token_indexed": "hf_effi.functional.schedules",
    "triangular": "hf_effi.functional.schedules",
    "uba": "hf_effi.functional.schedules",
    "wsd": "hf_effi.functional.schedules",
    "wsd_s": "hf_effi.functional.schedules",
    "wsdc": "hf_effi.functional.schedules",
}

__all__ = ["__version__", *sorted(_PUBLIC)]

if TYPE_CHECKING:  # what editors and type checkers see of the lazy names
    from .callbacks.adaptive_lr import AccuracyGradientCallback, GradientSNRCallback, HypergradientCallback  # noqa: F401
    from .callbacks.auto_lrs import AutoLRSCallback  # noqa: F401
    from .callbacks.branch import branch_cooldown  # noqa: F401
    from .callbacks.kernel_patch import KernelPatchCallback  # noqa: F401
    from .callbacks.lr_range_test import lr_range_test  # noqa: F401
    from .callbacks.lr_schedule import LRScheduleCallback  # noqa: F401
    from .callbacks.sampler import SamplerCallback  # noqa: F401
    from .functional.schedules import (  # noqa: F401
        Schedule,
        TokenCounter,
        constant,
        cosine,
        cosine_power,
        damped_cosine,
        extend_to,
        infinite,
        inverse_sqrt,
        join,
        layerwise_param_groups,
        linear,
        one_cycle,
        power,
        refined_by_gradient_norm,
        rewarm_redecay,
        rex,
        scale,
        slow_start_fast_decay,
        table,
        to_lambda_lr,
        token_indexed,
        triangular,
        uba,
        wsd,
        wsd_s,
        wsdc,
    )
    from .kernels import KernelMismatchError, PatchError, patch  # noqa: F401
    from .kernels.fused_lora import FusedLoRALinear  # noqa: F401
    from .kernels.trl_head import FusedLMHead  # noqa: F401
    from .methods import METHODS, Method  # noqa: F401
    from .report.schedule_plot import plot_schedules  # noqa: F401
    from .trainers._batch_mixin import BatchTransform, BatchTransformMixin  # noqa: F401
    from .trainers._kernel_mixin import KernelPatchMixin  # noqa: F401
    from .trainers._length_mixin import SequenceLengthMixin  # noqa: F401
    from .trainers._masking import MaskingRatioCurriculum  # noqa: F401
    from .trainers._metadata import MetadataCollator, MetadataConditioning  # noqa: F401
    from .trainers._sampler_mixin import SamplerMixin  # noqa: F401
    from .trainers.grpo import EffiGRPOTrainer  # noqa: F401
    from .trainers.grpo_config import EffiGRPOConfig  # noqa: F401
    from .trainers.sft import EffiSFTConfig, EffiSFTTrainer  # noqa: F401
    from .trainers.trainer import EffiTrainer, EffiTrainingArguments  # noqa: F401


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'hf_effi' has no attribute {name!r}. Public names: {', '.join(__all__)}.")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
