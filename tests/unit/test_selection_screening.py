"""SPEED's screening: which prompts qualify, which go on, and what fills up."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from hf_effi.functional.rollouts import count_successes, qualifies, screen, screening_shares
from hf_effi.protocols import RolloutGroups
from hf_effi.selection import Screening

NAN = math.nan


def groups_of(rewards: list[list[float]], rates: Any = None) -> RolloutGroups:
    table = torch.tensor(rewards)
    binary = bool(((table == 0) | (table == 1) | table.isnan()).all())
    rates = table.double().nanmean(1) if rates is None and binary else rates
    zeros = torch.zeros_like(table)
    return RolloutGroups(table, zeros, zeros.long(), 0, pass_rates=rates)


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (0.25, 0.75), (0.2, 0.8), (0.0, 0.5)])
def test_chosen_prompts_equal_brute_force(low: float, high: float) -> None:
    """All 3^4 outcomes of 4 prompts with 0, 2 or 4 of 4 right, and unscorable ones."""
    for outcome in itertools.product([(0, 4), (2, 4), (4, 4), (0, 0)], repeat=4):
        successes, counts = (torch.tensor(column) for column in zip(*outcome, strict=True))

        def badness(i: int, outcome: Any = outcome) -> tuple[float, int]:
            s, n = outcome[i]
            if n and low < s / n < high:
                return (-1.0, i)
            return (abs((s + 1) / (n + 2) - (low + high) / 2) if n else math.inf, i)

        for wanted in (1, 2, 4):
            expected = sorted(sorted(range(4), key=badness)[:wanted])
            assert screen(successes, counts, low, high, wanted) == expected


def test_the_ends_of_the_band_are_outside() -> None:
    successes, counts = torch.tensor([0, 1, 2, 3, 4]), torch.full((5,), 4)
    assert qualifies(successes, counts).tolist() == [False, True, True, True, False]
    assert qualifies(successes, counts, 0.25, 0.75).tolist() == [False, False, True, False, False]


def test_more_than_enough_keeps_the_first_and_none_keeps_the_order_of_generation() -> None:
    half = torch.full((6,), 2)
    assert screen(half, 2 * half, 0.0, 1.0, 4) == [0, 1, 2, 3]
    dead = torch.tensor([0, 4, 0, 4, 0, 4])
    assert screen(dead, torch.full((6,), 4), 0.0, 1.0, 3) == [0, 1, 2]


def test_prompts_seen_less_fill_up_first_and_unscorable_ones_last() -> None:
    # 0 of 1 says less than 0 of 4
    assert screen(torch.tensor([0, 0, 0]), torch.tensor([0, 4, 1]), 0.0, 1.0, 1) == [2]
    assert screen(torch.tensor([0, 0, 0]), torch.tensor([0, 4, 1]), 0.0, 1.0, 2) == [1, 2]
    assert screen(torch.tensor([0, 0]), torch.tensor([0, 0]), 0.0, 1.0, 2) == [0, 1]


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: screen(torch.tensor([1]), torch.tensor([2]), 0.0, 1.0, 2), "wanted=2 prompts of 1"),
        (lambda: screen(torch.tensor([1]), torch.tensor([2]), 0.0, 1.0, 0), "wanted=0"),
        (lambda: screen(torch.tensor([3]), torch.tensor([2]), 0.0, 1.0, 1), "between 0 and counts"),
        (lambda: screen(torch.tensor([1]), torch.tensor([2, 2]), 0.0, 1.0, 1), "one number per prompt"),
        (lambda: qualifies(torch.tensor([1]), torch.tensor([2]), 0.5, 0.5), "low=0.5 must be below high=0.5"),
        (lambda: screening_shares(4, 8, 8, 2.0), r"in \[1, 7\]"),
        (lambda: Screening(0), "initial=0"),
        (lambda: Screening(True), "initial=True"),
        (lambda: Screening(4, low=NAN), "low=nan"),
        (lambda: Screening(4, 0.8, 0.2), "low=0.8"),
        (lambda: Screening(4, candidates=0.5), r"candidates=0.5 is outside \[1, 64\]"),
        (lambda: Screening(4, success_at=NAN), "success_at=nan"),
        (lambda: Screening(4).continuation(4), "initial=4"),
    ],
)
def test_what_is_wrong_is_named(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def test_rollouts_of_both_stages() -> None:
    assert Screening(4).prompts(8) == 16 and Screening(4).continuation(16) == 12
    assert Screening(4, candidates=1.1).prompts(10) == 11  # 1.1 * 10 is 11.000000000000002
    assert Screening(4, candidates=1.0).prompts(3) == 3
    assert screening_shares(8, 16, 4, 2.0) == (16, 12, 16 * 4 + 8 * 12)


def test_groups_are_counted_without_unscorable_rows() -> None:
    groups = groups_of([[0.0, 0.0], [1.0, NAN], [1.0, 0.0], [NAN, NAN]])
    assert Screening(2).qualified(groups) == 1
    assert Screening(2).choose(groups, 1) == [2]
    assert Screening(2).choose(groups, 2) == [1, 2]  # 1 of 1 says less than 0 of 2


def test_other_rewards_need_a_threshold() -> None:
    groups = groups_of([[0.1, 1.1], [-1.0, 0.1], [1.1, 1.1]])
    with pytest.raises(ValueError, match=r"difficulty_reward=.*success_at="):
        Screening(2).choose(groups, 1)
    assert Screening(2, success_at=1.0).choose(groups, 1) == [0]
    with pytest.raises(ValueError, match="0.10000000149011612"):
        count_successes(groups.rewards)
    summed = groups_of([[1.0, 0.0]], rates=torch.full((1,), NAN, dtype=torch.float64))
    with pytest.raises(ValueError, match="no pass rates"):  # 0 or 1 by chance: a weighted sum of several functions
        Screening(2).choose(summed, 1)
