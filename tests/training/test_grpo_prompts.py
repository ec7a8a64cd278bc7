"""Which prompts a step has, and what a prompt selector is told: through `trainer.train()`."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from hf_effi.functional.rollouts import ShuffledPrompts
from hf_effi.trainers.grpo.config import EffiGRPOConfig
from hf_effi.trainers.grpo.trainer import EffiGRPOTrainer
from tests.helpers import (
    TableReward,
    assert_bitwise_equal,
    binary_hash_reward,
    grpo_args,
    prompt_dataset,
    run_grpo,
)

GROUP = 2


class Served:
    """A reward that remembers the prompts of each optimizer step, one per group. Half of the groups are dead."""

    def __init__(self) -> None:
        self.__name__ = "served"
        self.by_step: dict[int, list[str]] = defaultdict(list)

    def __call__(self, prompts: list[str], completions: list[str], trainer_state: Any, **kwargs: Any) -> list[float]:
        self.by_step[trainer_state.global_step] += prompts[::GROUP]
        mixed = binary_hash_reward(completions)
        return [0.0 if len(self.by_step) % 2 == i // GROUP % 2 else reward for i, reward in enumerate(mixed)]


def train(
    folder: Any,
    rewards: Any,
    data: Any = None,
    resume: str | None = None,
    cls: type = EffiGRPOTrainer,
    **over: Any,
) -> Any:
    settings = {"per_device_train_batch_size": 12, "num_generations": GROUP, "max_completion_length": 4}
    kwargs = {name: over.pop(name) for name in ("prompt_selector", "group_filter") if name in over}
    return run_grpo(
        cls,
        grpo_args(folder, EffiGRPOConfig, **{**settings, **over}),
        reward_funcs=rewards,
        train_dataset=prompt_dataset(40) if data is None else data,
        resume_from_checkpoint=resume,
        **kwargs,
    )


def metric(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# --- no prompt twice in a step ---------------------------------------------------------------------------------------


def test_a_refill_serves_no_prompt_that_the_step_has(tmp_path: Any) -> None:
    served = Served()
    trainer = train(tmp_path, served, difficulty_range=(0, 1), difficulty_max_rounds=4, max_steps=10)
    assert sum(metric(trainer, "effi/gen_rounds")) > 15
    for prompts in served.by_step.values():
        assert len(prompts) > 6 and len(set(prompts)) == len(prompts)


def test_nor_one_of_another_generation_of_the_same_step(tmp_path: Any) -> None:
    rounds: dict[int, list[tuple[str, list[str]]]] = defaultdict(list)
    kinds: list[str] = []

    class Marks(EffiGRPOTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            kinds.append("loader")
            return super()._generate_and_score_completions(inputs)

    def dead(prompts: list[str], trainer_state: Any, **kwargs: Any) -> list[float]:
        rounds[trainer_state.global_step].append((kinds.pop() if kinds else "refill", prompts[::GROUP]))
        return [0.0] * len(prompts)

    over = {"steps_per_generation": 1, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 8}
    train(tmp_path, dead, cls=Marks, difficulty_range=(0, 1), difficulty_max_rounds=3, max_steps=3, **over)
    for served in rounds.values():
        assert [kind for kind, _ in served] == ["loader", "refill", "refill"] * 2
        before: set[str] = set()
        for kind, prompts in served:
            assert kind == "loader" or not before & set(prompts)
            before |= set(prompts)


def test_two_rows_with_one_prompt_are_one_prompt(tmp_path: Any) -> None:
    served, rows = Served(), prompt_dataset(20).to_list()
    data = Dataset.from_list([{**row, "level": 10 * copy} for row in rows for copy in range(3)])
    train(tmp_path, served, data, difficulty_range=(0, 1), difficulty_max_rounds=3, max_steps=6, seed=2)
    for prompts in served.by_step.values():
        # What the loader serves is stock's; the refills add nothing twice.
        assert len(set(prompts)) == len(set(prompts[:6])) + len(prompts[6:])


def test_prompts_repeat_where_there_are_no_others(tmp_path: Any) -> None:
    served = Served()
    trainer = train(tmp_path, served, prompt_dataset(7), difficulty_range=(0, 1), difficulty_max_rounds=4, max_steps=4)
    assert trainer.state.global_step == 4
    for prompts in served.by_step.values():
        # The loader has six of the seven; the first refill takes the seventh before any other.
        assert len(prompts) > 7 and len(set(prompts[:7])) == 7


def test_conversations_are_compared_by_their_messages(tmp_path: Any) -> None:
    steps: dict[int, list[str]] = defaultdict(list)

    def reward(prompts: Any, completions: Any, trainer_state: Any, **kwargs: Any) -> list[float]:
        steps[trainer_state.global_step] += [prompt[0]["content"] for prompt in prompts[::GROUP]]
        return [0.0] * len(prompts)

    data = prompt_dataset(40, conversational=True)
    train(tmp_path, reward, data, difficulty_range=(0, 1), difficulty_max_rounds=4, max_steps=2)
    for prompts in steps.values():
        assert len(set(prompts)) == len(prompts) == 24


# --- selectors -------------------------------------------------------------------------------------------------------


class Recording(ShuffledPrompts):
    """A shuffled stream that keeps what it is told."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.told: list[Any] = []

    def observe(self, rows: list[int], groups: Any) -> None:
        self.told.append((rows, groups))


