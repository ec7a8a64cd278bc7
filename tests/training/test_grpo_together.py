"""What stands around the generation of a turn, and what cuts forwards, in one run: each does what it does alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_effi import EffiGRPOConfig, EffiGRPOTrainer
from hf_effi.errors import RefusedError
from hf_effi.functional.rollouts import AdaptiveNoise, SpeculativeReuse
from tests.helpers import assert_bitwise_equal, grpo_args, prompt_dataset, run_grpo, weights_of

NOISE = AdaptiveNoise(1e-1, 1e-2, num_stages=2)


def train(folder: Path, objects: dict[str, Any] | None = None, **over: Any) -> Any:
    """Three passes over 8 prompts, two for each update."""
    settings = {"max_steps": -1, "num_train_epochs": 3, "learning_rate": 1e-3, **over}
    args = grpo_args(folder, EffiGRPOConfig, **settings)
    return run_grpo(EffiGRPOTrainer, args, train_dataset=prompt_dataset(8), **(objects or {}))


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def alike(one: Any, other: Any, tolerance: float) -> None:
    for (name, a), (_, b) in zip(one.model.named_parameters(), other.model.named_parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=tolerance), name


@pytest.mark.parametrize(
    "objects", [{"rollout_reuse": SpeculativeReuse()}, {"rollout_noise": NOISE}], ids=["reuse", "noise"]
)
def test_cheaper_rollouts_under_reuse_and_under_noise(tmp_path: Path, objects: dict[str, Any]) -> None:
    """Ragged prompts, fewer rows than a group, another length in each call; weights that are not the policy's."""
    alone = train(tmp_path / "alone", objects)
    both = train(tmp_path / "both", objects, rollout_savings="prefill,compact")
    assert logged(alone, "completions/mean_length") == logged(both, "completions/mean_length")
    assert logged(alone, "reward") == logged(both, "reward")
    alike(alone, both, 1e-6)
    assert sum(logged(both, "effi/prefill_tokens_saved")) > 0


def test_token_budgets_under_everything_that_may_stand_beside_them(tmp_path: Path) -> None:
    over = {"num_iterations": 2, "rollout_savings": "auto", "difficulty_range": (0, 1), "prune_rate": 0.5}
    whole = train(tmp_path / "whole", {"rollout_reuse": SpeculativeReuse()}, **over)
    cut = train(
        tmp_path / "cut", {"rollout_reuse": SpeculativeReuse()}, loss_token_budget=24, score_token_budget=40, **over
    )
    assert logged(whole, "effi/rows_trained") == logged(cut, "effi/rows_trained")
    assert logged(whole, "reward") == logged(cut, "reward")
    alike(whole, cut, 1e-4)  # Adam divides by what may be small
    assert sum(logged(cut, "effi/tokens_forward")) > 0


def test_all_of_it_is_resumed_to_the_bit(tmp_path: Path) -> None:
    over = {"num_iterations": 2, "rollout_savings": "auto", "loss_token_budget": 24, "score_token_budget": 40}
    over |= {"save_strategy": "steps", "save_steps": 1}
    whole = train(tmp_path / "whole", {"rollout_reuse": SpeculativeReuse()}, **over)
    args = grpo_args(
        tmp_path / "again", EffiGRPOConfig, **{"max_steps": -1, "num_train_epochs": 3, "learning_rate": 1e-3, **over}
    )
    again = run_grpo(
        EffiGRPOTrainer,
        args,
        train_dataset=prompt_dataset(8),
        rollout_reuse=SpeculativeReuse(),
        resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-11"),  # inside of a generation of the second pass
    )
    assert_bitwise_equal(weights_of(whole.model), weights_of(again.model))


def test_noise_beside_reuse_is_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="rollout_reuse .* rollout_noise lets completions be drawn from others"):
        EffiGRPOTrainer(
            model=str(tmp_path / "nowhere"),
            reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
            args=grpo_args(tmp_path, EffiGRPOConfig, num_train_epochs=2),
            train_dataset=prompt_dataset(8),
            rollout_reuse=SpeculativeReuse(),
            rollout_noise=NOISE,
        )
