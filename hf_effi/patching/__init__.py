"""What is asked and kept of a model before it is changed: measured questions about it, and its state put back."""

from ._finding import ALLOWED, Finding, Results, agreed
from ._generators import OtherStates
from ._inputs import device_of, output_of, tiny_tokens
from ._reach import dtypes_to_try, is_packed, is_sharded, out_of_reach, sharded_by_zero3
from .probe import compare, gradients, looking, probing, remembered
from .questions import (
    call,
    draws_random_numbers,
    length_dependent_positions,
    longest_exact_call,
    loss_and_gradients,
    loss_by_item_count,
    moved_in_padding,
    named_draws,
    rows_see_each_other,
    short_reach,
    tiny_tokens_or_none,
)
from .state import set_mode, untouched

__all__ = [
    "ALLOWED",
    "Finding",
    "OtherStates",
    "Results",
    "agreed",
    "call",
    "compare",
    "device_of",
    "draws_random_numbers",
    "dtypes_to_try",
    "gradients",
    "is_packed",
    "is_sharded",
    "length_dependent_positions",
    "longest_exact_call",
    "looking",
    "loss_and_gradients",
    "loss_by_item_count",
    "moved_in_padding",
    "named_draws",
    "out_of_reach",
    "output_of",
    "probing",
    "remembered",
    "rows_see_each_other",
    "set_mode",
    "sharded_by_zero3",
    "short_reach",
    "tiny_tokens",
    "tiny_tokens_or_none",
    "untouched",
]
