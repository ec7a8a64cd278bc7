"""Settings of papers, as functions that return trainer keyword arguments, configs, and launch files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._faces import face

#: public name -> module that defines it
_PUBLIC = {
    "CyclicalReflection": "hf_effi.recipes.reflection",
    "LongContextStage": "hf_effi.recipes.long_context",
    "PDRRollouts": "hf_effi.recipes.refine",
    "RewardBenchResult": "hf_effi.recipes.reward_bench",
    "VerifiedReward": "hf_effi.recipes.rl",
    "accelerate_config": "hf_effi.recipes.launch",
    "cdma": "hf_effi.recipes.ascending_quality",
    "cma": "hf_effi.recipes.ascending_quality",
    "evaluate_reward_model": "hf_effi.recipes.reward_bench",
    "extend_rope": "hf_effi.recipes.long_context",
    "lambda_patterns": "hf_effi.recipes.long_context",
    "longgen_patterns": "hf_effi.recipes.long_context",
    "ml_engineering": "hf_effi.recipes.rl",
    "pdr_rollout_func": "hf_effi.recipes.refine",
    "prolong_stages": "hf_effi.recipes.long_context",
    "register_gradient_compression": "hf_effi.recipes.gradient_compression",
    "rlvr": "hf_effi.recipes.rl",
    "stability_gap": "hf_effi.recipes.continued_pretraining",
}

if TYPE_CHECKING:  # what editors, type checkers and the reference see of the lazy names
    from .ascending_quality import cdma as cdma
    from .ascending_quality import cma as cma
    from .continued_pretraining import stability_gap as stability_gap
    from .gradient_compression import register_gradient_compression as register_gradient_compression
    from .launch import accelerate_config as accelerate_config
    from .long_context import LongContextStage as LongContextStage
    from .long_context import extend_rope as extend_rope
    from .long_context import lambda_patterns as lambda_patterns
    from .long_context import longgen_patterns as longgen_patterns
    from .long_context import prolong_stages as prolong_stages
    from .refine import PDRRollouts as PDRRollouts
    from .refine import pdr_rollout_func as pdr_rollout_func
    from .reflection import CyclicalReflection as CyclicalReflection
    from .reward_bench import RewardBenchResult as RewardBenchResult
    from .reward_bench import evaluate_reward_model as evaluate_reward_model
    from .rl import VerifiedReward as VerifiedReward
    from .rl import ml_engineering as ml_engineering
    from .rl import rlvr as rlvr

__getattr__, __dir__, __all__ = face(__name__, _PUBLIC)
