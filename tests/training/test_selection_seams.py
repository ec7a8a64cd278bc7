"""The seams of selection through `trainer.train()`: who is told what, groups of several sizes, own advantages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback
from trl import GRPOTrainer

from hf_effi import EffiGRPOConfig, EffiGRPOTrainer
from hf_effi.selection import Screening, ShuffledPrompts
from tests.helpers import TableReward, assert_bitwise_equal, binary_hash_reward, grpo_args, prompt_dataset, run_grpo

GROUP = 4
OBJECTS = (
    "prompt_selector group_filter group_filters rollout_pruner advantage_transform rollout_allocator screening "
    "callbacks train_dataset processing_class"
).split()
TABLE = [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], [0.0] * 4, [1.0] * 4]


class Spy(EffiGRPOTrainer):
    """Records what reaches the loss, and what TRL is given to generate."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.batches: list[dict[str, Any]] = []
        self.asked: list[tuple[int, list[dict[str, Any]]]] = []
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        self.batches.append(batch)
        return batch

    def _calculate_rewards(self, inputs: Any, *args: Any) -> Any:
        self.asked.append((self.num_generations, [dict(row) for row in inputs]))
        return super()._calculate_rewards(inputs, *args)


class Listener(TrainerCallback):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[list[int], Any]] = []

    def on_rollouts(self, args: Any, state: Any, control: Any, rows: list[int], groups: Any) -> None:
        self.told.append((rows, groups))


class Uneven:
    """Two completions for the first prompt of a generation, the rest evenly; counts what it sees."""

    def __init__(self) -> None:
        self.seen, self.sizes = 0, []

    def allocate(self, rows: Any, budget: int) -> list[int]:
        rest = (budget - 2) // (len(rows) - 1)
        sizes = [2] + [rest] * (len(rows) - 1)
        sizes[-1] += budget - sum(sizes)
        return sizes

    def observe(self, rows: list[int], groups: Any) -> None:
        self.seen += len(rows)
        self.sizes.append(groups.sizes.tolist())

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


def table() -> TableReward:
    """Of one row, whichever the prompt is."""
    return TableReward({row["prompt"]: TABLE[i % 4] for i, row in enumerate(prompt_dataset(40))})


def train(folder: Any, reward: Any = None, cls: type = Spy, resume: Any = None, **over: Any) -> Any:
    kwargs = {name: over.pop(name) for name in OBJECTS if name in over}
    settings = {"per_device_train_batch_size": 8, "num_generations": GROUP, "gradient_accumulation_steps": 2}
    args = grpo_args(folder, EffiGRPOConfig, **{**settings, **over})
    kwargs.setdefault("train_dataset", prompt_dataset(40))
    return run_grpo(cls, args, reward_funcs=reward or table(), resume_from_checkpoint=resume, **kwargs)


