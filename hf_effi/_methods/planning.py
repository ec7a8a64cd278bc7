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
    Method(
        key="scaling_law",
        title="Scaling laws of your own runs",
        kind="recipe",
        goals=("insight",),
        summary="Fits loss over parameters and tokens to finished runs, and says the best size for a compute.",
        entry_points=(
            "hf_effi.functional.scaling:fit_scaling_law",
            "hf_effi.functional.scaling:ScalingLaw",
            "hf_effi.functional.scaling:held_out_error",
        ),
        paper="Training Compute-Optimal Large Language Models",
        paper_id="2203.15556",
        authors="Hoffmann, Jordan and others",
        status="experimental",
        tests=("tests/unit/test_scaling.py", "tests/training/test_plan_scaling.py"),
        bench="bench/scaling.py",
    ),
    Method(
        key="layout_planner",
        title="Layout planner",
        kind="recipe",
        goals=("less memory", "faster steps", "insight"),
        summary="Ranks ways to spread a training over devices by memory and time, and writes the files of the best.",
        entry_points=(
            "hf_effi.functional.layout_plan:enumerate_layouts",
            "hf_effi.functional.layout_plan:rank_layouts",
            "hf_effi.functional.layout_time:layout_time",
        ),
        paper="Efficient Parallelization Layouts for Large-Scale Distributed Model Training",
        paper_id="2311.05610",
        authors="Hagemann, Johannes and others",
        status="experimental",
        tests=("tests/unit/test_layout_plan.py", "tests/training/test_plan_layout.py"),
        bench="bench/plan_layout.py",
    ),
    Method(
        key="grpo_planner",
        title="GRPO planner",
        kind="recipe",
        goals=("insight",),
        summary="Says where the time of a GRPO run will go, what would save some of it, and which settings follow.",
        entry_points=(
            "hf_effi.functional.grpo_plan:planned_work",
            "hf_effi.functional.grpo_expected:dead_share",
            "hf_effi.functional.grpo_expected:refills",
            "hf_effi.functional.grpo_speeds:fit_speeds",
            "hf_effi.report.plan_grpo:plan_grpo",
        ),
        paper="none: arithmetic of the project's own",
        paper_id="",
        status="experimental",
        tests=("tests/unit/test_grpo_plan.py", "tests/training/test_plan_grpo.py"),
        bench="bench/plan_grpo.py",
    ),
)
