"""Side columns and rewards of groups through `trainer.train()`: with a column to the bit what is without it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer

from hf_effi.selection import group_reward, side_column
from hf_effi.trainers.grpo.config import EffiGRPOConfig
from hf_effi.trainers.grpo.trainer import EffiGRPOTrainer
from tests.helpers import assert_bitwise_equal, binary_hash_reward, grpo_args, length_reward, prompt_dataset, run_grpo

GROUP = 4


def sometimes(completions: list[str], **kwargs: Any) -> list[float | None]:
    """Unscorable for a third of the texts."""
    return [None if len(text) % 3 == 0 else len(text) / 7 for text in completions]


def never_alone(completions: list[str], **kwargs: Any) -> list[float | None]:
    return [None if len(text) % 3 == 0 else 0.1 * len(text) for text in completions]


def seconds(completions: list[str], **kwargs: Any) -> list[float | None]:
    return [None if len(text) == 1 else 1000.0 + len(text) for text in completions]


async def slowly(completions: list[str], **kwargs: Any) -> list[float]:
    return [-3.0 for _ in completions]


class Spy(EffiGRPOTrainer):
    """Records what reaches the loss, and the side columns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.batches: list[dict[str, Any]] = []
        self.sides: list[dict[str, torch.Tensor]] = []
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        if self.model.training:
            self.batches.append(batch)
            self.sides.append(self._rollouts.side)
        return batch


def train(tmp_path: Any, rewards: Any, cls: type = Spy, **over: Any) -> Any:
    settings = {"per_device_train_batch_size": 8, "num_generations": GROUP, "exact_savings": "off"}
    kwargs = {name: over.pop(name) for name in ("eval_dataset",) if name in over}
    config = GRPOConfig if cls is GRPOTrainer else EffiGRPOConfig
    if cls is GRPOTrainer:
        settings.pop("exact_savings")
    return run_grpo(cls, grpo_args(tmp_path, config, **{**settings, **over}), reward_funcs=rewards, **kwargs)


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
@pytest.mark.parametrize("weights", [None, [0.25, 1.0, 3.0], [1.0, 0.0, 1.0]])
def test_a_side_column_changes_nothing(tmp_path: Any, aggregation: str, weights: list[float] | None) -> None:
    """`sometimes` and `never_alone` leave rows that nobody could score."""
    over: dict[str, Any] = {"multi_objective_aggregation": aggregation}
    alone = {} if weights is None else {"reward_weights": [weights[0], weights[2]]}
    stock = train(tmp_path, [sometimes, never_alone], GRPOTrainer, **over, **alone)
    plain = train(tmp_path, [sometimes, never_alone], **over, **alone)
    beside = {} if weights is None else {"reward_weights": weights}
    mixed = train(tmp_path, [sometimes, side_column(seconds), never_alone], **over, **beside)
    assert_bitwise_equal(stock.model, mixed.model)
    unscorable = 0
    for one, other in zip(plain.batches, mixed.batches, strict=True):
        assert torch.equal(one["advantages"], other["advantages"])
    for rewards in (plain._rollouts.rewards, mixed._rollouts.rewards):
        assert rewards is not None and rewards.shape == (8, 2)
        unscorable += int(rewards.isnan().all(1).sum())
    assert unscorable, "no row that nobody could score, so that the trap is not tested"
    for name in ("reward", "reward_std", "frac_reward_zero_std", "rewards/sometimes/mean", "rewards/never_alone/std"):
        assert logged(plain, name) == logged(mixed, name) == logged(stock, name), name


