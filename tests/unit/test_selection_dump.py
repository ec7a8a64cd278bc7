"""DUMP: windows, upper bounds and weights from a scripted stream of advantages."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hf_effi.errors import MismatchError
from hf_effi.functional.rollouts import quantile_bins, source_weights, upper_bounds
from hf_effi.selection import DUMP
from tests.helpers.prompt_selectors import groups_of


def seen(selector: DUMP, rows: list[int], advantages: list[list[float]], rewards: Any = None, step: int = 0) -> None:
    rewards = [[0.0] * len(advantages[0])] * len(rows) if rewards is None else rewards
    selector.observe(rows, groups_of(rewards, advantages=advantages, step=step))


def test_weights_of_a_scripted_stream() -> None:
    selector = DUMP(["a", "b", "a", "b", "c"], window=4)
    seen(selector, [0, 1], [[1.0, -1.0], [0.5, -0.5]])
    seen(selector, [2, 0], [[0.0, 0.0], [2.0, -2.0]])
    windows = {"a": [0.0, 0.0, 2.0, 2.0], "b": [0.5, 0.5], "c": []}  # the first two of a are out of the window
    counts = {"a": 6, "b": 2, "c": 0}
    means = [sum(values) / max(1, len(values)) for values in windows.values()]
    assert selector.means().tolist() == means == [1.0, 0.5, 0.0]
    scores = [m + math.sqrt(2 * math.log(8 + 1) / (n + 1)) for m, n in zip(means, counts.values(), strict=True)]
    assert selector.scores().tolist() == pytest.approx(scores)
    exponentials = [math.exp(score / 0.1) for score in scores]
    assert selector.weights().tolist() == pytest.approx([e / sum(exponentials) for e in exponentials])
    assert selector.sources == ["a", "b", "c"]
    metrics = selector.metrics()
    assert metrics["weight_c"] == max(selector.weights()) == metrics["heaviest"]  # nothing was seen of it
    assert metrics["ucb_a"] == pytest.approx(scores[0]) and metrics["abs_advantage_b"] == 0.5


def test_the_golden_numbers() -> None:
    scores = upper_bounds(torch.tensor([0.8, 0.2, 0.5]), torch.tensor([100, 10, 50]))
    assert scores.tolist() == pytest.approx([1.11721, 1.16119, 0.94640], abs=1e-5)
    assert source_weights(scores).tolist() == pytest.approx([0.36581, 0.56790, 0.06629], abs=1e-5)
    assert source_weights(torch.tensor([3.0])).tolist() == [1.0]
    assert upper_bounds(torch.tensor([0.5]), torch.tensor([0])).tolist() == [0.5]  # ln(1) = 0
    assert upper_bounds(torch.tensor([0.5, 0.1]), torch.tensor([9, 1]), bonus=0.0).tolist() == pytest.approx(
        [0.5, 0.1]
    )


def test_rows_that_nobody_could_score_are_not_in_the_window() -> None:
    selector = DUMP(["a", "b"])
    nan = math.nan
    seen(selector, [0, 1], [[1.0, 0.0], [0.5, 0.0]], rewards=[[1.0, nan], [nan, nan]])
    assert selector.means().tolist() == [1.0, 0.0] and selector._counts.tolist() == [1, 0]


def test_sources_are_drawn_as_often_as_they_weigh_and_their_rows_in_turn() -> None:
    sources = ["a"] * 60 + ["b"] * 30 + ["c"] * 30
    selector = DUMP(sources, explore=0.0, bonus=0.0, temperature=0.5)
    seen(selector, [0, 60, 90], [[0.9, 0.9], [0.5, 0.5], [0.1, 0.1]])
    weights, counts, order = selector.weights(), torch.zeros(3), []
    for _ in range(1500):
        rows = selector.select(2)
        order += [row for row in rows if row < 60]
        for row in rows:
            counts["abc".index(sources[row])] += 1
    assert (counts / counts.sum() - weights).abs().max() < 0.03
    for start in range(0, 300, 60):  # each row once before any of them twice
        assert sorted(order[start : start + 60]) == list(range(60))


def test_an_exhausted_source_leaves_its_places_to_the_others() -> None:
    selector = DUMP(["a", "a", "b", "b", "b", "b"], explore=0.0, bonus=0.0, temperature=0.01)
    seen(selector, [0, 2], [[9.0, 9.0], [0.0, 0.0]])
    assert sorted(selector.select(2)) == [0, 1]
    assert set(selector.select(3)) > {0, 1}
    assert 0 not in selector.select(3, exclude=frozenset({0}))
    assert float(selector.weights()[1]) == 0.0  # rounded away, and drawn all the same where nothing else is left
    assert selector.select(1, exclude=frozenset({0, 1, 2, 3, 4})) == [5]


def test_a_source_without_signal_is_visited_less_and_less() -> None:
    selector, shares = DUMP(["dead"] * 50 + ["alive"] * 50, explore=0.0), []
    for step in range(150):
        rows = selector.select(8)
        seen(selector, rows, [[0.0] * 8 if row < 50 else [0.5] * 8 for row in rows], step=step)
        shares.append(sum(row < 50 for row in rows) / 8)
    assert 0 < sum(shares[:20]) / 20 and sum(shares[-50:]) / 50 < 0.05


def test_bins_of_difficulty_are_sources() -> None:
    levels = [0.0, 0.9, 0.1, 0.5, 0.6, 1.0]
    selector = DUMP(levels, bins=3, bonus=0.0)
    assert selector.sources == [0, 1, 2]
    assert quantile_bins(torch.tensor(levels), 3).tolist() == [0, 2, 0, 1, 1, 2]
    assert quantile_bins(torch.tensor([0.5]), 4).tolist() == [0]
    assert quantile_bins(torch.arange(100.0), 4).bincount().tolist() == [25] * 4


def test_names_of_metrics_are_plain_and_few() -> None:
    selector = DUMP(["math 500/x", "math_500_x", 3])
    seen(selector, [0], [[1.0, 1.0]])
    names = [name for name in selector.metrics() if name.startswith("weight_")]
    assert names == ["weight_0_math_500_x", "weight_1_math_500_x", "weight_2_3"]
    many = DUMP(list(range(40)))
    seen(many, [0], [[1.0, 1.0]])
    assert set(many.metrics()) == {"heaviest", "lightest"}


def test_other_sources_are_another_run() -> None:
    state = DUMP(["a", "b", "b"]).state_dict()
    with pytest.raises(MismatchError, match=r"\['a', 'b'\], those of this dataset \['a', 'c'\]"):
        DUMP(["a", "c", "c"]).load_state_dict(state)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: DUMP(["a"], window=0), "window=0"),
        (lambda: DUMP(["a"], window=10**6), r"window=1000000 is outside \[1, 100000\]"),
        (lambda: DUMP(["a"], temperature=0.0), "temperature=0.0"),
        (lambda: DUMP(["a"], bonus=-1.0), "bonus=-1.0"),
        (lambda: DUMP(["a"], bins=True), "bins=True"),
        (lambda: DUMP(["a"], bins=2000), "bins=2000"),
        (lambda: DUMP(list(range(1025))).select(1), "1025 different values, at most 1024"),
        (lambda: DUMP([["a"], ["b"]]).select(1), "a list or a dict"),
        (lambda: DUMP(["a", "b"], bins=2).select(1), "source must hold one number per row"),
    ],
)
def test_what_is_wrong_is_named(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
