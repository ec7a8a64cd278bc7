"""Budgets of length, the rewards under them, and the reward object: values by hand, edges, and what is refused."""

from __future__ import annotations

import asyncio
import pickle
from types import SimpleNamespace
from typing import Any

import pytest

from hf_effi.callbacks import BudgetPromptCallback, GenerationCapCallback, GRPOScheduleCallback, still3
from hf_effi.callbacks.grpo_schedule import _course
from hf_effi.errors import RewardError
from hf_effi.functional.rewards import (
    ExponentialBudget,
    LinearBudget,
    NDecayBudget,
    band_reward,
    check_budget,
    exponential_budget,
    linear_budget,
    n_decay_budget,
    triangular_reward,
)
from hf_effi.rewards import LengthBudgetReward, train_long_think_short
from hf_effi.schedules import constant, cosine, linear, token_indexed

EDGES = [0, 50, 100, 150, 200, 300]  # 0, L/2, L, 1.5 L, 2 L, 3 L


def now(step: int = 0, total: int = 600) -> Any:
    return SimpleNamespace(global_step=step, max_steps=total)


# --- budgets ---------------------------------------------------------------------------------------------------------


def test_the_table_of_the_paper() -> None:
    """0.7 every 150 updates: 256, 179.2, 125.44 and 87.808, rounded down."""
    budget = ExponentialBudget()
    assert [budget.at(step, 600) for step in (0, 149, 150, 299, 300, 450, 599, 600)] == [
        256, 256, 179, 179, 125, 87, 87, 61,
    ]  # fmt: skip
    assert exponential_budget(10**6, 256, 0.7, 150) == 1
    assert exponential_budget(10**6, 256, 0.7, 150, least=16) == 16
    assert [exponential_budget(step, 9, 1.0, 1) for step in (0, 5)] == [9, 9]


def test_the_table_of_rmt() -> None:
    budget = ExponentialBudget(800, 0.2, None)
    assert [budget.at(step, 100) for step in (0, 25, 50, 75, 100, 500)] == [800, 534, 357, 239, 160, 160]


def test_linear_and_n_decays_end_where_they_are_asked_to() -> None:
    assert [linear_budget(step, 256, 87, 600) for step in (0, 300, 600, 601)] == [256, 171, 87, 87]
    for decays in (1, 2, 3, 5, 7, 11):
        values = [n_decay_budget(step, 256, 87, decays, 600) for step in range(700)]
        assert values[0] == 256 and values[-1] == values[599] == 87
        assert len(set(values)) == decays + 1 and values == sorted(values, reverse=True)
    assert [n_decay_budget(step, 256, 87, 7, 600) for step in (74, 75)] == [256, 219]
    assert [NDecayBudget(10, 5, 2).at(step, 1) for step in (0, 1)] == [10, 5]
    assert LinearBudget(5, 5).at(3, 1) == 5


@pytest.mark.parametrize(
    "make",
    [
        lambda: ExponentialBudget(0),
        lambda: ExponentialBudget(8, 0.0),
        lambda: ExponentialBudget(8, 1.1),
        lambda: ExponentialBudget(8, float("nan")),
        lambda: ExponentialBudget(8, 0.5, 0),
        lambda: ExponentialBudget(8, 0.5, 1, 0),
        lambda: ExponentialBudget(True),
        lambda: LinearBudget(8, 9),
        lambda: LinearBudget(8, 0),
        lambda: NDecayBudget(8, 4, 0),
        lambda: exponential_budget(-1, 8, 0.5, 1),
        lambda: check_budget(0),
        lambda: check_budget(True),
        lambda: check_budget("256"),  # type: ignore[arg-type]
    ],
)
def test_a_budget_out_of_range_is_refused(make: Any) -> None:
    with pytest.raises(ValueError, match=r"start|end|decay|every_steps|least|step|budget"):
        make()


# --- rewards ---------------------------------------------------------------------------------------------------------


def test_rewards_at_the_edges() -> None:
    assert triangular_reward(EDGES, 100).tolist() == [0, 0.5, 1, 0.5, 0, 0]
    assert triangular_reward(EDGES, 100, largest=3.0).tolist() == [0, 1.5, 3, 1.5, 0, 0]
    assert band_reward(EDGES, 0, 100, 200).tolist() == [1, 1, 1, 0.5, 0, 0]
    assert band_reward([0, 20, 40, 60, 80, 100], 40, 60, 100, largest=2.0).tolist() == [0, 1, 2, 2, 1, 0]
    assert band_reward([40], 40, 40, 41).tolist() == [1]
    assert triangular_reward([0, 1, 2, 3], 1).tolist() == [0, 1, 0, 0]
    assert triangular_reward([], 5).tolist() == band_reward([], 0, 5, 6).tolist() == []


