"""Rows of the table: where a curve will end, and what says so early."""

from __future__ import annotations

from .row import Method

ROWS: tuple[Method, ...] = (
    Method(
        key="learning_curve",
        title="Forecast of a learning curve, and a stop by it",
        kind="callback",
        goals=("insight",),
        summary="Says where a logged metric will end while no rate moves, and can end training when nothing is left.",
        entry_points=(
            "hf_effi.callbacks:ForecastCallback",
            "hf_effi.functional.learning_curve:forecast",
            "hf_effi.functional.learning_curve:fit_power_curve",
            "hf_effi.functional.learning_curve:asymptote_trace",
            "hf_effi.functional.learning_curve:prediction_level",
        ),
        paper="Modeling of learning curves with applications to POS tagging",
        paper_id="2402.02515",
        authors="Vilares Ferro, Manuel and others",
        status="experimental",
        tests=(
            "tests/unit/test_learning_curve.py",
            "tests/training/test_forecast.py",
            "tests/distributed/test_forecast_ranks.py",
        ),
        bench="bench/forecast.py",
    ),
    Method(
        key="early_evaluation",
        title="Early evaluation of a sweep",
        kind="recipe",
        goals=("insight",),
        summary="Says which logged metric orders the runs of a sweep at a tenth of their length as their end does.",
        entry_points=(
            "hf_effi.functional.early_signals:rank_metrics",
            "hf_effi.functional.early_signals:tau_with_interval",
            "hf_effi.functional.cloze:cloze_accuracy",
            "hf_effi.functional.cloze:cloze_choices",
        ),
        paper="NeurIPS 2025 E2LM Competition: Early Training Evaluation of Language Models",
        paper_id="2506.07731",
        authors="Yagoubi, Mouadh and others",
        status="experimental",
        tests=("tests/unit/test_early_signals.py", "tests/training/test_plan_early_eval.py"),
        bench="bench/early_eval.py",
    ),
)
