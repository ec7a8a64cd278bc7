"""Side columns, rewards of groups, milestones: without a trainer."""

from __future__ import annotations

import asyncio
import math
import pickle
from collections import defaultdict
from functools import partial
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_effi.errors import RefusedError, RewardError
from hf_effi.selection import GroupReward, MilestoneReward, SideColumn, group_reward, side_column
from hf_effi.trainers.grpo.rewards import RewardCheck, SideColumns


def right(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(text == "4") for text in completions]


def seconds(completions: list[str], **kwargs: Any) -> list[float | None]:
    return [None if text == "?" else 1.5 * len(text) for text in completions]


async def awaited(completions: list[str], **kwargs: Any) -> list[float]:
    return [2.0 for _ in completions]


@group_reward
def rank_in_group(prompts: Any, completions: list[str], group_size: int, **kwargs: Any) -> list[float]:
    """By length, within the group."""
    found: list[float] = []
    for first in range(0, len(completions), group_size):
        lengths = [len(text) for text in completions[first : first + group_size]]
        found += [float(sorted(lengths).index(length)) for length in lengths]
    return found


# --- side columns ----------------------------------------------------------------------------------------------------


def host(*functions: Any, weights: Any = None, training: bool = True) -> Any:
    return SimpleNamespace(
        reward_funcs=list(functions),
        reward_func_names=[getattr(f, "__name__", "model") for f in functions],
        reward_weights=torch.ones(len(functions)) if weights is None else torch.tensor(weights),
        reward_processing_classes=[None] * len(functions),
        model=SimpleNamespace(training=training),
        num_generations=2,
        num_generations_eval=4,
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        _logs={"rewards": defaultdict(list)},
    )


def stock_of(trainer: Any) -> Any:
    """What TRL does, in short."""

    def calculate(inputs: Any, prompts: Any, completions: Any, completion_ids: Any) -> Tensor:
        columns = []
        for function, _, _ in zip(
            trainer.reward_funcs, trainer.reward_processing_classes, trainer.reward_func_names, strict=True
        ):
            found = function(prompts=prompts, completions=completions)
            columns.append(asyncio.run(found) if asyncio.iscoroutine(found) else found)
        return torch.tensor([[math.nan if v is None else v for v in column] for column in columns]).T

    return calculate


def calculate(trainer: Any, completions: list[str]) -> tuple[RewardCheck, Tensor]:
    side = SideColumns.taken_from(trainer)
    check = RewardCheck(trainer, side)
    rows = len(completions)
    return check, check.calculate(stock_of(trainer), [{}] * rows, ["2+2="] * rows, completions, [[1]] * rows)


def test_a_side_column_is_no_reward() -> None:
    trainer = host(side_column(seconds), right, side_column(awaited), weights=[0.5, 2.0, 7.0])
    check, rewards = calculate(trainer, ["4", "44", "?"])
    assert rewards.tolist() == [[1.0], [0.0], [0.0]]
    assert trainer.reward_funcs == [right] and trainer.reward_func_names == ["right"]
    assert trainer.reward_weights.tolist() == [2.0] and trainer.reward_processing_classes == [None]
    assert check.side["awaited"].tolist() == [2.0] * 3
    assert check.side["seconds"].tolist()[:2] == [1.5, 3.0] and math.isnan(check.side["seconds"][2])
    assert trainer._metrics["train"] == {"rewards/seconds/mean": [2.25], "rewards/awaited/mean": [2.0]}
    assert trainer._logs["rewards"]["awaited"] == [2.0] * 3 and trainer._metrics["eval"] == {}


def test_a_column_without_numbers_logs_nothing_and_warns_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def nothing(completions: list[str], **kwargs: Any) -> list[float]:
        return [math.nan] * len(completions)

    trainer = host(right, side_column(nothing), training=False)
    check, rewards = calculate(trainer, ["4"])
    assert rewards.tolist() == [[1.0]] and check.side["nothing"].isnan().all()
    assert dict(trainer._metrics["eval"]) == {} and not caplog.records


def test_large_numbers_keep_their_seconds() -> None:
    def clock(completions: list[str], **kwargs: Any) -> list[float]:
        return [1_750_000_001.25]

    assert calculate(host(right, side_column(clock)), ["4"])[0].side["clock"].tolist() == [1_750_000_001.25]


def test_what_is_no_number_is_told() -> None:
    with pytest.raises(RewardError, match="'words' returned 'long' for completion 0"):
        calculate(host(right, side_column(lambda completions, **kwargs: ["long"], name="words")), ["4"])
    with pytest.raises(RewardError, match="returned 1 rewards, but 2 were expected"):
        calculate(host(right, side_column(lambda completions, **kwargs: [1.0], name="one")), ["4", "5"])


