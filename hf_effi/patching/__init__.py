"""What is asked and kept of a model before it is changed: measured questions about it, and its state put back."""

from .probe import CannotLook, Finding, agreed, compare, gradients, probing, tiny_tokens
from .questions import (
    draws_random_numbers,
    length_dependent_positions,
    moved_in_padding,
    rows_see_each_other,
    short_reach,
)

__all__ = [
    "CannotLook",
    "Finding",
    "agreed",
    "compare",
    "draws_random_numbers",
    "gradients",
    "length_dependent_positions",
    "moved_in_padding",
    "probing",
    "rows_see_each_other",
    "short_reach",
    "tiny_tokens",
]
