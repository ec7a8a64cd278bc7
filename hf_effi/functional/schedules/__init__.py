"""Learning-rate schedules: pure functions from the number of finished updates to a multiplier of the base LR."""

from ._checks import PastEndWarning, ScheduleError, ScheduleMismatchError
from .base import (
    Schedule,
    decay_position,
    describe_difference,
    make_schedule,
    reconcile,
    same_schedule,
)
from .closed_forms import constant, cosine, cosine_power, damped_cosine, inverse_sqrt, linear, rex, uba
from .gallery import gallery
from .shapes import SHAPES, decay, half_life
from .stable_decay import wsd, wsd_s, wsdc
from .torch_lr import ScheduleLR, apply_multiplier, to_lambda_lr

__all__ = [
    "SHAPES",
    "PastEndWarning",
    "Schedule",
    "ScheduleError",
    "ScheduleLR",
    "ScheduleMismatchError",
    "apply_multiplier",
    "constant",
    "cosine",
    "cosine_power",
    "damped_cosine",
    "decay",
    "decay_position",
    "describe_difference",
    "gallery",
    "half_life",
    "inverse_sqrt",
    "linear",
    "make_schedule",
    "reconcile",
    "rex",
    "same_schedule",
    "to_lambda_lr",
    "uba",
    "wsd",
    "wsd_s",
    "wsdc",
]
