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
    "ActivationOffloadCallback": "hf_effi.callbacks.layer_modes",
    "AdaLoRACallback": "hf_effi.callbacks.adalora",
    "AttentionPattern": "hf_effi.functional.segment_attention",
    "AutoLRSCallback": "hf_effi.callbacks.auto_lrs",
    "BatchTransform": "hf_effi.trainers._batch_mixin",
    "BatchTransformMixin": "hf_effi.trainers._batch_mixin",
    "ChunkFlow": "hf_effi.parallel.chunk_flow",
    "ChunkFlowMixin": "hf_effi.trainers._chunk_mixin",
    "EffiGRPOConfig": "hf_effi.trainers.grpo_config",
    "EffiGRPOTrainer": "hf_effi.trainers.grpo",
    "EffiSFTConfig": "hf_effi.trainers.sft",
    "EffiSFTTrainer": "hf_effi.trainers.sft",
    "EffiTrainer": "hf_effi.trainers.trainer",
    "EffiTrainingArguments": "hf_effi.trainers.trainer",
    "Finding": "hf_effi.functional.doctor",
    "FusedLMHead": "hf_effi.kernels",
    "FusedLoRALinear": "hf_effi.kernels",
    "GRPODoctor": "hf_effi.callbacks.doctor",
    "GRPOLimits": "hf_effi.functional.doctor",
    "GradientSNRCallback": "hf_effi.callbacks.adaptive_lr",
    "HubCallback": "hf_effi.hub.callback",
    "HypergradientCallback": "hf_effi.callbacks.adaptive_lr",
    "KernelMismatchError": "hf_effi.kernels",
    "KernelPatchCallback": "hf_effi.callbacks.kernel_patch",
    "KernelPatchMixin": "hf_effi.trainers._kernel_mixin",
    "LRScheduleCallback": "hf_effi.callbacks.lr_schedule",
    "LayerModes": "hf_effi.parallel.layer_modes",
    "LowBitLoRALinear": "hf_effi.kernels",
    "METHODS": "hf_effi.methods",
    "MaskingRatioCurriculum": "hf_effi.trainers._masking",
    "MemoryBudgetCallback": "hf_effi.callbacks.layer_modes",
    "MetadataCollator": "hf_effi.trainers._metadata",
    "MetadataConditioning": "hf_effi.trainers._metadata",
    "Method": "hf_effi.methods",
    "Multigrid": "hf_effi.functional.curriculum",
    "MultigridLRCallback": "hf_effi.callbacks.multigrid",
    "PatchCallback": "hf_effi.callbacks.patch",
    "PatchError": "hf_effi.kernels",
    "RandomLTDCallback": "hf_effi.callbacks.random_ltd",
    "RunRecordCallback": "hf_effi.callbacks.run_record",
    "SamplerCallback": "hf_effi.callbacks.sampler",
    "SamplerMixin": "hf_effi.trainers._sampler_mixin",
    "Schedule": "hf_effi.functional.schedules",
    "SelectiveCheckpointCallback": "hf_effi.callbacks.layer_modes",
    "SequenceLengthMixin": "hf_effi.trainers._length_mixin",
    "SequenceParallelArguments": "hf_effi.trainers._sequence_parallel",
    "SequenceParallelError": "hf_effi.parallel",
    "SequenceParallelMixin": "hf_effi.trainers._sequence_parallel",
    "SharedPrefixCollator": "hf_effi.trainers._prefix_collator",
    "TokenBudgetBatchSampler": "hf_effi.samplers",
    "TokenCounter": "hf_effi.functional.schedules",
    "TrainDoctor": "hf_effi.callbacks.doctor",
    "TrainLimits": "hf_effi.functional.doctor",
    "UL2Denoising": "hf_effi.trainers._denoising",
    "WeightAveragingCallback": "hf_effi.callbacks.weight_averaging",
    "accelerate_config": "hf_effi.recipes.launch",
    "average_checkpoints": "hf_effi.callbacks.average_checkpoints",
    "branch_cooldown": "hf_effi.callbacks.branch",
    "cdma": "hf_effi.recipes",
    "cma": "hf_effi.recipes",
    "constant": "hf_effi.functional.schedules",
    "cosine": "hf_effi.functional.schedules",
    "cosine_power": "hf_effi.functional.schedules",
    "damped_cosine": "hf_effi.functional.schedules",
    "extend_rope": "hf_effi.recipes.long_context",
    "extend_to": "hf_effi.functional.schedules",
    "from_card": "hf_effi.hub.recipe",
    "group_by_prompt": "hf_effi.trainers._prefix_collator",
    "infinite": "hf_effi.functional.schedules",
    "inverse_sqrt": "hf_effi.functional.schedules",
    "join": "hf_effi.functional.schedules",
    "lambda_patterns": "hf_effi.recipes.long_context",
    "layerwise_param_groups": "hf_effi.functional.schedules",
    "linear": "hf_effi.functional.schedules",
    "longgen_patterns": "hf_effi.recipes.long_context",
    "lr_range_test": "hf_effi.callbacks.lr_range_test",
    "one_cycle": "hf_effi.functional.schedules",
    "patch": "hf_effi.kernels",
    "plan_memory": "hf_effi.report.plan_memory",
    "plan_shared_prefix": "hf_effi.functional.shared_prefix",
    "plot_schedules": "hf_effi.report.schedule_plot",
    "power": "hf_effi.functional.schedules",
    "prolong_stages": "hf_effi.recipes.long_context",
    "read_run": "hf_effi._run_record",
    "refined_by_gradient_norm": "hf_effi.functional.schedules",
    "register_varlen_attention": "hf_effi.parallel.varlen",
    "rewarm_redecay": "hf_effi.functional.schedules",
    "rex": "hf_effi.functional.schedules",
    "scale": "hf_effi.functional.schedules",
    "set_attention_patterns": "hf_effi.parallel.varlen",
    "slow_start_fast_decay": "hf_effi.functional.schedules",
    "stability_gap": "hf_effi.recipes",
    "stream_layers": "hf_effi.parallel.stream_layer",
    "table": "hf_effi.functional.schedules",
    "tile_loss": "hf_effi.parallel.tiled_loss",
    "tile_mlp": "hf_effi.kernels.tiled_mlp",
    "tiled_cross_entropy": "hf_effi.parallel.tiled_loss",
    "to_lambda_lr": "hf_effi.functional.schedules",
    "token_indexed": "hf_effi.functional.schedules",
    "triangular": "hf_effi.functional.schedules",
    "uba": "hf_effi.functional.schedules",
    "unpatch": "hf_effi.kernels",
    "wsd": "hf_effi.functional.schedules",
    "wsd_s": "hf_effi.functional.schedules",
    "wsdc": "hf_effi.functional.schedules",
}

