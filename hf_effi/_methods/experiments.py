"""Rows of the table: what puts experiments into a run."""

from __future__ import annotations

from .row import Method

ROWS: tuple[Method, ...] = (
    Method(
        key="injection_plan",
        title="Several experiments in one run",
        kind="callback",
        goals=("insight", "data choice"),
        summary="Puts the rows of several experiments in the place of others, counts what was seen, and compares "
        "with twins that were held out.",
        entry_points=(
            "hf_effi.callbacks:InjectionCallback",
            "hf_effi.data:Injection",
            "hf_effi.data:InjectionPlan",
            "hf_effi.data:InjectedDataset",
            "hf_effi.recipes:interaction_test",
            "hf_effi.functional.data:measure_interactions",
        ),
        paper="Train Once, Answer All: Many Pretraining Experiments for the Cost of One",
        paper_id="2509.23383",
        authors="Bordt, Sebastian and Pawelczyk, Martin",
        status="experimental",
        tests=("tests/unit/test_injection.py", "tests/training/test_injection.py"),
        bench="bench/injection.py",
    ),
)
