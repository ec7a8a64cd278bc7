"""Rows of the table: what decides before, during and after a run."""

from __future__ import annotations

from .row import Method

ROWS: tuple[Method, ...] = (
    Method(
        key="referee",
        title="Referee: time to target, performance profiles, compute-equivalent gain",
        kind="callback",
        goals=("insight",),
        summary="Says which of several settings reached a target for less, over the records of their runs.",
        entry_points=(
            "hf_effi.functional.referee:time_to_target",
            "hf_effi.functional.referee:performance_profile",
            "hf_effi.functional.referee:compute_equivalent_gain",
        ),
        paper="Benchmarking Neural Network Training Algorithms",
        paper_id="2306.07179",
        authors="Dahl, George E. and others",
        status="experimental",
        tests=("tests/unit/test_referee.py", "tests/training/test_report_profile.py"),
        bench="bench/grpo_selection.py",
    ),
)
