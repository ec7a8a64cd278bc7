"""Settings of papers, as functions that return trainer keyword arguments, configs, and launch files."""

from __future__ import annotations

from .ascending_quality import cdma, cma
from .launch import accelerate_config
from .long_context import LongContextStage, extend_rope, lambda_patterns, longgen_patterns, prolong_stages
from .stability_gap import stability_gap

__all__ = [
    "LongContextStage",
    "accelerate_config",
    "cdma",
    "cma",
    "extend_rope",
    "lambda_patterns",
    "longgen_patterns",
    "prolong_stages",
    "stability_gap",
]
