"""Rows of the table: GRPO: what is generated, kept and forwarded."""

from __future__ import annotations

from .row import Method

ROWS: tuple[Method, ...] = (
    Method(
        key="exact_savings",
        title="Exact savings (trim, sort, skip, pack, share)",
        kind="exact saving",
        goals=("cheaper RL",),
        summary="Forwards real tokens, each prompt once, and only rows with a gradient; the gradient is unchanged.",
        entry_points=("hf_effi.functional.rollouts:plan_buckets",),
        doors=("hf_effi:EffiGRPOTrainer",),
        arguments=("exact_savings", "forward_buckets"),
        off=(None, "off"),
        paper="none: bookkeeping that follows from the loss",
        paper_id="",
        status="stable",
        tests=(
            "tests/unit/test_rollout_batching.py",
            "tests/unit/test_forward_costs.py",
            "tests/training/test_grpo_exact.py",
            "tests/training/test_grpo_packed.py",
        ),
        bench="bench/grpo_exact.py",
        exact="tests/training/test_grpo_exact.py::test_gradient_equals_stock",
        zoo=(
            "trim",
            "sort",
            "skip",
        ),
    ),
    Method(
        key="difficulty_filter",
        title="Online difficulty filtering",
        kind="rollout",
        goals=("cheaper RL",),
        summary="Trains only on groups whose pass rate lies in a band, refilling from new prompts, within bounds.",
        entry_points=(
            "hf_effi.functional.rollouts:PassRateBand",
            "hf_effi.functional.rollouts:keep_groups_by_pass_rate",
        ),
        doors=("hf_effi:EffiGRPOTrainer",),
        arguments=("difficulty_range", "difficulty_reward", "difficulty_max_rounds", "difficulty_underfill"),
        paper="Online Difficulty Filtering for Reasoning Oriented Reinforcement Learning",
        paper_id="2504.03380",
        authors="Bae, Sanghwan and others",
        status="experimental",
        tests=("tests/unit/test_rollout_selection.py", "tests/training/test_grpo_filter.py"),
        bench="bench/demo.py",
    ),
    Method(
        key="cppo",
        title="CPPO completion pruning",
        kind="rollout",
        goals=("cheaper RL",),
        summary="Trains only on the completions with the largest absolute advantage and fills up with new prompts.",
        entry_points=(
            "hf_effi.functional.rollouts:AdvantagePruner",
            "hf_effi.functional.rollouts:keep_by_advantage",
        ),
        doors=("hf_effi:EffiGRPOTrainer",),
        arguments=(
            "prune_rate",
            "prune_metric",
            "prune_scope",
            "prune_allocation",
            "prune_balance_signs",
            "prune_normalizer",
        ),
        off=(None, 0, 0.0),
        paper="CPPO: Accelerating the Training of Group Relative Policy Optimization-Based Reasoning Models",
        paper_id="2503.22342",
        authors="Lin, Zhihang and others",
        status="experimental",
        tests=("tests/unit/test_rollout_selection.py", "tests/training/test_grpo_prune.py"),
        bench="bench/demo.py",
    ),
)
