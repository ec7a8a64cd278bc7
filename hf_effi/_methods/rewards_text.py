"""Rows of the table: rewards of texts."""

from __future__ import annotations

from .row import Method

ROWS: tuple[Method, ...] = (
    Method(
        key="verifiable_rewards",
        title="Verifiable rewards (RLVR)",
        kind="reward",
        goals=("rewards", "cheaper RL"),
        summary="Rewards that a program can check: numbers, choices, mathematics, texts, tags, constraints, lengths.",
        entry_points=(
            "hf_effi.rewards:LastNumberReward",
            "hf_effi.rewards:MathReward",
            "hf_effi.rewards:ChoiceReward",
            "hf_effi.rewards:ExactMatchReward",
            "hf_effi.rewards:NormalizedMatchReward",
            "hf_effi.rewards:TokenF1Reward",
            "hf_effi.rewards:TagFormatReward",
            "hf_effi.rewards:InstructionReward",
            "hf_effi.rewards:SoftOverlongReward",
            "hf_effi.rewards:LengthMatchReward",
            "hf_effi.rewards:VerifierReward",
            "hf_effi.functional.rewards:same_math",
            "hf_effi.functional.rewards:numbers_in",
            "hf_effi.functional.rewards:choice_of",
            "hf_effi.functional.rewards:check_instruction",
            "hf_effi.functional.rewards:soft_overlong",
        ),
        paper="Tulu 3: Pushing Frontiers in Open Language Model Post-Training",
        paper_id="2411.15124",
        authors="Lambert, Nathan and others",
        status="experimental",
        tests=(
            "tests/unit/test_rewards_answers.py",
            "tests/unit/test_rewards_math.py",
            "tests/unit/test_rewards_formats.py",
            "tests/unit/test_rewards_hostile.py",
            "tests/training/test_rewards_text.py",
        ),
        bench="bench/rewards.py",
    ),
)