def accuracy(completions: list[str], **kwargs: Any) -> list[float]:
    return binary_hash_reward(completions)


def brevity(completions: list[str], **kwargs: Any) -> list[float | None]:
    return [-float(len(text)) if i % 3 else None for i, text in enumerate(completions)]


def test_a_selector_without_a_filter_is_told_what_came_out(tmp_path: Any) -> None:
    selector = Recording(40, seed=1)
    over = {"reward_weights": [2.0, 0.5], "max_steps": 2, "difficulty_reward": "accuracy"}
    trainer = train(tmp_path, [accuracy, brevity], prompt_selector=selector, **over)
    assert [row for rows, _ in selector.told for row in rows] == ShuffledPrompts(40, seed=1).select(12)
    for step, (_, groups) in enumerate(selector.told):
        right, short = groups.rewards_per_func.unbind(-1)
        assert groups.reward_names == ("accuracy", "brevity") and groups.step == step
        assert torch.equal(groups.rewards, right) and set(right.flatten().tolist()) <= {0.0, 1.0}
        assert torch.equal(groups.pass_rates, right.double().mean(1))
        assert torch.equal(groups.weighted_rewards, 2 * right + 0.5 * short.nan_to_num(0.0))
        assert short.isnan().any() and groups.live.all() and groups.advantages.shape == (6, GROUP)
        logged = metric(trainer, "reward")[step]
        assert float(groups.weighted_rewards.mean()) == pytest.approx(logged)


@pytest.mark.parametrize("rewards", [[brevity], [accuracy, brevity]])
def test_no_pass_rate_where_nothing_says_right_or_wrong(tmp_path: Any, rewards: Any) -> None:
    selector = Recording(40, seed=1)
    train(tmp_path, rewards, prompt_selector=selector, max_steps=1)
    (_, groups), *_ = selector.told
    assert groups.pass_rates.isnan().all() and groups.pass_rates.shape == (6,)
    assert len(rewards) == 1 or torch.equal(groups.rewards, groups.weighted_rewards)


def test_a_selector_of_the_old_form_is_named_before_training(tmp_path: Any) -> None:
    class Old(ShuffledPrompts):
        def observe(self, rows: list[int], pass_rates: list[float]) -> None: ...

    with pytest.raises(
        TypeError, match=r"Old.observe\(rows, pass_rates\) is the old form. It is now observe\(rows, gro"
    ):
        train(tmp_path, accuracy, prompt_selector=Old(40))
    with pytest.raises(TypeError, match="prompt_selector=object has no select, observe, state_dict, load_state_dict"):
        train(tmp_path, accuracy, prompt_selector=object())


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([0, 1], ValueError, r"Fixed.select\(6\) returned 2 rows. It must return 6"),
        ([0, 1, 2, 3, 4, 40], ValueError, "returned row 40; the training dataset has rows 0 to 39"),
        ([0.5] * 6, TypeError, "must return a list of row numbers"),
    ],
)
def test_a_wrong_answer_of_a_selector_is_named(tmp_path: Any, rows: Any, error: type, message: str) -> None:
    class Fixed(ShuffledPrompts):
        def select(self, count: int) -> Any:
            return rows

    with pytest.raises(error, match=message):
        train(tmp_path, accuracy, prompt_selector=Fixed(40))


def test_rows_of_a_selector_come_once_in_a_step_while_it_has_others(tmp_path: Any) -> None:
    class Best(ShuffledPrompts):
        """Always the first rows; with `exclude`, the first that the step does not have."""

        def select(self, count: int, exclude: frozenset[int] = frozenset()) -> list[int]:
            return [row for row in range(self.size) if row not in exclude][:count]

    class Stubborn(Best):
        def select(self, count: int) -> list[int]:
            return list(range(count))

    over = {"difficulty_range": (0, 1), "difficulty_max_rounds": 3, "max_steps": 2}
    for selector, served in ((Best(40), Served()), (Stubborn(40), Served())):
        train(tmp_path, served, prompt_selector=selector, **over)
        for prompts in served.by_step.values():
            assert len(prompts) > 6
            # Who offers nothing else is taken at its word.
            expected = len(prompts) if type(selector) is Best else 6
            assert len(set(prompts)) == expected