def test_columns_need_names_and_a_reward_beside_them() -> None:
    with pytest.raises(ValueError, match="'right' has the name of another function"):
        SideColumns.taken_from(host(right, side_column(seconds, name="right")))
    with pytest.raises(ValueError, match="'seconds' has the name of another"):
        SideColumns.taken_from(host(right, side_column(seconds), side_column(seconds)))
    with pytest.raises(ValueError, match=r"all reward functions are side columns \(seconds\)"):
        SideColumns.taken_from(host(side_column(seconds)))
    with pytest.raises(TypeError, match="side_column needs a reward function, got int 3"):
        side_column(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="name=''"):
        side_column(seconds, name="")
    assert side_column(partial(seconds)).__name__ == "seconds"


def test_under_a_stock_trainer_it_rewards_nothing_and_shows_its_numbers() -> None:
    metrics: dict[str, float] = {}
    extra: dict[str, Any] = {}
    told = {"log_metric": metrics.__setitem__, "log_extra": extra.__setitem__}
    assert side_column(seconds)(completions=["4", "?"], **told) == [None, None]
    assert metrics == {"seconds": 1.5} and extra["seconds"][0] == 1.5 and math.isnan(extra["seconds"][1])
    column = side_column(awaited)
    assert asyncio.iscoroutinefunction(column.__call__) and asyncio.run(column(completions=["4"])) == [None]


def test_under_a_stock_trainer_what_is_no_list_is_told() -> None:
    for wrong in (None, {0: 1.0}, "long"):
        with pytest.raises(RewardError, match="side column 'words' returned .*, not one number per completion"):
            side_column(lambda completions, wrong=wrong, **kwargs: wrong, "words")(completions=["4"])


def test_pickles() -> None:
    for column in (side_column(seconds), side_column(awaited), side_column(seconds, name="s")):
        again = pickle.loads(pickle.dumps(column))
        assert isinstance(again, SideColumn) and again.__name__ == column.__name__ and again.fn is column.fn
        assert type(again) is type(column)
    assert pickle.loads(pickle.dumps(rank_in_group)) is rank_in_group  # as a decorator
    again = pickle.loads(pickle.dumps(group_reward(right, group_size=3)))
    assert isinstance(again, GroupReward) and again.group_size == 3 and again.fn is right


# --- rewards of groups -----------------------------------------------------------------------------------------------


def test_a_group_is_seen_as_a_whole_and_the_size_is_the_trainers() -> None:
    trainer = host(rank_in_group)
    assert calculate(trainer, ["aaa", "a", "b", "bb"])[1].flatten().tolist() == [1.0, 0.0, 0.0, 1.0]
    trainer = host(rank_in_group, training=False)  # groups of num_generations_eval
    assert calculate(trainer, ["aaa", "a", "b", "bbbb"])[1].flatten().tolist() == [2.0, 0.0, 0.0, 3.0]
    assert rank_in_group.__name__ == "rank_in_group" and rank_in_group.__doc__ == "By length, within the group."


def test_a_side_column_can_be_of_groups() -> None:
    check, _ = calculate(host(right, side_column(rank_in_group)), ["aaa", "a"])
    assert check.side["rank_in_group"].tolist() == [1.0, 0.0]


def test_columns_of_the_dataset_come_along_and_other_arguments_as_they_are() -> None:
    seen: dict[str, Any] = {}

    def look(prompts: Any, completions: Any, **kwargs: Any) -> Tensor:
        seen.update(kwargs)
        kwargs["log_extra"]("twice", [2 * len(c) for c in completions])
        return torch.zeros(len(completions))

    logged: dict[str, Any] = {}
    reward = group_reward(look, group_size=2)
    found = reward(["a", "a"], ["x", "yy"], answer=["1", "1"], trainer_state="state", log_extra=logged.__setitem__)
    assert found == [0.0, 0.0] and seen["answer"] == ["1", "1"] and seen["trainer_state"] == "state"
    assert seen["group_size"] == 2 and logged == {"twice": [2, 4]}


