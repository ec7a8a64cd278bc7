"""Online difficulty filtering through `trainer.train()` with rewards from a fixed table."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_effi.trainers.grpo.config import EffiGRPOConfig
from hf_effi.trainers.grpo.trainer import EffiGRPOTrainer
from tests.helpers import TableReward, assert_bitwise_equal, binary_hash_reward, grpo_args, prompt_dataset, run_grpo

GROUP = 4
DEAD, EASY, HARD, MIXED = [0.0] * 4, [1.0] * 4, [1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]


class Spy(EffiGRPOTrainer):
    """Records what reaches the loss."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.batches: list[dict[str, Any]] = []
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        if self.model.training:
            self.batches.append(batch)
        return batch


def train(tmp_path: Any, rewards: Any = binary_hash_reward, cls: type = Spy, **over: Any) -> Any:
    settings = {"per_device_train_batch_size": 8, "num_generations": GROUP, "gradient_accumulation_steps": 2}
    kwargs = {name: over.pop(name) for name in ("group_filter", "prompt_selector", "train_dataset") if name in over}
    return run_grpo(cls, grpo_args(tmp_path, EffiGRPOConfig, **{**settings, **over}), reward_funcs=rewards, **kwargs)


def metric(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def group_has_gradient(batch: dict[str, Any]) -> list[bool]:
    return (batch["advantages"].view(-1, GROUP) != 0).any(1).tolist()


def test_every_trained_group_has_a_gradient_and_rows_stay_constant(tmp_path: Any) -> None:
    trainer = train(tmp_path, TableReward([DEAD, MIXED, HARD]), difficulty_range=(0, 1), difficulty_max_rounds=8)
    assert len(trainer.batches) == 3
    for batch in trainer.batches:
        assert batch["advantages"].numel() == 16
        assert all(group_has_gradient(batch))
    assert metric(trainer, "effi/underfilled") == [0.0] * 3
    assert all(rounds > 1 for rounds in metric(trainer, "effi/gen_rounds"))
    assert metric(trainer, "effi/reward_kept")[0] > metric(trainer, "effi/reward_generated")[0]


def test_band_keeps_only_what_lies_inside(tmp_path: Any) -> None:
    trainer = train(tmp_path, TableReward([HARD, MIXED]), difficulty_range=(0.4, 0.6), difficulty_max_rounds=8)
    for batch in trainer.batches:
        positives = (batch["advantages"].view(-1, GROUP) > 0).sum(1).tolist()
        assert positives == [2] * 4
    assert metric(trainer, "effi/dropped/too_hard")[0] >= GROUP
    assert metric(trainer, "effi/reward_kept") == [0.5] * 3


def test_rounds_are_bounded_and_the_batch_is_filled_with_the_least_bad(tmp_path: Any) -> None:
    trainer = train(tmp_path, TableReward([DEAD, HARD]), difficulty_range=(0.4, 0.6))
    assert metric(trainer, "effi/gen_rounds") == [3.0] * 3
    assert metric(trainer, "effi/underfilled") == [1.0] * 3
    assert metric(trainer, "effi/groups_filled") == [4.0] * 3
    for batch in trainer.batches:
        assert batch["advantages"].numel() == 16
        # Groups with a gradient fill first.
        assert all(group_has_gradient(batch))


def test_shrink_trains_on_what_qualified(tmp_path: Any) -> None:
    trainer = train(
        tmp_path,
        TableReward([MIXED, DEAD]),
        difficulty_range=(0, 1),
        difficulty_max_rounds=1,
        difficulty_underfill="shrink",
    )
    for batch in trainer.batches:
        assert batch["advantages"].numel() == 8
        assert all(group_has_gradient(batch))
        assert batch["num_items_in_batch"] == batch["completion_mask"].sum()


@pytest.mark.parametrize("underfill", ["fill", "shrink"])
def test_all_groups_filtered_for_many_steps_never_dies(tmp_path: Any, underfill: str) -> None:
    trainer = train(
        tmp_path, TableReward([DEAD]), difficulty_range=(0.2, 0.8), difficulty_underfill=underfill, max_steps=6
    )
    assert trainer.state.global_step == 6
    assert metric(trainer, "grad_norm") == [0.0] * 6
    assert metric(trainer, "effi/dropped/too_hard")[0] > 0
    assert metric(trainer, "effi/underfilled") == [1.0] * 6


def test_a_filter_that_drops_nothing_is_stock(tmp_path: Any) -> None:
    table = [MIXED, HARD]
    plain = train(tmp_path, TableReward(table), exact_savings="off")
    kept = train(tmp_path, TableReward(table), exact_savings="off", difficulty_range=(0, 1))
    for a, b in zip(plain.model.parameters(), kept.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert metric(kept, "effi/dropped/zero_variance") == [0.0] * 3


def test_refills_serve_no_prompt_twice_in_a_pass(tmp_path: Any) -> None:
    served: list[str] = []

    def reward(prompts: list[str], **kwargs: Any) -> list[float]:
        served.extend(prompts[::GROUP])
        return [0.0] * len(prompts)

    train(
        tmp_path,
        reward,
        difficulty_range=(0, 1),
        difficulty_max_rounds=4,
        max_steps=1,
        train_dataset=prompt_dataset(32),
    )
    refills = served[4:]
    assert len(refills) == 12 and len(set(refills)) == 12


def test_unscorable_rows_are_left_out_of_the_pass_rate(tmp_path: Any) -> None:
    trainer = train(
        tmp_path,
        TableReward([[1.0, None, None, 0.0], [None] * 4]),
        difficulty_range=(0.4, 0.6),
        difficulty_max_rounds=1,
    )
    assert metric(trainer, "effi/dropped/unscorable") == [0.0] * 3  # filled again: nothing better was there
    assert metric(trainer, "effi/groups_filled") == [2.0] * 3


def test_the_named_reward_decides(tmp_path: Any) -> None:
    def accuracy(completions: list[str], **kwargs: Any) -> list[float]:
        return [1.0, 1.0, 0.0, 0.0] * (len(completions) // 4)

    def style(completions: list[str], **kwargs: Any) -> list[float]:
        return [7.0 + len(text) for text in completions]

    with pytest.raises(ValueError, match=r"several reward functions \(accuracy, style\).*set difficulty_reward"):
        train(tmp_path, [accuracy, style], difficulty_range=(0.2, 0.8))
    with pytest.raises(
        ValueError, match="difficulty_reward='acc' is not a reward function here. Known: accuracy, style"
    ):
        train(tmp_path, [accuracy, style], difficulty_range=(0.2, 0.8), difficulty_reward="acc")
    trainer = train(tmp_path, [accuracy, style], difficulty_range=(0.2, 0.8), difficulty_reward="accuracy")
    assert metric(trainer, "effi/underfilled") == [0.0] * 3


def test_reward_outside_the_unit_interval_names_the_fix(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="a pass rate needs rewards in .0, 1., got"):
        train(tmp_path, lambda completions, **kwargs: [3.0] * len(completions), difficulty_range=(0.2, 0.8))


def test_an_own_filter_and_selector_plug_in(tmp_path: Any) -> None:
    from hf_effi.functional.rollouts import GroupDecision, ShuffledPrompts

    class FirstHalf:
        def decide(self, groups: Any) -> GroupDecision:
            assert groups.rewards.shape == groups.advantages.shape == groups.lengths.shape
            count = len(groups.rewards)
            keep = torch.arange(count) < count // 2
            return GroupDecision(keep, tuple("kept" if k else "second_half" for k in keep.tolist()))

        def fill_order(self, groups: Any) -> list[int]:
            return list(range(len(groups.rewards)))

    class Recording(ShuffledPrompts):
        def observe(self, rows: list[int], groups: Any) -> None:
            self.seen = [*getattr(self, "seen", []), *zip(rows, groups.pass_rates.tolist(), strict=True)]

    selector = Recording(16, seed=3)
    trainer = train(
        tmp_path,
        group_filter=FirstHalf(),
        prompt_selector=selector,
        difficulty_max_rounds=1,
        difficulty_underfill="shrink",
        max_steps=2,
    )
    assert [batch["advantages"].numel() for batch in trainer.batches] == [8, 8]
    assert metric(trainer, "effi/dropped/second_half") == [8.0, 8.0]
    assert [row for row, _ in selector.seen] == ShuffledPrompts(16, seed=3).select(8)
    assert all(0 <= rate <= 1 for _, rate in selector.seen)
    with pytest.raises(ValueError, match="either `group_filter=` or `difficulty_range`"):
        train(tmp_path, group_filter=FirstHalf(), difficulty_range=(0, 1))


def test_evaluation_is_not_filtered(tmp_path: Any) -> None:
    args = grpo_args(
        tmp_path,
        EffiGRPOConfig,
        num_generations=GROUP,
        difficulty_range=(0, 1),
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=4,
        max_steps=1,
        prune_rate=0.5,
    )
    trainer = run_grpo(EffiGRPOTrainer, args, eval_dataset=prompt_dataset(3))
    plain = run_grpo(
        EffiGRPOTrainer,
        grpo_args(tmp_path, EffiGRPOConfig, num_generations=GROUP, per_device_eval_batch_size=4, exact_savings="off"),
        eval_dataset=prompt_dataset(3),
        train=False,
    )
    expected = plain.evaluate()
    logged = next(entry for entry in trainer.state.log_history if "eval_reward" in entry)
    assert {k for k in expected if "reward" in k} <= set(logged)
    assert not any("effi/dropped" in key for key in logged)


def test_same_seed_same_run(tmp_path: Any) -> None:
    runs = [train(tmp_path, difficulty_range=(0.2, 0.8)) for _ in range(2)]
    assert_bitwise_equal(runs[0].model, runs[1].model)
