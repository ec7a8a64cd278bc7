"""What comes next, and why: orders, pacing, sampling and difficulty as pure functions of scores, progress and a seed."""

from __future__ import annotations

from ._checks import CurriculumError, check_count, check_number, clean_scores, seeded
from .grouping import repeat_layout

__all__ = [
    "CurriculumError",
    "check_count",
    "check_number",
    "clean_scores",
    "repeat_layout",
    "seeded",
]
