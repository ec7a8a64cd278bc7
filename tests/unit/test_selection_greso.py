"""GRESO: streaks, the probability to skip, and the controller of the dead share."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hf_effi.functional.rollouts import adjusted_base, streaks_after, visit_probability
from hf_effi.selection import GRESO
from tests.helpers.prompt_selectors import Simulated, groups_of

NAN = math.nan


def test_streaks_of_a_scripted_prompt() -> None:
    rates = [1.0, 1.0, 0.5, 0.0, 0.0, NAN, 0.0, 1.0, 1.0]
    streak, seen = torch.zeros(1, dtype=torch.int32), []
    for rate in rates:
        streak = streaks_after(streak, torch.tensor([rate]))
        seen.append(int(streak))
    assert seen == [1, 2, 0, -1, -2, -2, -3, 1, 2]
    assert streak.dtype == torch.int32


def test_streaks_with_the_thresholds_of_the_released_code() -> None:
    rates = torch.tensor([0.98, 0.97, 0.11, 0.12])
    assert streaks_after(torch.zeros(4, dtype=torch.int32), rates, 0.11, 0.98).tolist() == [1, 0, -1, 0]


def test_probability_is_the_formula() -> None:
    streaks = torch.arange(-8, 9)
    for p_easy, p_hard in ((0.5, 0.5), (0.95, 0.05), (0.3, 0.7)):
        expected = [1.0 if z == 0 else max((p_easy if z > 0 else p_hard) ** abs(z), 0.01) for z in streaks.tolist()]
        assert visit_probability(streaks, p_easy, p_hard).tolist() == pytest.approx(expected, rel=1e-12)


def test_the_base_moves_by_one_step_and_stays_inside() -> None:
    assert adjusted_base(0.5, 0.25, 0.25) == pytest.approx(0.49)  # "at least the target" goes down
    assert adjusted_base(0.5, 0.2499, 0.25) == pytest.approx(0.51)
    assert adjusted_base(0.05, 1.0, 0.25) == 0.05 and adjusted_base(0.95, 0.0, 0.25) == 0.95


def test_without_history_it_is_a_shuffled_stream() -> None:
    selector, world = GRESO(20, explore=0.0), Simulated([0.0] * 20)
    seen = []
    for step in range(5):
        rows = selector.select(4)
        selector.observe(rows, world.answer(rows, step))
        seen += rows
    assert sorted(seen) == list(range(20))  # nothing is skipped within the first pass, all dead or not
    assert selector.passes == 1.0


def test_rows_are_skipped_as_often_as_the_formula_says() -> None:
    """Walk many times over prompts with given streaks; nothing is learned in between."""
    size = 400
    streaks = torch.tensor([0, 1, 2, 3, -1, -2, -4, 9] * (size // 8), dtype=torch.int32)
    selector = GRESO(size, explore=0.0, p_easy=0.8, p_hard=0.6, least=0.05)
    selector.select(1)
    selector.streaks.copy_(streaks)
    selector._stream.cursor = 0
    visits = torch.zeros(size)
    passes = 300
    while selector.passes < passes:
        visits.index_add_(0, torch.tensor(selector.select(10)), torch.ones(10))
    expected = visit_probability(streaks, 0.8, 0.6, 0.05)
    for streak in streaks.unique():
        same = streaks == streak
        share, wanted = float(visits[same].mean()) / passes, float(expected[same][0])
        assert abs(share - wanted) < 4 * math.sqrt(max(wanted * (1 - wanted), 1e-4) / (50 * passes)) + 2e-3


def test_skip_rates_are_those_of_the_walk() -> None:
    selector = GRESO(1000, explore=0.0, p_easy=0.5, p_hard=0.9)
    selector.select(1)
    selector.streaks.copy_(torch.tensor([1, -1] * 500, dtype=torch.int32))
    rows = selector.select(400)
    selector.observe(rows, groups_of([1.0] * 400))
    metrics = selector.metrics()
    assert abs(metrics["skip_rate_easy"] - 0.5) < 0.08 and abs(metrics["skip_rate_hard"] - 0.1) < 0.05
    assert metrics["dead_easy"] == 1.0 and metrics["dead_hard"] == 0.0


def test_the_controller_moves_once_a_step_from_the_second_pass_on() -> None:
    selector = GRESO(8, explore=0.0)
    for step, dead in enumerate([1.0, 1.0]):
        selector.observe(selector.select(4), groups_of([dead] * 4, step=step))
        # the first pass ends with the second step
        assert selector.bases == ([0.5, 0.5] if step == 0 else [0.49, 0.51])
    rows = selector.select(4)
    selector.observe(rows, groups_of([0.0] * 4, step=2))  # all wrong: p_hard goes down
    assert selector.bases == pytest.approx([0.5, 0.5])
    selector.observe(rows * 2, groups_of([0.5] * 8, step=2))  # a second round: 4 dead of 12 are still too many
    assert selector.bases == pytest.approx([0.5, 0.5])
    selector.observe(rows * 6, groups_of([0.5] * 24, step=2))  # a third: 4 of 36 are below 2/3 * 0.25
    assert selector.bases == pytest.approx([0.5, 0.52])


def test_repeated_rows_of_a_round_count_one_after_the_other() -> None:
    selector = GRESO(4)
    selector.observe([2, 2, 2, 1], groups_of([1.0, 1.0, 0.5, 0.0]))
    assert selector.streaks.tolist() == [0, -1, 0, 0]
    selector.observe([2, 2], groups_of([0.0, 0.0]))
    assert selector.streaks.tolist() == [0, -1, -2, 0]


def test_the_share_of_dead_prompts_approaches_the_target() -> None:
    """Half of the prompts are dead for ever. Uniform prompts would give 0.5; the controller aims at 0.25."""
    size = 600
    rates = torch.full((size,), 0.5)
    rates[:100], rates[100:300] = 1.0, 0.0
    world = Simulated(rates[torch.randperm(size, generator=torch.Generator().manual_seed(1))], group_size=16)
    selector, easy, hard = GRESO(size, explore=0.0, seed=5), [], []
    for step in range(500):
        rows = selector.select(32)
        selector.observe(rows, world.answer(rows, step))
        easy.append(float((world.rates[rows] == 1).double().mean()))
        hard.append(float((world.rates[rows] == 0).double().mean()))
    first, last = slice(0, 15), slice(350, 500)
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    assert abs(mean(easy[first]) - 1 / 6) < 0.05 and abs(mean(hard[first]) - 1 / 3) < 0.05
    assert mean(easy[last]) < 0.25 / 3 + 0.02 and mean(hard[last]) < 2 * 0.25 / 3 + 0.03
    assert mean(easy[last]) + mean(hard[last]) < 0.6 * (mean(easy[first]) + mean(hard[first]))


def test_where_nearly_all_is_skipped_the_shortest_streaks_fill_up() -> None:
    selector = GRESO(6, explore=0.0, p_easy=0.05, p_low=0.05, least=1e-9)
    selector.select(1)
    selector.streaks.copy_(torch.tensor([40, 30, 20, 10, 9, 8], dtype=torch.int32))
    assert sorted(selector.select(2)) == [4, 5]


@pytest.mark.parametrize(
    "over, words",
    [
        ({"target_dead": 0.0}, r"target_dead=0.0 is outside \(0, 1\)"),
        ({"p_easy": 0.99}, r"p_easy=0.99 is outside \[0.05, 0.95\]"),
        ({"p_hard": True}, "p_hard=True"),
        ({"p_low": 0.0}, "p_low=0.0"),
        ({"p_high": 2}, "p_high=2"),
        ({"change": -0.1}, "change=-0.1"),
        ({"least": 0}, "least=0"),
        ({"easy_at": NAN}, "easy_at=nan"),
        ({"hard_at": 1.0}, r"hard_at=1.0 is outside \[0, 1.0\)"),
        ({"success_at": "x"}, "success_at='x'"),
    ],
)
def test_what_is_wrong_is_named(over: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        GRESO(4, **over)
