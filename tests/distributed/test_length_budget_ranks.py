"""Two gloo ranks with a length budget, its cap, a moving temperature and the next-token term."""

from __future__ import annotations

from typing import Any

from hf_effi import EffiGRPOConfig, EffiGRPOTrainer
from hf_effi.callbacks import GenerationCapCallback, GRPOScheduleCallback
from hf_effi.functional.rewards import ExponentialBudget
from hf_effi.rewards import LengthBudgetReward
from hf_effi.schedules import linear
from tests.helpers import (
    assert_bitwise_equal,
    binary_hash_reward,
    grpo_args,
    run_distributed,
    run_grpo,
    weights_of,
)

BUDGET = ExponentialBudget(8, 0.5, 1)


def trained(folder: str, term: bool) -> dict[str, Any]:
    callbacks: list[Any] = [GenerationCapCallback(BUDGET, ratio=1.0)]
    if not term:
        callbacks.append(GRPOScheduleCallback(temperature=linear(floor=0.5)))
    trainer = run_grpo(
        EffiGRPOTrainer,
        grpo_args(folder, EffiGRPOConfig, exact_savings="off", ntp_coef=0.1 if term else 0.0),
        reward_funcs=[LengthBudgetReward(BUDGET, gate_on_correct=binary_hash_reward), binary_hash_reward],
        callbacks=callbacks,
    )
    names = ("effi/length/budget", "effi/length/generation_cap", "effi/temperature", "effi/prompt_token_loss")
    log = trainer.state.log_history
    return {
        "weights": weights_of(trainer.model),
        "log": {name: [entry[name] for entry in log if name in entry] for name in names},
        "longest": [entry["completions/max_length"] for entry in log if "completions/max_length" in entry],
    }


def both(folder: str) -> list[dict[str, Any]]:
    return [trained(folder, term) for term in (False, True)]


def test_ranks_have_the_same_budget_values_and_weights(tmp_path: Any) -> None:
    first, second = run_distributed(both, 2, str(tmp_path))
    for mine, other in zip(first, second, strict=True):
        assert_bitwise_equal(mine["weights"], other["weights"], what="weights of the ranks")
    moved, term = (found["log"] for found in first)
    assert moved["effi/length/budget"] == [8.0, 4.0, 2.0] == moved["effi/length/generation_cap"]
    assert moved["effi/temperature"] == [linear(3, floor=0.5)(step) for step in range(3)]
    assert len(term["effi/prompt_token_loss"]) == 3
    assert all(longest <= cap for longest, cap in zip(first[0]["longest"], (8, 4, 2), strict=True))
