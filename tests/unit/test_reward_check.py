"""
`RewardCheck` without a trainer: functions are wrapped for one call, and problems raise after all ranks have heard.
"""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_effi.errors import RewardError
from hf_effi.trainers.grpo.rewards import RewardCheck


def host(*functions: Any) -> Any:
    names = [getattr(function, "__name__", "model") for function in functions]
    return SimpleNamespace(reward_funcs=list(functions), reward_func_names=names)


def right(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(text == "4") for text in completions]


def text(completions: list[str], **kwargs: Any) -> list[str]:
    return ["good"] * len(completions)


def stock_of(trainer: Any) -> Any:
    """What TRL does, in short."""

    def calculate(inputs: Any, prompts: Any, completions: Any, completion_ids: Any) -> Tensor:
        columns = []
        for function in trainer.reward_funcs:
            found = function(prompts=prompts, completions=completions)
            columns.append(asyncio.run(found) if asyncio.iscoroutine(found) else found)
        return torch.tensor([[float("nan") if v is None else v for v in column] for column in columns]).T

    return calculate


def calculate(trainer: Any) -> tuple[RewardCheck, Tensor]:
    check = RewardCheck(trainer)
    return check, check.calculate(stock_of(trainer), [{}] * 2, ["2+2="] * 2, ["4", "5"], [[1], [2]])


def test_rewards_pass_and_the_functions_are_put_back() -> None:
    trainer = host(right)
    check, rewards = calculate(trainer)
    assert rewards.tolist() == [[1.0], [0.0]] and check.problems == []
    assert trainer.reward_funcs == [right]


def test_a_problem_is_raised_once_stock_has_returned() -> None:
    trainer = host(right, text)
    check = RewardCheck(trainer)
    with pytest.raises(RewardError, match="'text' returned 'good' for completion 0"):
        check.calculate(stock_of(trainer), [{}], ["2+2="], ["4"], [[1]])
    assert len(check.problems) == 1 and trainer.reward_funcs == [right, text]


def test_functions_are_put_back_where_stock_fails() -> None:
    def fails(completions: list[str], **kwargs: Any) -> list[float]:
        raise KeyError("answer")

    trainer = host(fails)
    with pytest.raises(KeyError):
        calculate(trainer)
    assert trainer.reward_funcs == [fails]


def test_an_async_function_stays_one() -> None:
    async def slow(completions: list[str], **kwargs: Any) -> list[float]:
        return [0.5] * len(completions)

    assert calculate(host(slow))[1].tolist() == [[0.5], [0.5]]


def test_a_reward_model_is_left_to_stock() -> None:
    model, seen = nn.Linear(1, 1), []
    trainer = host(model)
    RewardCheck(trainer).calculate(
        lambda *rows: seen.extend(trainer.reward_funcs) or torch.zeros(1, 1), [], [], [], []
    )
    assert seen == [model]