@pytest.mark.parametrize(
    ("make", "prompts", "kwargs", "error", "match"),
    [
        (lambda: group_reward(right), ["a"], {}, ValueError, "the size of a group is not known"),
        (lambda: group_reward(right, 2), ["a"] * 3, {}, ValueError, "3 completions are no whole groups"),
        (lambda: group_reward(right, 2), ["a", "b"], {}, ValueError, "completions 0 to 1 are of several prompts"),
        (lambda: group_reward(right, 0), ["a"], {}, ValueError, "group_size=0 must be an integer"),
        (lambda: group_reward(awaited), ["a"], {}, TypeError, "awaited is asynchronous"),
        (lambda: group_reward(lambda prompts, completions, **k: [1.0], 2), ["a"] * 2, {}, RewardError, "returned 1 "),
        (lambda: group_reward(lambda prompts, completions, **k: None, 1), ["a"], {}, RewardError, "returned None"),
        (lambda: group_reward(lambda prompts, **k: {0: 1.0}, 1), ["a"], {}, RewardError, "returned {0: 1.0}, not one"),
        (
            lambda: group_reward(lambda prompts, **k: count(), 1),
            ["a"],
            {},
            RewardError,
            "returned more than 1 rewards",
        ),
        (lambda: group_reward(nn.Linear(1, 1), 1), ["a"], {}, TypeError, "got the model Linear, which TRL tokenizes"),
        (lambda: side_column(nn.Linear(1, 1)), ["a"], {}, TypeError, "got the model Linear, which TRL tokenizes"),
    ],
)
def test_what_cannot_be_a_group_is_told(make: Any, prompts: Any, kwargs: Any, error: Any, match: str) -> None:
    with pytest.raises(error, match=match):
        make()(prompts, ["x"] * len(prompts), **kwargs)


def test_sizes_that_contradict_each_other() -> None:
    with pytest.raises(ValueError, match="made with group_size=3, and num_generations is 2"):
        calculate(host(group_reward(right, 3)), ["4", "5"])
    trainer = host(rank_in_group)
    trainer.num_generations = 1
    with pytest.raises(RefusedError, match="needs all completions of a prompt at once"):
        calculate(trainer, ["4", "5"])
    trainer = host(right, side_column(group_reward(right, 3, "three")))
    with pytest.raises(ValueError, match="made with group_size=3"):
        calculate(trainer, ["4", "5"])
    assert trainer.reward_funcs == [right] and trainer.reward_func_names == ["right"]


# --- milestones ------------------------------------------------------------------------------------------------------


def score(completions: list[Any], **kwargs: Any) -> list[float | None]:
    return [0.62 if "score" in str(text) else None for text in completions]


PATTERNS = [rf"step {i}" for i in range(7)]


def test_milestones() -> None:
    reward = MilestoneReward(PATTERNS, score)
    found = reward(completions=["", "step 0 step 3 step 5 step 5", "step 1 score"])
    assert found == pytest.approx([-10.0, -9.7, 0.62]) and found[2] == 0.62
    chat = [[{"role": "assistant", "content": "step 2"}], [{"role": "assistant", "content": None}]]
    assert MilestoneReward(PATTERNS, score, fail=-1.0)(completions=chat) == pytest.approx([-0.9, -1.0])
    printed = MilestoneReward(PATTERNS, score, read=lambda completions, **kwargs: ["step 6"], each=0.25)
    assert printed(completions=["x"]) == pytest.approx([-9.75])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"patterns": []}, "list of 1 to 256"),
        ({"patterns": "step"}, "list of 1 to 256"),
        ({"patterns": 3}, "list of 1 to 256"),
        ({"patterns": ["("]}, "is no regular expression"),
        ({"each": -0.1}, "each=-0.1"),
        ({"fail": math.nan}, "fail=nan"),
        ({"final": 3}, "final=3 must be a function"),
        ({"read": awaited}, "is asynchronous"),
    ],
)
def test_milestones_refuse(arguments: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        MilestoneReward(**{"patterns": PATTERNS, "final": score, **arguments})


def test_milestones_with_too_few_scores() -> None:
    with pytest.raises(RewardError, match="final returned 0 values for 1 completions"):
        MilestoneReward(PATTERNS, lambda completions, **kwargs: [])(completions=["x"])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"final": lambda completions, **kwargs: None}, "final returned None. It must return a list"),
        ({"final": lambda completions, **kwargs: ["0.5"]}, "final returned the text '0.5'"),
        ({"read": lambda completions, **kwargs: [5]}, "read returned 5. It must return a text"),
        ({"read": lambda completions, **kwargs: count()}, "read returned more than 1 values for 1 completions"),
    ],
)
def test_milestones_say_what_is_wrong_with_what_their_functions_return(arguments: Any, match: str) -> None:
    reward = MilestoneReward(**{"patterns": PATTERNS, "final": lambda completions, **kwargs: [None], **arguments})
    with pytest.raises(RewardError, match=match):
        reward(completions=["x"])


def test_milestones_are_looked_for_in_the_texts_of_a_message_and_not_in_their_form() -> None:
    reward = MilestoneReward(["text", "step"], lambda completions, **kwargs: [None], fail=0.0)
    parts = [{"type": "text", "text": "step"}, {"type": "image"}]
    assert reward(completions=[[{"role": "assistant", "content": parts}]]) == [pytest.approx(0.1)]


def test_a_column_of_a_tensor_is_one_number_for_each_completion() -> None:
    reward = group_reward(lambda prompts, completions, **kwargs: torch.tensor([[1.0], [0.0]]), group_size=2)
    assert reward(["a"] * 2, ["x"] * 2) == [1.0, 0.0]
