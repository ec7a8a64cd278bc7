"""Rows of the table: GRPO: which prompts are generated for, by what the model makes of them."""

from __future__ import annotations

from .row import Method

ROWS: tuple[Method, ...] = (
    Method(
        key="pcl",
        title="Prompt curriculum by a learned value (PCL)",
        kind="rollout",
        goals=("cheaper RL",),
        summary="Generates for the prompts whose predicted success rate is nearest to a target; the value is learned.",
        entry_points=(
            "hf_effi.selection:PCL",
            "hf_effi.functional.rollouts:nearest_to",
            "hf_effi.functional.rollouts:explained_variance",
        ),
        doors=("hf_effi:EffiGRPOTrainer", "hf_effi.selection:BufferedPrompts"),
        paper="Prompt Curriculum Learning for Efficient LLM Post-Training",
        paper_id="2510.01135",
        authors="Gao, Zhaolin and others",
        status="experimental",
        tests=(
            "tests/unit/test_selection_pcl.py",
            "tests/unit/test_selection_stream.py",
            "tests/training/test_selection_model.py",
            "tests/distributed/test_selection_model_ranks.py",
        ),
        bench="bench/grpo_selection.py",
    ),
    Method(
        key="gain_rl",
        title="Angle-informed order of prompts (GAIN-RL)",
        kind="rollout",
        goals=("cheaper RL",),
        summary="Orders prompts by the angles between the model's own hidden states, and moves a Gaussian along them.",
        entry_points=(
            "hf_effi.selection:GainRL",
            "hf_effi.functional.rollouts:angle_score",
            "hf_effi.functional.rollouts:mean_cosine",
            "hf_effi.functional.rollouts:shared_ends",
            "hf_effi.functional.rollouts:gaussian_weights",
            "hf_effi.functional.rollouts:draw_by_gaussian",
            "hf_effi.functional.rollouts:next_mean",
        ),
        doors=("hf_effi:EffiGRPOTrainer",),
        paper="Angles Don't Lie: Unlocking Training-Efficient RL Through the Model's Own Signals",
        paper_id="2506.02281",
        authors="Wang, Qinsi and others",
        status="experimental",
        tests=(
            "tests/unit/test_selection_gain_rl.py",
            "tests/training/test_selection_model.py",
            "tests/distributed/test_selection_model_ranks.py",
        ),
        bench="bench/grpo_selection.py",
    ),
    Method(
        key="hive",
        title="Online check of selected prompts (HIVE)",
        kind="rollout",
        goals=("cheaper RL",),
        summary="Keeps, of the prompts that a selector chose, those that the policy is least sure how to answer.",
        entry_points=("hf_effi.selection:HIVE", "hf_effi.functional.rollouts:token_entropy"),
        doors=("hf_effi:EffiGRPOTrainer",),
        paper="Train at the Moving Edge: Efficient RL for Large Reasoning Models via Rollout Selection",
        paper_id="2603.25184",
        authors="Wu, Jiahao and others",
        status="experimental",
        tests=(
            "tests/unit/test_selection_hive.py",
            "tests/training/test_selection_model.py",
            "tests/distributed/test_selection_model_ranks.py",
        ),
        bench="bench/grpo_selection.py",
    ),
)
