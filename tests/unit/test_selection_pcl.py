"""PCL: the choice, what its value learns, and its state."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from hf_effi.errors import MismatchError
from hf_effi.functional.kept_arguments import arguments_of
from hf_effi.functional.rollouts import ShuffledPrompts, explained_variance, nearest_to
from hf_effi.protocols import PromptSelector, RolloutGroups
from hf_effi.selection import PCL
from tests.helpers import tiny_gpt2, tiny_llama, tiny_tokenizer

NAN = float("nan")


class Context:
    """A dataset whose rows have three numbers each as their last state, and prompts of four tokens."""

    group_size, seed = 4, 0

    def __init__(self, size: int) -> None:
        self.size, self.reads = size, []
        self.states = torch.randn(size, 3, generator=torch.Generator().manual_seed(1))

    def read_prompts(self, rows: Any, read: Any, layer: str = "last") -> torch.Tensor:
        self.reads.append(list(rows))
        return torch.stack([read(torch.stack([-self.states[r], self.states[r]]), torch.tensor([1, 2])) for r in rows])

    def prompt_ids(self, rows: Any) -> list[list[int]]:
        return [[3, 4 + row % 7, 5 + row % 3][: 2 + row % 2] for row in rows]

    def column(self, name: str) -> list[Any]:
        return [f"{row}+1=" for row in range(self.size)]

    def spread(self, rows: Any, compute: Any) -> torch.Tensor:
        return compute(list(rows))

    def difficulty(self, row: int) -> float:
        return float(torch.sigmoid(3 * self.states[row, 0]))


def groups(rates: list[float], size: int = 4) -> RolloutGroups:
    rewards = torch.tensor([[1.0] * round(p * size) + [0.0] * (size - round(p * size)) for p in rates]).view(-1, size)
    lengths = torch.ones_like(rewards)
    known = torch.tensor(rates, dtype=torch.float64)
    return RolloutGroups(rewards, torch.zeros_like(rewards), lengths, step=0, pass_rates=known)


def made(size: int = 64, **over: Any) -> tuple[PCL, Context]:
    selector, context = PCL(size, **over), Context(size)
    selector.attach(context)
    return selector, context


# --- pure functions ---


def test_nearest_is_the_argmin_of_the_sum() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        values = (torch.rand(7, generator=generator) * 8).round() / 8  # with ties
        for count in range(8):
            places = nearest_to(values, 0.5, count).tolist()
            best = min(
                itertools.combinations(range(7), count),
                key=lambda chosen: (round(sum(abs(float(values[i]) - 0.5) for i in chosen), 6), chosen),
            )
            assert sum(abs(values[list(best)] - 0.5)) == pytest.approx(float(sum(abs(values[places] - 0.5))))
            assert places == sorted(places)


def test_nearest_at_its_edges() -> None:
    assert nearest_to(torch.tensor([]), 0.5, 0).tolist() == []
    assert nearest_to(torch.tensor([NAN, 9.0]), 0.5, 1).tolist() == [1]
    assert nearest_to(torch.full((4,), 0.3), 0.5, 2).tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"count=3 is outside \[0, 2\]"):
        nearest_to(torch.zeros(2), 0.5, 3)


def test_explained_variance_by_hand() -> None:
    observed = torch.tensor([0.0, 1.0, NAN])
    assert explained_variance(torch.tensor([0.0, 1.0, 5.0]), observed) == 1.0
    assert explained_variance(torch.tensor([1.0, 0.0, 5.0]), observed) == -3.0  # 1 - 1 / 0.25
    assert math.isnan(explained_variance(torch.zeros(2), torch.ones(2)))
    assert math.isnan(explained_variance(torch.zeros(0), torch.zeros(0)))


# --- the selector ---


def test_it_is_a_selector_that_remembers_its_arguments() -> None:
    selector = PCL(9, target=0.4, seed=3)
    assert isinstance(selector, PromptSelector)
    assert arguments_of(selector) == {"size": 9, "target": 0.4, "seed": 3}


@pytest.mark.parametrize("count", [1, 3, 8])
def test_one_candidate_and_no_exploring_is_the_shuffled_stream(count: int) -> None:
    selector, _ = made(16, candidates=1, explore=0.0, seed=5)
    stream = ShuffledPrompts(16, seed=5)
    for _ in range(2):  # within a pass; at its end a row would come twice in one choice, and is passed over
        assert selector.select(count) == stream.select(count)
        selector.observe([], groups([]))


def test_the_choice_is_the_nearest_of_the_candidates() -> None:
    selector, context = made(64, explore=0.0)
    value = selector._value
    value._prepare(3)
    with torch.no_grad():
        value.weights.copy_(torch.tensor([3.0, 0.0, 0.0, 0.0]))
    rows = selector.select(4)
    candidates = ShuffledPrompts(64).select(16)
    assert context.reads == [candidates]
    by_distance = sorted(candidates, key=lambda row: abs(context.difficulty(row) - 0.5))
    assert set(rows) == set(by_distance[:4])
    assert rows == [row for row in candidates if row in rows]


def test_explored_rows_are_any_candidates_and_stand_anywhere() -> None:
    places: list[int] = []
    for seed in range(30):
        selector, context = made(64, explore=0.25, seed=seed)
        value = selector._value
        value._prepare(3)
        with torch.no_grad():
            value.weights.copy_(torch.tensor([9.0, 0.0, 0.0, 0.0]))
        rows = selector.select(4)
        candidates = ShuffledPrompts(64, seed=seed).select(16)
        nearest = sorted(candidates, key=lambda row: abs(float(torch.sigmoid(9 * context.states[row, 0])) - 0.5))
        assert rows == [row for row in candidates if row in rows]
        assert len(set(rows) & set(nearest[:4])) >= 3
        places += [rows.index(row) for row in rows if row not in nearest[:4]]
        selector.observe(rows, groups([0.5] * 4))
        assert selector.metrics()["explored"] == 0.25
    assert set(places) == {0, 1, 2, 3}
    everything, _ = made(64, explore=1.0)
    assert len(set(everything.select(4)) & set(ShuffledPrompts(64).select(16))) == 4


def test_excluded_rows_are_no_candidates() -> None:
    selector, context = made(16)
    assert not {1, 2, 3} & set(selector.select(8, exclude=frozenset({1, 2, 3})))
    assert len(context.reads[0]) == 13
    # Where nothing else is left, rows repeat.
    assert len(selector.select(20)) == 20 and len(selector.select(2, exclude=frozenset(range(16)))) == 2


@pytest.mark.parametrize("value", ["head", "model"])
def test_the_value_learns_a_difficulty_and_then_hits_the_target(value: str) -> None:
    if value == "head":
        selector, context = made(256, learning_rate=0.05, value_steps=4)
        difficulty, generations = context.difficulty, 60
    else:
        model = tiny_gpt2()
        selector, context = made(64, value=value, value_model=model, learning_rate=3e-3, value_steps=2)
        difficulty, generations = (lambda row: 0.1 if row % 2 else 0.9), 12
        selector.target = 0.9
    explained = []
    for _ in range(generations):
        rows = selector.select(16)
        selector.observe(rows, groups([difficulty(row) for row in rows], 20))
        explained.append(selector.metrics()["explained_variance"])
        assert selector.metrics()["filter_seconds"] > 0
    first, last = explained[0], sum(explained[-3:]) / 3
    assert first == pytest.approx(0.0, abs=1e-12)  # a constant
    assert last > 0.8 if value == "head" else max(explained) > 0.5
    chosen = selector.select(16)
    if value == "model":
        assert sum(row % 2 == 0 for row in chosen) >= 13
    else:
        mine = sum(abs(difficulty(row) - 0.5) for row in chosen) / 16
        uniform = sum(abs(difficulty(row) - 0.5) for row in range(256)) / 256
        assert mine < uniform / 2


def test_a_step_of_the_head_by_hand() -> None:
    selector, context = made(8, candidates=1, explore=0.0, learning_rate=0.1)
    rows = selector.select(2)
    selector.observe(rows, groups([1.0, 0.0]))
    # The first step of AdamW moves each weight by the learning rate, against the sign of its gradient.
    difference = context.states[rows[1]] - context.states[rows[0]]  # of sum (V - p)^2, V = 1/2
    expected = torch.cat([-0.1 * difference.sign(), torch.zeros(1)])
    assert torch.allclose(selector._value.weights.detach(), expected, atol=1e-6)


def test_groups_that_nobody_could_score_teach_nothing() -> None:
    selector, _ = made(8)
    rows = selector.select(2)
    rewards = torch.full((2, 4), NAN)
    selector.observe(rows, RolloutGroups(rewards, torch.zeros(2, 4), torch.ones(2, 4), step=0))
    assert list(selector.metrics()) == ["filter_seconds", "explored"]
    assert not selector._value._states and float(selector._value.weights.abs().sum()) == 0
    selector.observe([3], groups([0.5]))  # not selected by it


def test_rewards_that_are_no_rates_need_a_threshold() -> None:
    rewards = torch.tensor([[2.0, -1.0], [2.0, 2.0]])
    view = RolloutGroups(rewards, torch.zeros(2, 2), torch.ones(2, 2), step=0)
    selector, _ = made(8)
    with pytest.raises(ValueError, match="success_at"):
        selector.observe(selector.select(2), view)
    selector, _ = made(8, success_at=1.0)
    selector.observe(selector.select(2), view)
    assert selector.metrics()["value_selected"] == 0.5


@pytest.mark.parametrize("value", ["head", "model"])
def test_a_state_goes_on_to_the_bit(value: str) -> None:
    def build() -> PCL:
        model = tiny_llama() if value == "model" else None
        tokenizer = tiny_tokenizer() if value == "model" else None
        return made(32, value=value, value_model=model, value_tokenizer=tokenizer, seed=2)[0]

    def go(selector: PCL, times: int) -> list[Any]:
        told = []
        for _ in range(times):
            rows = selector.select(3)
            selector.observe(rows, groups([(row % 5) / 4 for row in rows]))
            told.append((rows, selector.metrics()["value_selected"]))
        return told

    whole = build()
    assert build().state_dict()["drawn"] == 0
    before = go(whole, 3)
    state = whole.state_dict()
    after = go(whole, 3)
    other = build()
    other.load_state_dict(state)
    assert go(other, 3) == after != before
    fresh = build()
    fresh.load_state_dict(build().state_dict())
    assert go(fresh, 3) == before


def test_a_state_of_something_else_is_refused() -> None:
    state = made(8)[0].state_dict()
    with pytest.raises(MismatchError, match="has size=8, this one size=9"):
        made(9)[0].load_state_dict(state)
    with pytest.raises(MismatchError, match="has value='head', this one value='model'"):
        made(8, value="model", value_model=tiny_llama())[0].load_state_dict(state)
    selector, _ = made(8)
    selector.select(1)
    stored = selector.state_dict()
    stored["weights"] = {"weights": torch.zeros(8), "optimizer": [{}]}
    other, _ = made(8)
    other.load_state_dict(stored)
    with pytest.raises(MismatchError, match="reads 7 numbers of a prompt, this model has 3"):
        other.select(1)
    large = made(8, value="model", value_model=tiny_llama())[0].state_dict()
    with pytest.raises(MismatchError, match="has other weights"):
        made(8, value="model", value_model=tiny_gpt2())[0].load_state_dict(large)


@pytest.mark.parametrize(
    ("over", "says"),
    [
        ({"size": 0}, "size=0 must be an integer of at least 1"),
        ({"size": True}, "size=True must be"),
        ({"target": 1.5}, r"target=1.5 is outside \[0, 1\]"),
        ({"target": NAN}, "target=nan is outside"),
        ({"candidates": 0}, "candidates=0 must be"),
        ({"candidates": 65}, "candidates=65 is above 64"),
        ({"explore": -0.1}, "explore=-0.1 is outside"),
        ({"value": "mean"}, "value='mean' is not known. Use one of 'head', 'model'"),
        ({"value_model": 1}, "value_model=1 only acts with value='model'"),
        ({"value": "model"}, "needs value_model="),
        ({"value": "model", "value_model": "gpt2"}, "got 'gpt2'"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 is outside"),
        ({"value_steps": 101}, "value_steps=101 is above 100"),
        ({"success_at": "1"}, "success_at='1'"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_wrong_arguments_are_named(over: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        PCL(**{"size": 8, **over})


def test_it_must_be_attached_to_its_dataset() -> None:
    with pytest.raises(ValueError, match="PCL has no model to read prompts with"):
        PCL(8).select(1)
    with pytest.raises(ValueError, match="made for 8 rows, the training dataset has 9"):
        PCL(8).attach(Context(9))


def test_in_a_second_trainer_it_begins_anew() -> None:
    used, fresh = PCL(explore=0.3), PCL(explore=0.3)
    used.attach(Context(64))
    used.select(5)
    for selector in (used, fresh):
        selector.attach(Context(32))
    assert used.select(5) == fresh.select(5) and used.size == 32


def test_tokens_that_the_value_model_does_not_know() -> None:
    selector, _ = made(8, value="model", value_model=tiny_llama(vocab_size=12))
    with pytest.raises(ValueError, match=r"knows 12 tokens. Pass its own tokenizer"):
        selector._value._context.prompt_ids = lambda rows: [[99] for _ in rows]
        selector.select(2)
