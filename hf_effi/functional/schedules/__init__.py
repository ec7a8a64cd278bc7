"""Learning-rate schedules: pure functions from the number of finished updates to a multiplier of the base LR."""

from .base import (
    Schedule,
    decay_position,
    describe_difference,
    make_schedule,
    reconcile,
    same_schedule,
)
from .closed_forms import constant, cosine, cosine_power, damped_cosine, inverse_sqrt, linear, rex, uba
from .compose import TokenCounter, join, scale, token_indexed
from .continual import infinite, power, power_lr, rewarm_redecay
from .cyclic import one_cycle, slow_start_fast_decay, table, triangular
from .extend import extend_to
from .followed import Followed, check_storable, classes_in, settle
from .gallery import gallery
from .param_groups import layerwise_param_groups
from .planner_bound import lr_transfer, omega, plan_extension
from .planner_loss import fit_annealing_law, fit_multi_power_law
from .refined import median_smooth, refined_by_gradient_norm
from .shapes import SHAPES, decay, half_life
from .stable_decay import wsd, wsd_s, wsdc
from .torch_lr import (
    ScheduleLR,
    apply_momentum,
    apply_multiplier,
    final_lr_ratio,
    to_lambda_lr,
    warn_decay_to_zero,
)

__all__ = [
    "SHAPES",
    "Followed",
    "Schedule",
    "ScheduleLR",
    "TokenCounter",
    "apply_momentum",
    "apply_multiplier",
    "check_storable",
    "classes_in",
    "constant",
    "cosine",
    "cosine_power",
    "damped_cosine",
    "decay",
    "decay_position",
    "describe_difference",
    "extend_to",
    "final_lr_ratio",
    "fit_annealing_law",
    "fit_multi_power_law",
    "gallery",
    "half_life",
    "infinite",
    "inverse_sqrt",
    "join",
    "layerwise_param_groups",
    "linear",
    "lr_transfer",
    "make_schedule",
    "median_smooth",
    "omega",
    "one_cycle",
    "plan_extension",
    "power",
    "power_lr",
    "reconcile",
    "refined_by_gradient_norm",
    "rewarm_redecay",
    "rex",
    "same_schedule",
    "scale",
    "settle",
    "slow_start_fast_decay",
    "table",
    "to_lambda_lr",
    "token_indexed",
    "triangular",
    "uba",
    "warn_decay_to_zero",
    "wsd",
    "wsd_s",
    "wsdc",
]