def test_what_it_carries_is_seen_and_logged(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    columns = [side_column(seconds), side_column(slowly), side_column(lambda completions, **k: [None] * 8, "none")]
    trainer = train(tmp_path, [binary_hash_reward, *columns], log_completions=False)
    assert trainer.reward_func_names == ["binary_hash_reward"]
    for side in trainer.sides:
        assert set(side) == {"seconds", "slowly", "none"} and all(column.shape == (8,) for column in side.values())
        assert side["slowly"].tolist() == [-3.0] * 8 and bool(side["none"].isnan().all())
    means = [float(torch.nanmean(side["seconds"])) for side in trainer.sides]
    assert logged(trainer, "rewards/seconds/mean") == pytest.approx(means)
    assert logged(trainer, "rewards/slowly/mean") == [-3.0] * 3 and logged(trainer, "rewards/none/mean") == []
    assert not any(
        isinstance(value, float) and math.isnan(value)
        for entry in trainer.state.log_history
        for value in entry.values()
    )
    assert not [record for record in caplog.records if "returned NaN for all" in record.getMessage()]
    assert list(trainer._logs["rewards"]["slowly"]) == [-3.0] * len(trainer._logs["prompt"])


def test_the_table_of_completions_has_the_column(tmp_path: Any) -> None:
    trainer = train(tmp_path, [binary_hash_reward, side_column(seconds)], log_completions=True, max_steps=1)
    assert len(trainer._logs["rewards"]["seconds"]) == len(trainer._logs["rewards"]["binary_hash_reward"]) == 8


def test_a_filter_need_not_be_told_of_it(tmp_path: Any) -> None:
    trainer = train(tmp_path, [binary_hash_reward, side_column(seconds)], difficulty_range=(0, 1))
    assert trainer._rollouts.difficulty_column == 0
    with pytest.raises(ValueError, match="difficulty_reward='seconds' is not a reward function"):
        train(
            tmp_path,
            [binary_hash_reward, side_column(seconds)],
            difficulty_range=(0, 1),
            difficulty_reward="seconds",
        )


def test_in_evaluation_too(tmp_path: Any) -> None:
    over = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 8, "num_generations_eval": 2}
    seen: list[int] = []

    def of_group(prompts: Any, completions: Any, group_size: int, **kwargs: Any) -> list[float]:
        seen.append(group_size)
        return [float(completion == completions[i // group_size * group_size]) for i, completion in enumerate(prompts)]

    trainer = train(
        tmp_path,
        [binary_hash_reward, side_column(slowly), group_reward(of_group)],
        eval_dataset=prompt_dataset(4),
        max_steps=1,
        **over,
    )
    assert logged(trainer, "eval_rewards/slowly/mean") == [-3.0]
    assert seen == [4, 2]


def test_a_reward_of_groups(tmp_path: Any) -> None:
    @group_reward
    def centred(prompts: Any, completions: Any, group_size: int, **kwargs: Any) -> list[float]:
        found: list[float] = []
        for first in range(0, len(completions), group_size):
            lengths = length_reward(completions[first : first + group_size])
            found += [length - min(lengths) for length in lengths]
        return found

    # Advantages do not see what is taken off a whole group.
    plain = train(tmp_path, length_reward)
    grouped = train(tmp_path, centred)
    for one, other in zip(plain.batches[:1], grouped.batches[:1], strict=True):
        assert torch.allclose(one["advantages"], other["advantages"], atol=1e-4)
    assert all(float(reward) >= 0 for reward in grouped._rollouts.rewards)


def test_under_a_stock_trainer(tmp_path: Any) -> None:
    def rarity(prompts: Any, completions: Any, group_size: int, **kwargs: Any) -> list[float]:
        assert group_size == GROUP
        return length_reward(completions)

    plain = train(tmp_path, length_reward, GRPOTrainer)
    stock = train(tmp_path, [group_reward(rarity, group_size=GROUP), side_column(slowly)], GRPOTrainer)
    assert_bitwise_equal(plain.model, stock.model)
    assert logged(stock, "slowly") == [-3.0] * 3


def test_a_recipe_holds_all_functions(tmp_path: Any) -> None:
    trainer = train(tmp_path, [side_column(seconds), binary_hash_reward], reward_weights=[1.0, 2.0], max_steps=1)
    assert trainer._side_columns.given[1] is binary_hash_reward and len(trainer._side_columns.given) == 2
    assert len(trainer.args.reward_weights) == 2 and trainer.reward_weights.tolist() == [2.0]
