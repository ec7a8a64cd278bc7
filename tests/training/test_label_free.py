"""Votes, one-shot and masked spans through `trainer.train()`, on TRL's trainer and on ours."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer

from hf_effi.callbacks import PassRateHistoryCallback
from hf_effi.data import MaskedSpanPrompts, repeat_rows
from hf_effi.functional.rewards import majority_vote
from hf_effi.functional.rollouts import high_variance_rows
from hf_effi.rewards import ExactSpanReward, MajorityVoteReward
from hf_effi.selection import FirstRowsPruner
from hf_effi.trainers.grpo.config import EffiGRPOConfig
from hf_effi.trainers.grpo.trainer import EffiGRPOTrainer
from tests.helpers import assert_bitwise_equal, binary_hash_reward, grpo_args, prompt_dataset, run_grpo

GROUP = 4
LABEL = "effi/label/"


def first_character(text: str) -> str:
    """The tiny policy writes nothing that a verifier could read: what it begins with is its answer."""
    return text[:1]


def metric(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


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


def train(folder: Any, reward: Any, cls: type = Spy, **over: Any) -> Any:
    settings = {"per_device_train_batch_size": 8, "num_generations": GROUP, **over}
    names = ("train_dataset", "rollout_pruner", "callbacks", "resume_from_checkpoint", "eval_dataset")
    kwargs = {name: settings.pop(name) for name in names if name in settings}
    config = GRPOConfig if cls is GRPOTrainer else EffiGRPOConfig
    return run_grpo(cls, grpo_args(folder, config, **settings), reward_funcs=reward, **kwargs)


class Noted:
    """A reward function that notes the completions, beside which the vote is checked."""

    def __init__(self) -> None:
        self.texts: list[list[str]] = []
        self.__name__ = "noted"

    def __call__(self, completions: list[str], **kwargs: Any) -> list[None]:
        self.texts.append(list(completions))
        return [None] * len(completions)


@pytest.mark.parametrize("cls", [GRPOTrainer, Spy])
def test_the_vote_is_the_reward_and_no_label_is_read(tmp_path: Path, cls: type) -> None:
    noted, size = Noted(), {"group_size": GROUP} if cls is GRPOTrainer else {}
    runs = []
    for column in (None, "answer", "level"):
        reward = MajorityVoteReward(first_character, same=None, column=column, **size)
        runs.append(train(tmp_path, [reward, noted], cls, max_steps=2))
    # With true answers, with wrong ones and without any: to the bit the same.
    for other in runs[1:]:
        assert_bitwise_equal(runs[0].model, other.model)
        assert metric(other, "rewards/majority_vote_reward/mean") == metric(
            runs[0], "rewards/majority_vote_reward/mean"
        )
    assert metric(runs[1], LABEL + "accuracy") and not metric(runs[0], LABEL + "accuracy")
    texts = noted.texts[:2]
    votes = [[majority_vote([first_character(t) for t in part[i : i + GROUP]]) for i in (0, GROUP)] for part in texts]
    means = [sum(sum(vote.agrees) for vote in pair) / (2 * GROUP) for pair in votes]
    assert metric(runs[0], "rewards/majority_vote_reward/mean") == pytest.approx(means)
    ratios = [sum(vote.ratio for vote in pair) / 2 for pair in votes]
    assert metric(runs[0], LABEL + "majority_ratio") == pytest.approx(ratios) and 0 < min(means) < 1
    assert metric(runs[0], LABEL + "abstained") == [0.0, 0.0]


def nothing(text: str) -> str:
    return "" if len(text) % 2 else " "


@pytest.mark.filterwarnings("ignore:All reward functions returned None")
@pytest.mark.parametrize("cls", [GRPOTrainer, Spy])
def test_where_nothing_can_be_read_nothing_is_learned(tmp_path: Path, cls: type) -> None:
    size = {"group_size": GROUP} if cls is GRPOTrainer else {}
    trainer = train(tmp_path, MajorityVoteReward(nothing, **size), cls, max_steps=1, weight_decay=0.0)
    assert metric(trainer, LABEL + "abstained") == [1.0] and metric(trainer, "grad_norm") == [0.0]
    never = train(tmp_path, MajorityVoteReward(first_character, min_ratio=1.0, **size), cls, max_steps=1)
    # Either all agree, and no completion is better than another, or the vote abstains.
    assert metric(never, "grad_norm") == [0.0]


def test_a_stock_trainer_has_to_be_told_the_size_of_a_group(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the size of a group is not known"):
        train(tmp_path, MajorityVoteReward(first_character), GRPOTrainer, max_steps=1)
    with pytest.raises(ValueError, match="made with group_size=2, and num_generations is 4"):
        train(tmp_path, MajorityVoteReward(first_character, group_size=2), max_steps=1)


def test_all_vote_and_the_first_are_trained_on(tmp_path: Path) -> None:
    """64 votes and 32 rows of TTRL, as 4 and 2."""
    noted = Noted()
    reward = MajorityVoteReward(first_character)
    trainer = train(tmp_path, [reward, noted], rollout_pruner=FirstRowsPruner(2), max_steps=1, exact_savings="off")
    (texts,), (batch,) = noted.texts, trainer.batches
    kept = [text for i in (0, GROUP) for text in texts[i : i + 2]]
    written = trainer.processing_class.batch_decode(batch["completion_ids"], skip_special_tokens=True)
    assert sorted(written) == sorted(kept)
    expected = {}
    for i in (0, GROUP):
        agrees = torch.tensor(majority_vote([first_character(t) for t in texts[i : i + GROUP]]).agrees[:2]).float()
        for text, advantage in zip(texts[i : i + 2], (agrees - agrees.mean()) / (agrees.std() + 1e-4), strict=True):
            expected.setdefault(text, []).append(float(advantage))
    for text, advantage in zip(written, batch["advantages"].tolist(), strict=True):
        assert any(abs(advantage - value) < 1e-5 for value in expected[text])
    with pytest.raises(ValueError, match="keep=8 completions of a group of 4"):
        train(tmp_path, reward, rollout_pruner=FirstRowsPruner(8), max_steps=1)


def test_votes_in_evaluation(tmp_path: Path) -> None:
    trainer = train(
        tmp_path, MajorityVoteReward(first_character), max_steps=1, eval_dataset=prompt_dataset(2),
        per_device_eval_batch_size=4, num_generations_eval=2, eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    assert 0 < metric(trainer, "eval_" + LABEL + "majority_ratio")[0] <= 1


# --- one-shot --------------------------------------------------------------------------------------------------------


def test_a_history_then_one_prompt(tmp_path: Path) -> None:
    history = PassRateHistoryCallback()
    over = {"train_dataset": prompt_dataset(4), "save_strategy": "steps", "save_steps": 3, "num_iterations": 1}
    plain = train(tmp_path / "plain", binary_hash_reward, max_steps=6, **over)
    watched = train(tmp_path / "a", binary_hash_reward, max_steps=6, callbacks=[history], **over)
    assert_bitwise_equal(plain.model, watched.model)
    # Two prompts in each of six generations: three visits of each of four.
    table = history.table(4)
    assert table.shape == (3, 4) and bool(((table * GROUP) % 1 == 0).all())
    again = PassRateHistoryCallback()
    train(
        tmp_path / "a", binary_hash_reward, max_steps=6, callbacks=[again], **over,
        resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"),
    )  # fmt: skip
    assert again.visits == history.visits
    assert (tmp_path / "a" / "checkpoint-3" / "effi_pass_rates.pt").exists()

    (row,) = high_variance_rows(table, k=1)
    assert float(table.std(0, correction=0)[row]) == pytest.approx(float(table.std(0, correction=0).max()))
    noted = Noted()
    one = repeat_rows(prompt_dataset(4), [row], count=4)
    trainer = train(tmp_path / "c", [binary_hash_reward, noted], train_dataset=one, max_steps=2)
    assert len(noted.texts) == 2 and trainer.state.global_step == 2
    assert set(one["prompt"]) == {prompt_dataset(4)["prompt"][row]}


def test_a_history_says_why_it_is_empty(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def half(completions: list[str], **kwargs: Any) -> list[float]:
        return [0.5 for _ in completions]

    history = PassRateHistoryCallback()
    train(tmp_path, half, callbacks=[history], max_steps=2)
    assert caplog.text.count("collects nothing") == 1 and not history.visits
    train(tmp_path, binary_hash_reward, GRPOTrainer, callbacks=[history], max_steps=1)
    assert "has seen no group" in caplog.text
    counted = PassRateHistoryCallback(success_at=0.5, max_visits=2)
    train(tmp_path, half, callbacks=[counted], train_dataset=prompt_dataset(2), max_steps=3)
    assert counted.visits == {0: [1.0, 1.0], 1: [1.0, 1.0]}
    for arguments in ({"max_visits": 1}, {"success_at": math.nan}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            PassRateHistoryCallback(**arguments)


def test_a_damaged_history_is_begun_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    over = {"save_strategy": "steps", "save_steps": 1, "train_dataset": prompt_dataset(4)}
    train(tmp_path, binary_hash_reward, callbacks=[PassRateHistoryCallback()], max_steps=1, **over)
    torch.save([1, 2], tmp_path / "checkpoint-1" / "effi_pass_rates.pt")
    history = PassRateHistoryCallback()
    train(
        tmp_path, binary_hash_reward, callbacks=[history], max_steps=2, **over,
        resume_from_checkpoint=str(tmp_path / "checkpoint-1"),
    )  # fmt: skip
    assert "begins anew" in caplog.text and sum(map(len, history.visits.values())) == 2


# --- masked spans ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [GRPOTrainer, Spy])
def test_spans_are_trained_on(tmp_path: Path, cls: type) -> None:
    texts = [f"the word after {i} is {i + 1} and then {i + 2}" for i in range(4)]
    rows = MaskedSpanPrompts((1, 2), min_context=3, template="{text}", seed=1)([{"text": text} for text in texts])
    over: dict[str, Any] = {} if cls is GRPOTrainer else {"difficulty_range": (0.0, 1.0), "difficulty_max_rounds": 1}
    trainer = train(
        tmp_path, ExactSpanReward(boxed=False), cls, train_dataset=rows, max_steps=1, max_completion_length=4, **over
    )
    assert metric(trainer, "rewards/exact_span_reward/mean") == [0.0]
    if cls is Spy:
        assert metric(trainer, "effi/underfilled") == [1.0]  # the band takes what is found sometimes, and nothing was