# --- state -----------------------------------------------------------------------------------------------------------


class Weighted:
    """Draws rows by weights that it learns: its state holds a tensor, and a generator's."""

    def __init__(self, size: int) -> None:
        self.weights = torch.ones(size)
        self.generator = torch.Generator().manual_seed(5)

    def select(self, count: int) -> list[int]:
        return torch.multinomial(self.weights, count, generator=self.generator).tolist()

    def observe(self, rows: list[int], groups: Any) -> None:
        self.weights[rows] = 0.05 + (groups.pass_rates * (1 - groups.pass_rates)).float()

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights, "generator": self.generator.get_state(), "nested": {"rows": [1, 2]}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["nested"] == {"rows": [1, 2]} and state["weights"].device.type == "cpu"
        self.weights = state["weights"].clone()
        self.generator.set_state(state["generator"])


def test_a_tensor_in_the_state_of_a_selector_is_saved_and_resumed(tmp_path: Any) -> None:
    over = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    whole = train(tmp_path / "a", accuracy, prompt_selector=Weighted(40), **over)
    folder = tmp_path / "a" / "checkpoint-2"
    stored = torch.load(folder / "effi_prompts.pt", weights_only=True)
    assert any(torch.is_tensor(value) and value.shape == (40,) for value in tensors_of(stored))
    resumed = train(tmp_path / "b", accuracy, prompt_selector=Weighted(40), resume=str(folder), **over)
    assert torch.equal(whole.prompt_selector.weights, resumed.prompt_selector.weights)
    assert_bitwise_equal(whole.model, resumed.model)


def tensors_of(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [found for part in value.values() for found in tensors_of(part)]
    return [value]


def test_a_save_that_fails_leaves_no_half_file(tmp_path: Any) -> None:
    class Unsaveable(Weighted):
        def state_dict(self) -> dict[str, Any]:
            return {"weights": self.weights, "bad": lambda: None}

    with pytest.raises(ValueError, match="Unsaveable.* cannot be stored in a checkpoint"):
        train(tmp_path, accuracy, prompt_selector=Unsaveable(40), save_strategy="steps", save_steps=1)
    assert not list(Path(tmp_path).rglob("*effi_prompts*"))


def test_refills_resume_where_they_stopped(tmp_path: Any) -> None:
    def table() -> TableReward:
        return TableReward({row["prompt"]: [0.0, float(i % 3 > 0)] for i, row in enumerate(prompt_dataset(40))})

    over = {"difficulty_range": (0, 1), "max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    whole = train(tmp_path / "a", table(), **over)
    resumed = train(tmp_path / "b", table(), resume=str(tmp_path / "a" / "checkpoint-2"), **over)
    assert min(metric(whole, "effi/gen_rounds")) > 1
    assert_bitwise_equal(whole.model, resumed.model)


# --- rewards in the log ----------------------------------------------------------------------------------------------


def test_both_rewards_are_logged_by_name(tmp_path: Any) -> None:
    over = {"difficulty_range": (0, 1), "difficulty_max_rounds": 1, "difficulty_underfill": "shrink"}
    over |= {"difficulty_reward": "table_reward", "reward_weights": [2.0, 0.5], "max_steps": 1}
    table = TableReward([[1.0, 0.0], [0.0, 0.0]])  # every other group is kept

    def ten(completions: list[str], **kwargs: Any) -> list[float | None]:
        return [10.0 if i < GROUP else None for i in range(len(completions))]

    log = train(tmp_path, [table, ten], **over).state.log_history[0]
    # By hand: 12 rows, 3 of them right; 10 for the two of the first group, which is kept with two others.
    assert log["effi/filter_reward_generated"] == log["rewards/table_reward/mean"] == 0.25
    assert log["effi/filter_reward_kept"] == 0.5
    assert log["effi/reward_generated"] == pytest.approx(log["reward"]) == pytest.approx((2 * 3 + 0.5 * 20) / 12)
    assert log["effi/reward_kept"] == pytest.approx((2 * 3 + 0.5 * 20) / 6)


def test_without_a_filter_there_is_no_reward_of_a_filter(tmp_path: Any) -> None:
    log = train(tmp_path, accuracy, prune_rate=0.5, max_steps=1).state.log_history[0]
    assert log["effi/reward_generated"] == pytest.approx(log["reward"])
    assert not any("filter_reward" in name for name in log)
