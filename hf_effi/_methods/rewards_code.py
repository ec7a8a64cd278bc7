"""Rows of the table: programs that run."""

from __future__ import annotations

from .row import Method

ROWS: tuple[Method, ...] = (
    Method(
        key="code_rewards",
        title="Programs by input and output, in a sandbox (Agnostics)",
        kind="reward",
        goals=("rewards",),
        summary="Runs the program of a completion in a sandbox that says what it guards against; compares its output.",
        entry_points=(
            "hf_effi.rewards:CodeIOReward",
            "hf_effi.rewards:Language",
            "hf_effi.rewards:Sandbox",
            "hf_effi.rewards:SandboxLimits",
            "hf_effi.rewards:probe_isolation",
            "hf_effi.functional.rewards:last_fence",
            "hf_effi.functional.rewards:outputs_agree",
            "hf_effi.functional.rewards:fraction_passed",
        ),
        doors=("hf_effi:EffiGRPOTrainer",),
        paper="Agnostics: Learning to Code in Any Programming Language via Reinforcement with a Universal Learning "
        "Environment",
        paper_id="2508.04865",
        authors="Boruch-Gruszecki, Aleksander and others",
        status="experimental",
        tests=(
            "tests/unit/test_code_reward.py",
            "tests/unit/test_sandbox.py",
            "tests/unit/test_sandbox_attacks.py",
            "tests/training/test_code_reward.py",
        ),
        bench="bench/rewards.py",
    ),
)
