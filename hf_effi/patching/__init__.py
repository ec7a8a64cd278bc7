"""What is asked and kept of a model before it is changed: measured questions about it, and its state put back."""

from ._state import set_mode
from .probe import (
    CannotLook,
    Finding,
    Results,
    agreed,
    compare,
    device_of,
    gradients,
    output_of,
    probing,
    remembered,
    tiny_tokens,
)
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
)

__all__ = [
    "CannotLook",
    "Finding",
    "Results",
    "agreed",
    "call",
    "compare",
    "device_of",
    "draws_random_numbers",
    "gradients",
    "length_dependent_positions",
    "longest_exact_call",
    "loss_and_gradients",
    "loss_by_item_count",
    "moved_in_padding",
    "named_draws",
    "output_of",
    "probing",
    "remembered",
    "rows_see_each_other",
    "set_mode",
    "short_reach",
    "tiny_tokens",
]