@pytest.mark.parametrize(
    "make",
    [
        lambda: triangular_reward([1], 0),
        lambda: triangular_reward([1], 1, largest=0),
        lambda: triangular_reward([-1], 5),
        lambda: triangular_reward([float("nan")], 5),  # type: ignore[list-item]
        lambda: band_reward([1], -1, 5, 6),
        lambda: band_reward([1], 6, 5, 7),
        lambda: band_reward([1], 1, 5, 5),
    ],
)
def test_a_reward_out_of_range_is_refused(make: Any) -> None:
    with pytest.raises(ValueError, match=r"budget|largest|lengths|low|high|longest"):
        make()


# --- the reward object -----------------------------------------------------------------------------------------------


def call(reward: LengthBudgetReward, lengths: list[int], step: int = 0, **columns: Any) -> Any:
    texts = [""] * len(lengths)
    given = {"completion_ids": [[7] * n for n in lengths], "trainer_state": now(step), **columns}
    return reward(prompts=texts, completions=texts, **given)


def test_the_budget_follows_the_update() -> None:
    reward = LengthBudgetReward()
    assert call(reward, [256, 179, 87]) == pytest.approx([1.0, 179 / 256, 87 / 256])
    assert call(reward, [256, 179, 87], step=450) == [0.0, 0.0, 1.0]
    assert call(LengthBudgetReward(4, "band"), [0, 4, 6, 8]) == [1.0, 1.0, 0.5, 0.0]
    assert call(reward, []) == []


def test_what_is_gated() -> None:
    """A wrong answer of the right length earns nothing; without the gate it earns everything."""
    right = [1.0, 0.0, -1.0, None, float("nan"), 0.5]
    by_function = LengthBudgetReward(4, gate_on_correct=lambda completions, **kwargs: right)
    by_column = LengthBudgetReward(4, gate_on_correct="ok", largest=2.0)
    assert call(by_function, [4] * 6) == [1.0, 0.0, 0.0, None, None, 1.0]
    assert call(by_column, [4] * 6, ok=right) == [2.0, 0.0, 0.0, None, None, 2.0]
    assert call(LengthBudgetReward(4), [4] * 6) == [1.0] * 6


def test_a_gate_that_is_awaited() -> None:
    async def slowly(completions: Any, **kwargs: Any) -> list[float]:
        return [0.0, 1.0]

    for reward in (LengthBudgetReward(4, gate_on_correct=slowly), LengthBudgetReward(4, "triangular", slowly)):
        assert isinstance(reward, LengthBudgetReward)
        assert asyncio.run(call(reward, [4, 4])) == [0.0, 1.0]


def test_it_travels_by_pickle() -> None:
    again = pickle.loads(pickle.dumps(LengthBudgetReward(LinearBudget(9, 3), "band", "ok", 2.0, "mine")))
    assert again.__name__ == "mine" and call(again, [9, 9], ok=[1, 0]) == [2.0, 0.0]


def test_what_it_logs() -> None:
    logged: dict[str, float] = {}
    call(LengthBudgetReward(4), [4, 8, 9, 20], log_metric=logged.__setitem__)
    assert logged == {"effi/length/budget": 4.0, "effi/length/mean": 10.25, "effi/length/over_twice": 0.5}


def test_the_reward_refuses_by_name() -> None:
    with pytest.raises(ValueError, match="shape must be one of 'triangular', 'band', got 'flat'"):
        LengthBudgetReward(4, "flat")
    with pytest.raises(ValueError, match="gate_on_correct=3 must be a reward function"):
        LengthBudgetReward(4, gate_on_correct=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="largest"):
        LengthBudgetReward(4, largest=0.0)
    with pytest.raises(RewardError, match="completion_ids and trainer_state"):
        LengthBudgetReward(4)(completions=["x"])
    with pytest.raises(RewardError, match="reads the column 'ok'"):
        call(LengthBudgetReward(4, gate_on_correct="ok"), [4])
    with pytest.raises(RewardError, match="gave 2 values for 1 completions"):
        call(LengthBudgetReward(4, gate_on_correct=lambda **kwargs: [1.0, 1.0]), [4])
    with pytest.raises(RewardError, match="gave the text 'yes'"):
        call(LengthBudgetReward(4, gate_on_correct="ok"), [4], ok=["yes"])