__all__ = ["__version__", *sorted(_PUBLIC)]

if TYPE_CHECKING:  # what editors and type checkers see of the lazy names
    from ._run_record import read_run  # noqa: F401
    from .callbacks.adalora import AdaLoRACallback  # noqa: F401
    from .callbacks.adaptive_lr import AccuracyGradientCallback, GradientSNRCallback, HypergradientCallback  # noqa: F401
    from .callbacks.auto_lrs import AutoLRSCallback  # noqa: F401
    from .callbacks.average_checkpoints import average_checkpoints  # noqa: F401
    from .callbacks.branch import branch_cooldown  # noqa: F401
    from .callbacks.doctor import GRPODoctor, TrainDoctor  # noqa: F401
    from .callbacks.kernel_patch import KernelPatchCallback  # noqa: F401
    from .callbacks.layer_modes import (  # noqa: F401
        ActivationOffloadCallback,
        MemoryBudgetCallback,
        SelectiveCheckpointCallback,
    )
    from .callbacks.lr_range_test import lr_range_test  # noqa: F401
    from .callbacks.lr_schedule import LRScheduleCallback  # noqa: F401
    from .callbacks.multigrid import MultigridLRCallback  # noqa: F401
    from .callbacks.patch import PatchCallback  # noqa: F401
    from .callbacks.random_ltd import RandomLTDCallback  # noqa: F401
    from .callbacks.run_record import RunRecordCallback  # noqa: F401
    from .callbacks.sampler import SamplerCallback  # noqa: F401
    from .callbacks.weight_averaging import WeightAveragingCallback  # noqa: F401
    from .functional.curriculum import Multigrid  # noqa: F401
    from .functional.doctor import Finding, GRPOLimits, TrainLimits  # noqa: F401
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
    from .functional.segment_attention import AttentionPattern  # noqa: F401
    from .functional.shared_prefix import plan_shared_prefix  # noqa: F401
    from .hub.callback import HubCallback  # noqa: F401
    from .hub.recipe import from_card  # noqa: F401
    from .kernels import (  # noqa: F401  # noqa: F401
        FusedLMHead,
        FusedLoRALinear,
        KernelMismatchError,
        LowBitLoRALinear,
        PatchError,
        patch,
        unpatch,
    )
    from .kernels.tiled_mlp import tile_mlp  # noqa: F401
    from .methods import METHODS, Method  # noqa: F401
    from .parallel import SequenceParallelError  # noqa: F401
    from .parallel.chunk_flow import ChunkFlow  # noqa: F401
    from .parallel.layer_modes import LayerModes  # noqa: F401
    from .parallel.stream_layer import stream_layers  # noqa: F401
    from .parallel.tiled_loss import tile_loss, tiled_cross_entropy  # noqa: F401
    from .parallel.varlen import register_varlen_attention, set_attention_patterns  # noqa: F401
    from .recipes import cdma, cma, stability_gap  # noqa: F401
    from .recipes.launch import accelerate_config  # noqa: F401
    from .recipes.long_context import extend_rope, lambda_patterns, longgen_patterns, prolong_stages  # noqa: F401
    from .report.plan_memory import plan_memory  # noqa: F401
    from .report.schedule_plot import plot_schedules  # noqa: F401
    from .samplers import TokenBudgetBatchSampler  # noqa: F401
    from .trainers._batch_mixin import BatchTransform, BatchTransformMixin  # noqa: F401
    from .trainers._chunk_mixin import ChunkFlowMixin  # noqa: F401
    from .trainers._denoising import UL2Denoising  # noqa: F401
    from .trainers._kernel_mixin import KernelPatchMixin  # noqa: F401
    from .trainers._length_mixin import SequenceLengthMixin  # noqa: F401
    from .trainers._masking import MaskingRatioCurriculum  # noqa: F401
    from .trainers._metadata import MetadataCollator, MetadataConditioning  # noqa: F401
    from .trainers._prefix_collator import SharedPrefixCollator, group_by_prompt  # noqa: F401
    from .trainers._sampler_mixin import SamplerMixin  # noqa: F401
    from .trainers._sequence_parallel import SequenceParallelArguments, SequenceParallelMixin  # noqa: F401
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
