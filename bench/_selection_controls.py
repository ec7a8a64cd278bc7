"""The random controls of `bench.grpo_selection`: a method at its own rate, with the choice left to chance."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_effi.functional.rollouts import GroupDecision
from hf_effi.selection import Screening


def chance(*key: int) -> float:
    """Return a number in [0, 1) that is a function of the key alone."""
    return random.Random("/".join(map(str, key))).random()


@dataclass(frozen=True)
class RandomGroups:
    """
    A group filter that keeps each group with probability `rate`, whatever came out of it.

    Args:
        rate (`float`): Share of the groups kept by the filter that this one is compared with, in (0, 1].
        seed (`int`): Of the draws, with the count of generations and the row of the prompt.
    """

    rate: float
    seed: int = 0

    def _drawn(self, groups: Any) -> list[float]:
        return [chance(self.seed, groups.generation, place, row) for place, row in enumerate(groups.rows)]

    def decide(self, groups: Any) -> GroupDecision:
        kept = [number < self.rate for number in self._drawn(groups)]
        if not any(kept):  # a step without any group would not be a step
            kept[min(range(len(kept)), key=self._drawn(groups).__getitem__)] = True
        return GroupDecision(torch.tensor(kept), tuple("kept" if one else "random" for one in kept))

    def fill_order(self, groups: Any) -> list[int]:
        drawn = self._drawn(groups)
        return sorted(range(len(drawn)), key=lambda place: (drawn[place], place))


class RandomScreening(Screening):
    """Screens as [`Screening`] does, and lets prompts drawn at random go on."""

    def choose(self, groups: Any, wanted: int) -> list[int]:
        rows, generation = groups.rows, groups.generation
        order = sorted(range(len(rows)), key=lambda place: (chance(generation, place, rows[place]), place))
        return sorted(order[:wanted])


class ShuffledAllocation:
    """
    Gives the numbers of completions that another allocator chose to other prompts of the generation.

    Args:
        inner: The allocator.
    """

    def __init__(self, inner: Any, seed: int = 0) -> None:
        self.inner, self.seed, self.calls = inner, seed, 0

    def attach(self, context: Any) -> None:
        if hasattr(self.inner, "attach"):
            self.inner.attach(context)

    def allocate(self, rows: Sequence[int], budget: int) -> list[int]:
        sizes = self.inner.allocate(rows, budget)
        random.Random(f"{self.seed}/{self.calls}").shuffle(sizes)
        self.calls += 1
        return sizes

    def observe(self, rows: list[int], groups: Any) -> None:
        self.inner.observe(rows, groups)

    def state_dict(self) -> dict[str, Any]:
        return {"inner": self.inner.state_dict(), "calls": self.calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state["inner"])
        self.calls = state["calls"]