def test_the_weights_of_the_paper() -> None:
    def correct(completions: Any, **kwargs: Any) -> list[float]:
        return [0.0 for _ in completions]

    config, trainer = train_long_think_short(correct, correct)
    assert config == {"reward_weights": [0.6, 0.3, 0.1]} and trainer["reward_funcs"][1].gate_on_correct is None
    config, trainer = train_long_think_short(correct, emphasis="length", gated=True, budget=7)
    assert config == {"reward_weights": [0.3, 0.6]} and call(trainer["reward_funcs"][1], [7]) == [0.0]
    for wrong in ({"emphasis": "form"}, {"well_formed": 1}):
        with pytest.raises(ValueError, match=r"emphasis|well_formed"):
            train_long_think_short(correct, **wrong)  # type: ignore[arg-type]


# --- callbacks, as far as they need no trainer -----------------------------------------------------------------------


def test_the_cap_in_tokens() -> None:
    callback = GenerationCapCallback(ExponentialBudget(), ratio=2.0)
    assert [callback.cap(step, 600, 400) for step in (0, 150, 300, 450)] == [400, 358, 250, 174]
    assert callback.cap(0, 600, None) == 512
    assert GenerationCapCallback(3, ratio=1.5).cap(0, 1, 8) == 4
    with pytest.raises(ValueError, match="ratio"):
        GenerationCapCallback(3, ratio=0.5)


def test_a_placeholder_is_replaced_wherever_it_stands() -> None:
    from hf_effi.callbacks.length_budget import _replaced, _texts

    parts = [{"type": "image"}, {"type": "text", "text": "in {budget}"}]
    chat = [{"role": "system", "content": "{budget}"}, {"role": "user", "content": parts}]
    assert list(_texts(chat)) == ["{budget}", "in {budget}"]
    found = _replaced(chat, "{budget}", "64")
    assert found[0]["content"] == "64" and found[1]["content"][1] == {"type": "text", "text": "in 64"}
    assert found[1]["content"][0] == {"type": "image"} and chat[0]["content"] == "{budget}"
    with pytest.raises(ValueError, match="placeholder"):
        BudgetPromptCallback(4, "")


def test_a_value_over_the_run() -> None:
    assert [_course("beta", 0.5, linear(2), 4)(step) for step in range(4)] == [0.5, 0.25, 0.0, 0.0]
    assert [_course("temperature", 1.2, constant(), 3)(step) for step in range(3)] == [1.2] * 3
    assert _course("beta", 0.04, cosine(), 2)(1) == pytest.approx(0.02)
    with pytest.raises(ValueError, match="temperature would be 0 after 2 updates"):
        _course("temperature", 1.0, linear(2), 4)
    with pytest.raises(ValueError, match="more updates than the 4 of this run"):
        _course("beta", 1.0, linear(8), 4)


def test_schedules_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="nothing to move"):
        GRPOScheduleCallback()
    with pytest.raises(ValueError, match="beta=0.1 is not a Schedule"):
        GRPOScheduleCallback(beta=0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="absolute learning rates or of tokens"):
        GRPOScheduleCallback(beta=token_indexed(schedule=linear(4)))


def test_the_preset_of_still3() -> None:
    config, trainer = still3(
        per_device_train_batch_size=4, gradient_accumulation_steps=2, temperature=1.2, end_temperature=1.0
    )
    assert config["steps_per_generation"] == config["gradient_accumulation_steps"] == 2
    assert (config["num_iterations"], config["temperature"], config["beta"]) == (1, 1.2, 1e-3)
    (callback,) = trainer["callbacks"]
    assert callback.beta == cosine() and callback.temperature == linear(floor=1.0 / 1.2)
    plain = still3(per_device_train_batch_size=4, gradient_accumulation_steps=2, beta_course="linear")
    assert plain.trainer["callbacks"][0].temperature is None and plain.trainer["callbacks"][0].beta == linear()
    for wrong in ({"beta": 0.0}, {"beta_course": "wsd"}, {"end_temperature": 2.0}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            still3(per_device_train_batch_size=4, gradient_accumulation_steps=2, **wrong)  # type: ignore[arg-type]
