"""Learning-rate schedules as functions of the step, how to join, scale and extend them, and the LR range test."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._faces import face

#: public name -> module that defines it
_PUBLIC = {
    "Followed": "hf_effi.functional.schedules",
    "GradientNorms": "hf_effi.functional.gradient_norms",
    "RangeTest": "hf_effi.schedules.range_test",
    "Schedule": "hf_effi.functional.schedules",
    "ScheduleLR": "hf_effi.functional.schedules",
    "TokenCounter": "hf_effi.functional.schedules",
    "branch_cooldown": "hf_effi.schedules.branch",
    "constant": "hf_effi.functional.schedules",
    "cosine": "hf_effi.functional.schedules",
    "cosine_power": "hf_effi.functional.schedules",
    "damped_cosine": "hf_effi.functional.schedules",
    "decay": "hf_effi.functional.schedules",
    "extend_to": "hf_effi.functional.schedules",
    "fit_annealing_law": "hf_effi.functional.schedules",
    "fit_multi_power_law": "hf_effi.functional.schedules",
    "gallery": "hf_effi.functional.schedules",
    "infinite": "hf_effi.functional.schedules",
    "inverse_sqrt": "hf_effi.functional.schedules",
    "join": "hf_effi.functional.schedules",
    "layerwise_param_groups": "hf_effi.functional.schedules",
    "linear": "hf_effi.functional.schedules",
    "lr_range_test": "hf_effi.schedules.range_test",
    "lr_transfer": "hf_effi.functional.schedules",
    "make_schedule": "hf_effi.functional.schedules",
    "norms_of": "hf_effi.schedules.norms",
    "one_cycle": "hf_effi.functional.schedules",
    "plan_extension": "hf_effi.functional.schedules",
    "power": "hf_effi.functional.schedules",
    "power_lr": "hf_effi.functional.schedules",
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

if TYPE_CHECKING:  # what editors, type checkers and the reference see of the lazy names
    from ..functional.gradient_norms import GradientNorms as GradientNorms
    from ..functional.schedules import Followed as Followed
    from ..functional.schedules import Schedule as Schedule
    from ..functional.schedules import ScheduleLR as ScheduleLR
    from ..functional.schedules import TokenCounter as TokenCounter
    from ..functional.schedules import constant as constant
    from ..functional.schedules import cosine as cosine
    from ..functional.schedules import cosine_power as cosine_power
    from ..functional.schedules import damped_cosine as damped_cosine
    from ..functional.schedules import decay as decay
    from ..functional.schedules import extend_to as extend_to
    from ..functional.schedules import fit_annealing_law as fit_annealing_law
    from ..functional.schedules import fit_multi_power_law as fit_multi_power_law
    from ..functional.schedules import gallery as gallery
    from ..functional.schedules import infinite as infinite
    from ..functional.schedules import inverse_sqrt as inverse_sqrt
    from ..functional.schedules import join as join
    from ..functional.schedules import layerwise_param_groups as layerwise_param_groups
    from ..functional.schedules import linear as linear
    from ..functional.schedules import lr_transfer as lr_transfer
    from ..functional.schedules import make_schedule as make_schedule
    from ..functional.schedules import one_cycle as one_cycle
    from ..functional.schedules import plan_extension as plan_extension
    from ..functional.schedules import power as power
    from ..functional.schedules import power_lr as power_lr
    from ..functional.schedules import refined_by_gradient_norm as refined_by_gradient_norm
    from ..functional.schedules import rewarm_redecay as rewarm_redecay
    from ..functional.schedules import rex as rex
    from ..functional.schedules import scale as scale
    from ..functional.schedules import slow_start_fast_decay as slow_start_fast_decay
    from ..functional.schedules import table as table
    from ..functional.schedules import to_lambda_lr as to_lambda_lr
    from ..functional.schedules import token_indexed as token_indexed
    from ..functional.schedules import triangular as triangular
    from ..functional.schedules import uba as uba
    from ..functional.schedules import wsd as wsd
    from ..functional.schedules import wsd_s as wsd_s
    from ..functional.schedules import wsdc as wsdc
    from .branch import branch_cooldown as branch_cooldown
    from .norms import norms_of as norms_of
    from .range_test import RangeTest as RangeTest
    from .range_test import lr_range_test as lr_range_test

__getattr__, __dir__, __all__ = face(__name__, _PUBLIC)
