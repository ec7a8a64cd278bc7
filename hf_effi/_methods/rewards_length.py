"""Rows of the table: budgets of length and of time."""

from __future__ import annotations

from .row import Method

ROWS: tuple[Method, ...] = (
    Method(
        key="length_budget",
        title="Length budgets (Train Long, Think Short)",
        kind="reward",
        goals=("rewards", "cheaper RL"),
        summary="Pays for completions by their length beside a budget that falls during the run, and caps generation.",
        entry_points=(
            "hf_effi.rewards:LengthBudgetReward",
            "hf_effi.rewards:train_long_think_short",
            "hf_effi.callbacks:GenerationCapCallback",
            "hf_effi.callbacks:BudgetPromptCallback",
            "hf_effi.functional.rewards:exponential_budget",
            "hf_effi.functional.rewards:linear_budget",
            "hf_effi.functional.rewards:n_decay_budget",
            "hf_effi.functional.rewards:triangular_reward",
            "hf_effi.functional.rewards:band_reward",
        ),
        doors=("hf_effi:EffiGRPOTrainer",),
        paper="Train Long, Think Short: Curriculum Learning for Efficient Reasoning",
        paper_id="2508.08940",
        authors="Hammoud, Hasan Abed Al Kader and others",
        status="experimental",
        tests=(
            "tests/unit/test_length_budget.py",
            "tests/training/test_length_budget.py",
            "tests/distributed/test_length_budget_ranks.py",
        ),
        bench="bench/length_budget.py",
    ),
    Method(
        key="grpo_schedules",
        title="Temperature and beta over the run (STILL-3)",
        kind="callback",
        goals=("cheaper RL",),
        summary="Lets the sampling temperature and the weight of the KL term follow schedules, between generations.",
        entry_points=("hf_effi.callbacks:GRPOScheduleCallback", "hf_effi.callbacks:still3"),
        doors=("hf_effi:EffiGRPOTrainer",),
        paper="An Empirical Study on Eliciting and Improving R1-like Reasoning Models",
        paper_id="2503.04548",
        authors="Chen, Zhipeng and others",
        status="experimental",
        tests=("tests/unit/test_length_budget.py", "tests/training/test_grpo_schedules.py"),
        bench="bench/length_budget.py",
    ),
    Method(
        key="rmt",
        title="Next-token term on prompts (Reinforcement Mid-Training)",
        kind="rollout",
        goals=("cheaper RL",),
        summary="Learns the tokens of prompts beside the completions, from the forward of the GRPO loss.",
        entry_points=("hf_effi.functional.rollouts:prompt_token_loss",),
        doors=("hf_effi:EffiGRPOTrainer",),
        arguments=("ntp_coef",),
        off=(None, 0.0),
        paper="Reinforcement Mid-Training",
        paper_id="",
        status="experimental",
        tests=("tests/unit/test_length_budget.py", "tests/training/test_grpo_schedules.py"),
        bench="bench/length_budget.py",
    ),
)
