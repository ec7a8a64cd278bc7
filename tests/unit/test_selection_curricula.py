"""AdaRFT and the curriculum over stored pass rates, beside their closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hf_effi.functional.data import competence
from hf_effi.functional.rollouts import moved_target
from hf_effi.selection import AdaRFT, OfflineCurriculum
from tests.helpers.prompt_selectors import Simulated, groups_of


def test_the_target_moves_by_the_formula() -> None:
    selector = AdaRFT([10.0, 20.0, 50.0], start_fraction=0.25, step_fraction=0.2, sensitivity=3.0, target_reward=0.4)
    target = 20.0
    assert selector.target == target
    for step, rate in enumerate([1.0, 0.5, 0.0, 0.375]):
        selector.observe([0], groups_of([rate], step=step))
        target = min(50.0, max(10.0, target + 0.2 * 40 * math.tanh(3 * (rate - 0.4))))
        assert selector.target == pytest.approx(target)
        assert selector.metrics()["target_difficulty"] == selector.target
    assert moved_target(1.0, 0.0, 0.0, 9.0, rate=1.0, sensitivity=9.0, wanted=0.5) == 0.0


def test_rounds_of_a_step_move_it_once() -> None:
    selector = AdaRFT([0.0, 1.0], start_fraction=0.5)
    selector.observe([0], groups_of([1.0], step=0))
    selector.observe([1, 0], groups_of([0.0, 0.5], step=0))
    assert selector.target == 0.5  # half of the step is right
    selector.observe([1], groups_of([[math.nan] * 8], step=1))
    assert selector.target == 0.5


def test_the_nearest_difficulties_are_chosen() -> None:
    generator = torch.Generator().manual_seed(0)
    levels = torch.rand(60, generator=generator, dtype=torch.float64)
    selector = AdaRFT(levels, explore=0.0, start_fraction=0.3)
    order = sorted(range(60), key=lambda row: abs(float(levels[row]) - selector.target))
    assert selector.select(7) == order[:7]
    assert selector.select(7, exclude=frozenset(order[:7])) == order[7:14]


def test_rows_of_one_level_take_turns() -> None:
    selector, counts = AdaRFT([1.0] * 9 + [2.0] * 9, explore=0.0), torch.zeros(18)
    for step in range(6):
        rows = selector.select(3)
        counts[rows] += 1
        selector.observe(rows, groups_of([0.0] * 3, step=step))  # too hard: it stays at the easiest
    assert counts.tolist() == [2.0] * 9 + [0.0] * 9


def test_it_settles_where_half_is_right() -> None:
    """Prompts of difficulty d are answered with probability 1 - d; the policy does not change."""
    levels = torch.linspace(0, 1, 400)
    world, selector, targets = Simulated(1 - levels), AdaRFT(levels, explore=0.0), []
    for step in range(200):
        rows = selector.select(16)
        selector.observe(rows, world.answer(rows, step))
        targets.append(selector.target)
    assert abs(sum(targets[-100:]) / 100 - 0.5) < 0.05


def test_the_curriculum_draws_from_the_easiest_part() -> None:
    rates = torch.rand(200, generator=torch.Generator().manual_seed(1))
    selector = OfflineCurriculum(rates, start=0.1, root=2.0, full_at=0.8, explore=0.0)
    easiest = torch.sort(rates, descending=True).indices
    for progress in (0.0, 0.1, 0.4, 0.8, 1.0):
        selector.observe([0], groups_of([0.5], progress=progress))
        pool = math.ceil(competence(progress, 0.1, 2.0, 0.8) * 200 - 1e-9)
        assert selector.pool == pool == selector.metrics()["pool"]
        allowed = set(easiest[:pool].tolist())
        drawn = {row for _ in range(300) for row in selector.select(20)}
        assert drawn == allowed
    assert selector.pool == 200


def test_before_the_first_generation_it_is_at_the_start() -> None:
    selector = OfflineCurriculum([0.1 * i for i in range(10)], start=0.3, explore=0.0)
    assert selector.pool == 3 and sorted(selector.select(3)) == [7, 8, 9]
    hard = OfflineCurriculum([0.1 * i for i in range(10)], start=0.3, explore=0.0, descending=False)
    assert sorted(hard.select(3)) == [0, 1, 2]


def test_a_part_that_is_too_small_is_followed_by_the_next_easiest() -> None:
    selector = OfflineCurriculum([0.1 * i for i in range(10)], start=0.1, explore=0.0)
    assert selector.select(3) == [9, 8, 7]
    assert selector.select(2, exclude=frozenset({9, 7})) == [8, 6]


def test_rows_of_equal_rate_are_in_a_random_order() -> None:
    parts = {tuple(sorted(OfflineCurriculum([0.5] * 12, start=0.25, explore=0.0, seed=seed).select(3)))
             for seed in range(8)}  # fmt: skip
    assert len(parts) > 4


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: AdaRFT([1.0], target_reward=1.0), r"target_reward=1.0 is outside \(0, 1\)"),
        (lambda: AdaRFT([1.0], step_fraction=0.0), "step_fraction=0.0"),
        (lambda: AdaRFT([1.0], sensitivity=-1), "sensitivity=-1"),
        (lambda: AdaRFT([1.0], start_fraction=2.0), "start_fraction=2.0"),
        (lambda: AdaRFT([1.0], success_at=True), "success_at=True"),
        (lambda: OfflineCurriculum([1.0], start=0.0), "start=0.0"),
        (lambda: OfflineCurriculum([1.0], root=0.5), "root=0.5"),
        (lambda: OfflineCurriculum([1.0], root=math.inf), "root=inf"),
        (lambda: OfflineCurriculum([1.0], full_at=1.5), "full_at=1.5"),
    ],
)
def test_what_is_wrong_is_named(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
    with pytest.raises(TypeError, match="descending must be True or False, got 'yes'"):
        OfflineCurriculum([1.0], descending="yes")


def test_one_difficulty_for_all_is_no_difficulty() -> None:
    selector = AdaRFT([3.0] * 5, explore=0.0)
    selector.observe([0], groups_of([1.0]))
    assert selector.target == 3.0 and selector.select(2) == [1, 2]