def metric(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# --- row numbers and listeners ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("over", [{}, {"difficulty_range": (0, 1)}], ids=["alone", "with a filter"])
def test_a_callback_is_told_every_group_with_the_number_of_its_row(tmp_path: Path, over: dict[str, Any]) -> None:
    listener, data = Listener(), prompt_dataset(40)
    trainer = train(tmp_path, callbacks=[listener], train_dataset=data, max_steps=2, **over)
    assert len(listener.told) == 2
    asked = [row["prompt"] for _, rows in trainer.asked for row in rows][::GROUP]
    told = [row for rows, _ in listener.told for row in rows]
    assert [data[row]["prompt"] for row in told] == asked
    for rows, groups in listener.told:
        assert groups.rows == tuple(rows) and groups.column("level") == [data[row]["level"] for row in rows]
        assert groups.rewards.tolist() == [TABLE[row % 4] for row in rows]
        with pytest.raises(ValueError, match="no column 'nothing'; its columns are"):
            groups.column("nothing")


def test_a_listener_changes_nothing(tmp_path: Path) -> None:
    plain = train(tmp_path, binary_hash_reward, exact_savings="off")
    heard = train(tmp_path, binary_hash_reward, exact_savings="off", callbacks=[Listener()])
    assert_bitwise_equal(plain.model, heard.model)


def test_nobody_sees_the_hidden_column(tmp_path: Path) -> None:
    seen: set[str] = set()

    def reward(completions: Any, **kwargs: Any) -> list[float]:
        seen.update(kwargs)
        return [float(len(text) % 2) for text in completions]

    for removes in (False, True):
        listener = Listener()
        train(tmp_path, reward, callbacks=[listener], max_steps=1, remove_unused_columns=removes)
        assert listener.told[0][0][0] >= 0
    assert not [name for name in seen if name.startswith("_effi")] and "level" in seen


def test_two_rows_with_one_text_have_two_numbers(tmp_path: Path) -> None:
    from datasets import Dataset

    listener = Listener()
    data = Dataset.from_dict({"prompt": ["1+1="] * 8})
    reward = TableReward({"1+1=": [1.0, 0.0]})
    train(tmp_path, reward, callbacks=[listener], train_dataset=data, max_steps=2)
    assert sorted(row for rows, _ in listener.told for row in rows) == list(range(8))


# --- advantages of one's own -----------------------------------------------------------------------------------------


def test_an_identity_has_the_weights_of_trl(tmp_path: Path) -> None:
    plain = train(tmp_path, binary_hash_reward, exact_savings="off", max_steps=2)
    same = train(
        tmp_path,
        binary_hash_reward,
        exact_savings="off",
        max_steps=2,
        advantage_transform=lambda groups: groups.advantages,
    )
    for a, b in zip(plain.model.parameters(), same.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert metric(same, "effi/reward_kept") == metric(same, "effi/reward_generated")


def test_advantages_of_a_transform_reach_the_loss_the_filter_and_the_table(tmp_path: Path) -> None:
    def centred(groups: Any) -> torch.Tensor:
        """No division by the standard deviation, and the last group is of no interest."""
        values = groups.weighted_rewards - groups.weighted_rewards.mean(1, keepdim=True)
        values[-1] = 0
        return values

    trainer = train(
        tmp_path,
        TableReward(TABLE[:2]),
        advantage_transform=centred,
        difficulty_range=(0, 1),
        difficulty_max_rounds=1,
        difficulty_underfill="shrink",
        max_steps=1,
        exact_savings="off",
    )
    (batch,) = trainer.batches
    assert set(batch["advantages"].tolist()) <= {0.75, -0.25, 0.5, -0.5}
    assert set(trainer._logs["advantages"]) <= {0.75, -0.25, 0.5, -0.5, 0.0}
    assert metric(trainer, "effi/dropped/no_loss_tokens") == [float(GROUP)]


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda groups: groups.advantages[0], r"must return a tensor of shape \(4, 4\), got \(4,\)"),
        (lambda groups: None, "got NoneType"),
        (lambda groups: groups.advantages / 0, "not finite"),
        (3, "must be callable, got 3"),
    ],
)
def test_a_wrong_transform_is_named(tmp_path: Path, transform: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        train(tmp_path, advantage_transform=transform, max_steps=1)


# --- groups of several sizes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["group", "none", "batch"])
def test_an_allocator_gives_each_prompt_its_own_number_of_completions(tmp_path: Path, scale: str) -> None:
    listener, allocator = Listener(), Uneven()
    trainer = train(
        tmp_path,
        binary_hash_reward,
        rollout_allocator=allocator,
        callbacks=[listener],
        max_steps=2,
        scale_rewards=scale,
    )
    assert allocator.sizes == [[2, 4, 4, 6]] * 2 and allocator.seen == 8
    for (rows, groups), batch in zip(listener.told, trainer.batches, strict=True):
        assert groups.present.tolist() == [[True] * n + [False] * (6 - n) for n in (2, 4, 4, 6)]
        assert bool(groups.rewards.isnan().eq(~groups.present).all()) and len(set(rows)) == 4
        std = groups.rewards[groups.present].std()
        for i, n in enumerate((2, 4, 4, 6)):
            real = groups.rewards[i, :n]
            expected = real - real.mean()
            if scale != "none":
                expected = expected / ((std if scale == "batch" else real.std()) + 1e-4)
            assert torch.allclose(groups.advantages[i, :n], expected, atol=1e-6)
        assert len(batch["advantages"]) == 16
        assert sorted(batch["advantages"].tolist()) == pytest.approx(
            sorted(groups.advantages[groups.present].tolist())
        )
    # TRL is asked for single completions, and has its group size back.
    assert {number for number, _ in trainer.asked} == {1} and trainer.num_generations == GROUP


def test_an_allocator_that_gives_all_the_same_is_stock(tmp_path: Path) -> None:
    class Even(Uneven):
        def allocate(self, rows: Any, budget: int) -> list[int]:
            return [budget // len(rows)] * len(rows)

    plain = train(tmp_path, binary_hash_reward, cls=GRPOTrainer, max_steps=2)
    ours = train(tmp_path, binary_hash_reward, max_steps=2, rollout_allocator=Even(), exact_savings="off")
    for a, b in zip(plain.model.parameters(), ours.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_groups_of_several_sizes_are_filtered_and_refilled(tmp_path: Path) -> None:
    over = {"difficulty_range": (0, 1), "difficulty_max_rounds": 4, "max_steps": 2}
    trainer = train(tmp_path, rollout_allocator=Uneven(), **over)
    assert min(metric(trainer, "effi/gen_rounds")) > 1
    for batch in trainer.batches:
        assert bool((batch["advantages"] != 0).all()) and len(batch["advantages"]) % 2 == 0


def test_the_state_of_an_allocator_is_resumed(tmp_path: Path) -> None:
    over = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    whole = train(tmp_path / "a", binary_hash_reward, rollout_allocator=Uneven(), **over)
    folder = str(tmp_path / "a" / "checkpoint-2")
    resumed = train(tmp_path / "b", binary_hash_reward, rollout_allocator=Uneven(), resume=folder, **over)
    assert resumed.rollout_allocator.seen == whole.rollout_allocator.seen == 16
    assert_bitwise_equal(whole.model, resumed.model)
    with pytest.raises(ValueError, match="was trained with rollout_allocator=Uneven, this run has none of these"):
        train(tmp_path / "c", binary_hash_reward, resume=folder, **over)


def test_a_selector_that_the_checkpoint_does_not_know_is_named(tmp_path: Path) -> None:
    over = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    train(tmp_path / "a", binary_hash_reward, **over)
    with pytest.raises(ValueError, match="trained without a prompt selector, this run has ShuffledPrompts"):
        train(
            tmp_path / "b",
            binary_hash_reward,
            prompt_selector=ShuffledPrompts(40),
            resume=str(tmp_path / "a" / "checkpoint-1"),
            **over,
        )


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([16, 0, 0, 0], "one number >= 2 for each of 4 rows, 16 in all, got 4 numbers from 0"),
        ([8, 8], "got 2 numbers"),
    ],
)
def test_an_allocation_that_does_not_add_up_is_named(tmp_path: Path, sizes: list[int], message: str) -> None:
    class Wrong(Uneven):
        def allocate(self, rows: Any, budget: int) -> list[int]:
            return sizes

    with pytest.raises(ValueError, match=message):
        train(tmp_path, rollout_allocator=Wrong(), max_steps=1)


# --- screening -------------------------------------------------------------------------------------------------------


def test_screening_generates_the_rest_of_promising_groups_only(tmp_path: Path) -> None:
    listener, selector = Listener(), ShuffledPrompts(40, seed=3)
    rewards = TableReward({row["prompt"]: [[1.0, 0.0], [0.0, 0.0]][i % 2] for i, row in enumerate(prompt_dataset(40))})
    trainer = train(
        tmp_path, rewards, screening=Screening(2), prompt_selector=selector, callbacks=[listener], max_steps=2
    )
    assert [len(rows) for _, rows in trainer.asked] == [16, 8] * 2
    for (rows, groups), batch in zip(listener.told, trainer.batches, strict=True):
        assert len(set(rows)) == 8
        promising = [row for row in rows if row % 2 == 0][:4]
        full = [row for row, size in zip(rows, groups.sizes.tolist(), strict=True) if size == GROUP]
        assert set(full) >= set(promising[: len(full)]) and len(full) == 4
        assert len(batch["advantages"]) == 16
        learned = [i for i, row in enumerate(rows) if row in full and row % 2 == 0]
        for i in learned:
            real = groups.rewards[i, :GROUP]
            assert torch.allclose(groups.advantages[i, :GROUP], (real - real.mean()) / (real.std() + 1e-4), atol=1e-6)
    assert metric(trainer, "effi/dropped/screened") == [8.0] * 2
    assert metric(trainer, "effi/rows_generated") == [24.0] * 2 and metric(trainer, "effi/gen_rounds") == [2.0] * 2
    assert all(0 < share <= 1 for share in metric(trainer, "effi/screened_qualified"))


def test_screening_resumes_in_the_middle_of_a_generation(tmp_path: Path) -> None:
    over = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "num_iterations": 2, "screening": Screening(2)}
    whole = train(tmp_path / "a", binary_hash_reward, **over)
    resumed = train(tmp_path / "b", binary_hash_reward, resume=str(tmp_path / "a" / "checkpoint-3"), **over)
    assert_bitwise_equal(whole.model, resumed.model)


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"screening": Screening(4)}, "initial=4 screening rollouts must be in"),
        ({"screening": 4}, "must be a hf_effi.selection.Screening, got 4"),
        (
            {"screening": Screening(2), "difficulty_range": (0, 1)},
            "`screening=` and a group filter do not go together",
        ),
        ({"screening": Screening(2), "rollout_allocator": Uneven()}, "and `rollout_allocator=` do not go together"),
        ({"rollout_allocator": Uneven(), "prune_rate": 0.5}, "groups of several sizes, and CPPO prunes"),
        ({"rollout_allocator": object()}, "object has no allocate, observe, state_dict, load_state_dict"),
        ({"rollout_pruner": object()}, "rollout_pruner=object has no keep"),
        ({"group_filter": object()}, "group_filter=object has no decide, fill_order"),
        ({"group_filters": []}, "must be a list with at least one filter"),
        ({"group_filters": [object()]}, "group_filters=object has no decide"),
    ],
)
def test_what_cannot_work_is_refused_before_training(tmp_path: Path, over: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        train(tmp_path, **over)


# --- advantages of what a pruner keeps ----------------------------------------------------------------------------


def test_advantages_from_the_kept_subset(tmp_path: Path) -> None:
    class FirstTwo:
        adv_stats = "subset"

        def keep(self, groups: Any) -> torch.Tensor:
            mask = torch.zeros_like(groups.rewards, dtype=torch.bool)
            mask[:, 1:3] = True
            return mask

    rewards = TableReward([[0.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]])
    trainer = train(tmp_path, rewards, rollout_pruner=FirstTwo(), max_steps=1, scale_rewards="none")
    (batch,) = trainer.batches
    assert sorted(batch["advantages"].tolist()) == [-0.5, -0.5, 0.0, 0.0, 0.0, 0.0, 0.5, 0.5]
    FirstTwo.adv_stats = "full"
    trainer = train(tmp_path, rewards, rollout_pruner=FirstTwo(), max_steps=1, scale_rewards="none")
    assert sorted(trainer.batches[0]["advantages"].tolist()) == [-0.25, -0.25, 0.25, 0.25, 0.25, 0.25, 0.75, 0.75]
    FirstTwo.adv_stats = "half"
    with pytest.raises(ValueError, match="adv_stats must be 'full' or 'subset', got 'half'"):
        train(tmp_path, rewards, rollout_pruner=FirstTwo())
