"""Settings of papers, as functions that return trainer keyword arguments, configs, and launch files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._faces import face

#: public name -> module that defines it
_PUBLIC = {
    "ClassGaussians": "hf_effi.recipes.classifier_alignment",
    "CyclicalReflection": "hf_effi.recipes.reflection",
    "GradientProbe": "hf_effi.recipes.gradient_probe",
    "LongContextStage": "hf_effi.recipes.long_context",
    "OneEpochSize": "hf_effi.functional.advice",
    "OptimizerAdvice": "hf_effi.functional.optimizer_table",
    "PDRRollouts": "hf_effi.recipes.refine",
    "RewardBenchResult": "hf_effi.recipes.reward_bench",
    "VerifiedReward": "hf_effi.recipes.rl",
    "WeightNormReport": "hf_effi.functional.weight_norms",
    "accelerate_config": "hf_effi.recipes.launch",
    "calibrated_nadamw": "hf_effi.functional.advice",
    "align_classifier": "hf_effi.recipes.classifier_alignment",
    "cdma": "hf_effi.recipes.ascending_quality",
    "class_features": "hf_effi.recipes.classifier_alignment",
    "cma": "hf_effi.recipes.ascending_quality",
    "evaluate_reward_model": "hf_effi.recipes.reward_bench",
    "extend_rope": "hf_effi.recipes.long_context",
    "lambda_patterns": "hf_effi.recipes.long_context",
    "large_batch_seq2seq": "hf_effi.functional.advice",
    "longgen_patterns": "hf_effi.recipes.long_context",
    "ml_engineering": "hf_effi.recipes.rl",
    "osf_next_task": "hf_effi.recipes.osf",
    "osf_rank_pattern": "hf_effi.recipes.osf",
    "pdr_rollout_func": "hf_effi.recipes.refine",
    "probe_gradients": "hf_effi.recipes.gradient_probe",
    "prolong_stages": "hf_effi.recipes.long_context",
    "recommend_optimizer": "hf_effi.functional.optimizer_table",
    "register_gradient_compression": "hf_effi.recipes.gradient_compression",
    "rlvr": "hf_effi.recipes.rl",
    "sft_learning_rate": "hf_effi.functional.advice",
    "size_one_epoch": "hf_effi.functional.advice",
    "slca": "hf_effi.recipes.classifier_alignment",
    "stability_gap": "hf_effi.recipes.continued_pretraining",
    "weight_decay_grid": "hf_effi.functional.advice",
    "weight_norm_report": "hf_effi.functional.weight_norms",
    "weight_norms": "hf_effi.functional.weight_norms",
}

if TYPE_CHECKING:  # what editors, type checkers and the reference see of the lazy names
    from ..functional.advice import OneEpochSize as OneEpochSize
    from ..functional.advice import calibrated_nadamw as calibrated_nadamw
    from ..functional.advice import large_batch_seq2seq as large_batch_seq2seq
    from ..functional.advice import sft_learning_rate as sft_learning_rate
    from ..functional.advice import size_one_epoch as size_one_epoch
    from ..functional.advice import weight_decay_grid as weight_decay_grid
    from ..functional.optimizer_table import OptimizerAdvice as OptimizerAdvice
    from ..functional.optimizer_table import recommend_optimizer as recommend_optimizer
    from ..functional.weight_norms import WeightNormReport as WeightNormReport
    from ..functional.weight_norms import weight_norm_report as weight_norm_report
    from ..functional.weight_norms import weight_norms as weight_norms
    from .ascending_quality import cdma as cdma
    from .ascending_quality import cma as cma
    from .classifier_alignment import ClassGaussians as ClassGaussians
    from .classifier_alignment import align_classifier as align_classifier
    from .classifier_alignment import class_features as class_features
    from .classifier_alignment import slca as slca
    from .continued_pretraining import stability_gap as stability_gap
    from .gradient_compression import register_gradient_compression as register_gradient_compression
    from .gradient_probe import GradientProbe as GradientProbe
    from .gradient_probe import probe_gradients as probe_gradients
    from .launch import accelerate_config as accelerate_config
    from .long_context import LongContextStage as LongContextStage
    from .long_context import extend_rope as extend_rope
    from .long_context import lambda_patterns as lambda_patterns
    from .long_context import longgen_patterns as longgen_patterns
    from .long_context import prolong_stages as prolong_stages
    from .osf import osf_next_task as osf_next_task
    from .osf import osf_rank_pattern as osf_rank_pattern
    from .refine import PDRRollouts as PDRRollouts
    from .refine import pdr_rollout_func as pdr_rollout_func
    from .reflection import CyclicalReflection as CyclicalReflection
    from .reward_bench import RewardBenchResult as RewardBenchResult
    from .reward_bench import evaluate_reward_model as evaluate_reward_model
    from .rl import VerifiedReward as VerifiedReward
    from .rl import ml_engineering as ml_engineering
    from .rl import rlvr as rlvr

__getattr__, __dir__, __all__ = face(__name__, _PUBLIC)
