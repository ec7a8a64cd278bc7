"""GAIN-RL: angles, the order, and the walk of the Gaussian along it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from hf_effi.errors import MismatchError
from hf_effi.functional.kept_arguments import arguments_of
from hf_effi.functional.rollouts import (
    angle_score,
    draw_by_gaussian,
    gaussian_weights,
    mean_cosine,
    next_mean,
    shared_ends,
)
from hf_effi.protocols import PromptSelector, RolloutGroups
from hf_effi.selection import GainRL

NAN = float("nan")
#: a prefix of two tokens, a question, a suffix of one token
PROMPTS = [[1, 2, *range(10 + row, 12 + 2 * row), 3] for row in range(12)]


class Context:
    """Each token id has one random direction."""

    group_size, seed = 4, 0

    def __init__(self, prompts: list[list[int]] = PROMPTS) -> None:
        self.prompts, self.size, self.reads = prompts, len(prompts), 0
        self.table = torch.randn(64, 8, generator=torch.Generator().manual_seed(2))

    def prompt_ids(self, rows: Any) -> list[list[int]]:
        return [self.prompts[row] for row in rows]

    def read_prompts(self, rows: Any, read: Any, layer: str = "last") -> torch.Tensor:
        assert layer == "mlp"
        self.reads += 1
        return torch.stack([read(self.table[self.prompts[row]], torch.tensor(self.prompts[row])) for row in rows])

    def column(self, name: str) -> list[Any]:
        assert name == "angle"
        return [float(row % 5) for row in range(self.size)]


def brute_score(states: torch.Tensor, prefix: int, suffix: int, weight: float) -> float:
    unit = F.normalize(states.double(), dim=-1)
    cosines = unit @ unit.T
    question = range(prefix, len(states) - suffix)
    intra = [float(cosines[i, j]) for i in question for j in question if i != j]
    inter = [float(cosines[i, j]) for i in question for j in range(prefix)]
    return (sum(intra) / len(intra) if intra else 1.0) + weight * (sum(inter) / len(inter) if inter else 0.0)


def groups(rates: list[float], size: int = 4) -> RolloutGroups:
    rewards = torch.tensor([[1.0] * round(p * size) + [0.0] * (size - round(p * size)) for p in rates]).view(-1, size)
    known = torch.tensor(rates, dtype=torch.float64)
    return RolloutGroups(rewards, torch.zeros_like(rewards), torch.ones_like(rewards), step=0, pass_rates=known)


def made(**over: Any) -> tuple[GainRL, Context]:
    selector, context = GainRL(12, **{"subset": 4, **over}), Context()
    selector.attach(context)
    return selector, context


# --- pure functions ---


def test_scores_equal_the_matrix_of_cosines() -> None:
    generator = torch.Generator().manual_seed(0)
    for tokens in (1, 2, 5, 9):
        states = torch.randn(tokens, 6, generator=generator)
        assert float(mean_cosine(states)) == pytest.approx(brute_score(states, 0, 0, 0.0), abs=1e-6)
    for prefix, suffix in ((0, 0), (3, 0), (3, 2), (0, 4), (8, 0)):
        found = float(angle_score(states, prefix, suffix, inter_weight=8.0))
        assert found == pytest.approx(brute_score(states, prefix, suffix, 8.0), abs=1e-5)
    with pytest.raises(ValueError, match="9 tokens has no question between a prefix of 5 and a suffix of 4"):
        angle_score(states, 5, 4)


def test_equal_directions_and_zero_states() -> None:
    assert float(mean_cosine(torch.ones(4, 3) * torch.arange(1, 5).unsqueeze(1))) == pytest.approx(1.0)
    assert math.isfinite(float(mean_cosine(torch.zeros(3, 2))))


def test_shared_ends_leave_a_question() -> None:
    assert shared_ends(PROMPTS) == (2, 1)
    assert shared_ends([[1, 2, 3]]) == (2, 0)
    assert shared_ends([[1, 1, 1, 1], [1, 1, 1]]) == (2, 0)
    assert shared_ends([[7], [7, 8]]) == (0, 0)
    assert shared_ends([[1, 2, 9], [1, 3, 9]], (0, 5)) == (0, 1)


def test_gaussian_weights_by_hand_and_draws_follow_them() -> None:
    assert gaussian_weights(3, 0.0, 2.0).tolist() == pytest.approx([1.0, math.exp(-0.125), math.exp(-0.5)])
    generator = torch.Generator().manual_seed(0)
    first = torch.bincount(
        torch.tensor([draw_by_gaussian(6, 2.0, 1.5, 1, generator)[0] for _ in range(6000)]), minlength=6
    )
    weights = gaussian_weights(6, 2.0, 1.5)
    assert torch.allclose(first.double() / 6000, weights / weights.sum(), atol=0.02)


def test_draws_are_without_replacement_however_far_the_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    for mean in (-1e4, 0.0, 5.0, 1e4):
        assert sorted(draw_by_gaussian(10, mean, 0.01, 10, generator)) == list(range(10))
    assert draw_by_gaussian(10, 5.0, 1.0, 0, generator) == []


def test_the_mean_walks_as_scripted() -> None:
    mean, path = 0.0, []
    for accuracy, angle in ((0.0, 0.1), (0.5, 0.4), (1.0, 0.4), (1.0, 1.0)):
        mean = next_mean(mean, accuracy, angle, 500.0)
        path.append(mean)
    one = 500 * math.tanh(0.2)
    two = one + 500 * math.tanh(1.0) + 500 * math.tanh(0.2)
    assert path == pytest.approx([0.0, one, two, two + 500 * math.tanh(1.0) + 500 * math.tanh(0.5)])
    assert next_mean(3.0, 1.0, 1.0, 500.0, accuracy_gain=99.0, angle_gain=99.0) == 1003.0  # two steps at most


# --- the selector ---


def test_it_is_a_selector_that_remembers_its_arguments() -> None:
    selector = GainRL(9, inter_weight=2.0)
    assert isinstance(selector, PromptSelector)
    assert arguments_of(selector) == {"size": 9, "inter_weight": 2.0}
    large = GainRL(74730)
    assert (large.subset, large.width * 74730, large.step * 74730) == pytest.approx((10240, 10000, 5000))
    assert GainRL(1).subset == 1


def test_the_order_equals_brute_force() -> None:
    selector, context = made()
    selector.select(1)
    scores = [brute_score(context.table[ids], 2, 1, 8.0) for ids in PROMPTS]
    assert selector._order.tolist() == sorted(range(12), key=lambda row: -scores[row])
    assert selector.scores.tolist() == pytest.approx(scores, abs=1e-4)
    asked, _ = made(prefix_tokens=0, suffix_tokens=0)
    asked.select(1)
    scores = [brute_score(context.table[ids], 0, 0, 8.0) for ids in PROMPTS]
    assert asked._order.tolist() == sorted(range(12), key=lambda row: -scores[row])


def test_scores_of_a_column_need_no_pass() -> None:
    selector, context = made(scores_column="angle", width=1e-3)
    assert selector.select(3) == [4, 9, 3]  # by score, ties by row; so narrow a Gaussian takes them from the front
    assert context.reads == 0


@pytest.mark.parametrize("values", [["high"] * 12, [0.5, None] * 6, [[1.0, 2.0]] * 12])
def test_a_column_without_scores_is_named(values: list[Any]) -> None:
    context = Context()
    context.column = lambda name: values  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="scores_column='angle' has .* in row"):
        GainRL(12, scores_column="angle").attach(context)


def test_the_selector_walks_as_the_formula_says() -> None:
    selector, context = made(step=0.1)
    expected, script = 0.0, ([1.0, 0.0, 0.5, 0.5], [1.0, 1.0, 1.0, 1.0], [0.0] * 4)
    for rates in script:
        rows = selector.select(4)  # a whole subset
        assert selector.mean == pytest.approx(expected)
        selector.observe(rows, groups(rates))
        angle = sum(brute_score(context.table[PROMPTS[row]], 0, 0, 0.0) for row in rows) / 4
        assert selector.metrics() == pytest.approx(
            {"mean_rank": expected, "accuracy": sum(rates) / 4, "angle": angle}, abs=1e-5
        )
        expected = min(11.0, next_mean(expected, sum(rates) / 4, angle, 1.2))
    selector.select(1)
    assert selector.mean == pytest.approx(expected)


def test_the_mean_ends_at_the_last_rank() -> None:
    selector, _ = made(step=5.0)
    for _ in range(3):
        selector.observe(selector.select(4), groups([1.0] * 4))
    selector.select(1)
    assert selector.mean == 11.0


def test_a_subset_is_given_once_and_moves_wait_for_its_end() -> None:
    selector, _ = made()
    rows = selector.select(3)
    selector.observe(rows, groups([1.0] * 3))
    assert selector.mean == 0.0 and len({*rows, *selector._queue}) == 4
    more = selector.select(2)
    assert selector.mean > 0.0 and len(more) == 2


def test_excluded_rows_are_passed_over_while_there_are_others() -> None:
    selector, _ = made()
    taken = frozenset(range(9))
    assert set(selector.select(3, exclude=taken)) == {9, 10, 11}
    assert len(selector.select(2, exclude=frozenset(range(12)))) == 2
    assert sorted(selector.select(12)) == list(range(12)) and len(selector.select(20)) == 20


def test_unscorable_groups_do_not_count_as_wrong() -> None:
    selector, _ = made()
    rows = selector.select(4)
    rewards = torch.tensor([[1.0, NAN, NAN, NAN], [NAN] * 4, [NAN] * 4, [NAN] * 4])
    rates = torch.tensor([1.0, NAN, NAN, NAN], dtype=torch.float64)
    view = RolloutGroups(rewards, torch.zeros(4, 4), torch.ones(4, 4), step=0, pass_rates=rates)
    selector.observe(rows, view)
    assert selector.metrics()["accuracy"] == 1.0
    other, _ = made()
    rows = other.select(4)
    nothing = RolloutGroups(torch.full((4, 4), NAN), torch.zeros(4, 4), torch.ones(4, 4), step=0)
    other.observe(rows, nothing)
    other.select(1)
    assert other.mean == 0.0 and "accuracy" not in other.metrics()


def test_a_state_goes_on_and_needs_no_second_pass() -> None:
    def go(selector: GainRL, times: int) -> list[Any]:
        told = []
        for _ in range(times):
            rows = selector.select(3)
            selector.observe(rows, groups([(row % 5) / 4 for row in rows]))
            told.append((rows, selector.mean))
        return told

    whole, _ = made(seed=4)
    go(whole, 3)
    state = whole.state_dict()
    after = go(whole, 4)
    other, context = made(seed=4)
    other.load_state_dict(state)
    assert go(other, 4) == after
    assert context.reads == 4  # of the angles of what was generated
    assert torch.equal(other.scores, whole.scores)  # to be stored in a column, also after a resume
    with pytest.raises(MismatchError, match="over 12 rows, this dataset has 13"):
        GainRL(13).load_state_dict(state)


@pytest.mark.parametrize(
    ("over", "says"),
    [
        ({"size": 0}, "size=0 must be"),
        ({"scores_column": 3}, "scores_column=3 must be the name"),
        ({"scores_column": "a", "prefix_tokens": 3}, "prefix_tokens=3 only acts without scores_column="),
        ({"scores_column": "a", "inter_weight": 1.0}, "inter_weight=1.0 only acts"),
        ({"prefix_tokens": -1}, "prefix_tokens=-1"),
        ({"suffix_tokens": True}, "suffix_tokens=True"),
        ({"inter_weight": NAN}, "inter_weight=nan"),
        ({"subset": 9}, "subset=9 exceeds the 8 rows"),
        ({"width": 0.0}, "width=0.0 is outside"),
        ({"step": -1.0}, "step=-1.0"),
        ({"accuracy_target": 2.0}, "accuracy_target=2.0"),
        ({"angle_gain": -1.0}, "angle_gain=-1.0"),
        ({"seed": 1.5}, "seed=1.5"),
    ],
)
def test_wrong_arguments_are_named(over: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        GainRL(**{"size": 8, **over})


def test_it_must_be_attached_to_its_dataset() -> None:
    with pytest.raises(ValueError, match="GainRL has no model to read prompts with"):
        GainRL(8).select(1)
    with pytest.raises(ValueError, match="made for 8 rows, the training dataset has 12"):
        GainRL(8).attach(Context())
    context = Context()
    context.column = lambda name: [NAN] * 12
    with pytest.raises(ValueError, match="score of row 0 is not a number"):
        GainRL(12, scores_column="angle").attach(context)


def test_in_a_second_trainer_it_begins_anew() -> None:
    used, fresh = GainRL(), GainRL()
    used.attach(Context(PROMPTS[:9]))
    used.select(5)
    used.observe(used.select(2), groups([1.0, 1.0]))
    for selector in (used, fresh):
        selector.attach(Context(PROMPTS))
    assert used.select(7) == fresh.select(7) and used.size == 12
    assert used.mean == fresh.mean and torch.equal(used.scores, fresh.scores)
