"""A wrong argument of what chooses rollouts is named where it is given, whatever its type is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_effi.functional.data import check_number
from hf_effi.protocols import RolloutGroups
from hf_effi.selection import (
    VIP,
    AdaRFT,
    AdvantagePruner,
    BetaRates,
    FilterChain,
    Knapsack,
    LengthBand,
    MilestoneReward,
    PassRateBand,
    ProcessRewards,
    ShuffledPrompts,
    SourceBands,
)

MAKERS: dict[str, Any] = {
    "BetaRates prior": lambda value: BetaRates(prior=value),
    "FilterChain filters": lambda value: FilterChain(filters=value),
    "LengthBand bands": lambda value: LengthBand(bands=value),
    "MilestoneReward patterns": lambda value: MilestoneReward(patterns=value, final=print),
    "PassRateBand low": lambda value: PassRateBand(low=value, high=1.0),
    "PassRateBand high": lambda value: PassRateBand(low=0.0, high=value),
    "ProcessRewards columns": lambda value: ProcessRewards(columns=value),
    "ShuffledPrompts size": lambda value: ShuffledPrompts(size=value),
    "AdvantagePruner prune_rate": lambda value: AdvantagePruner(prune_rate=value),
    "AdaRFT difficulty": lambda value: AdaRFT(difficulty=value),
}
BAD = [True, float("nan"), -1, 10**400, {}, object(), b"ab", torch.tensor(1.0), 1j, int]


@pytest.mark.parametrize("value", BAD, ids=lambda value: repr(value)[:12])
@pytest.mark.parametrize("name", MAKERS)
def test_a_wrong_type_is_named(name: str, value: Any) -> None:
    if name == "ShuffledPrompts size" and isinstance(value, int) and value > 1:
        return  # a count, though a large one
    with pytest.raises(ValueError, match="range" if name.startswith("PassRateBand") else name.split()[1]):
        MAKERS[name](value)


@pytest.mark.parametrize("value", [True, 1.5, -1, "0", None])
def test_a_seed_is_a_count(value: Any) -> None:
    with pytest.raises(ValueError, match="seed"):
        ShuffledPrompts(4, seed=value)
    with pytest.raises(ValueError, match="seed"):
        AdvantagePruner(0.5, metric="random", seed=value)


@pytest.mark.parametrize("value", ["", 3, ["right"]])
def test_a_reward_is_a_name(value: Any) -> None:
    with pytest.raises(ValueError, match="reward must be the name"):
        PassRateBand(reward=value)


def test_a_number_that_no_float_holds_is_outside() -> None:
    with pytest.raises(ValueError, match="success_at=1000"):
        check_number("success_at", 10**400, 0)


def test_sources_that_are_numbers_are_listed() -> None:
    rewards = torch.tensor([[1.0, 0.0]])
    groups = RolloutGroups(
        rewards, rewards - 0.5, torch.ones(1, 2), step=0, rows=(0,), lookup=lambda column, rows: [7]
    )
    with pytest.raises(ValueError, match="source 7, and bands= names 1, 2"):
        SourceBands("level", {1: (0, 1), 2: (0, 1)}).decide(groups)


@pytest.mark.parametrize("allocator", [VIP(low=5), Knapsack(high=3)])
def test_bounds_that_no_group_can_have_are_refused_before_training(allocator: Any) -> None:
    with pytest.raises(ValueError, match="num_generations=4"):
        allocator.attach(SimpleNamespace(size=8, group_size=4))
