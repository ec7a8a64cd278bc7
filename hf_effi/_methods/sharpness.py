"""Rows of the table: the curvature of the loss."""

from __future__ import annotations

from .row import Method

ROWS: tuple[Method, ...] = (
    Method(
        key="sharpness",
        title="Sharpness, and the warm-up that it asks for",
        kind="callback",
        goals=("insight", "schedule"),
        summary="Measures whether the curvature of the loss stands the learning rate, and how long a warm-up must be.",
        entry_points=(
            "hf_effi.callbacks:SharpnessProbe",
            "hf_effi.callbacks:Sharpness",
            "hf_effi.functional.sharpness:top_eigenvalue",
            "hf_effi.functional.sharpness:suggest_warmup",
        ),
        paper="Why Warmup the Learning Rate? Underlying Mechanisms and Improvements",
        paper_id="2406.09405",
        authors="Kalra, Dayal Singh and Barkeshli, Maissam",
        status="experimental",
        tests=(
            "tests/unit/test_sharpness.py",
            "tests/training/test_sharpness.py",
            "tests/engines/test_sharpness_fsdp2.py",
        ),
        bench="bench/sharpness.py",
    ),
)
