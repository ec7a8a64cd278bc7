"""Groups made by hand for prompt selectors, and a trainer's context without a trainer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from hf_effi.protocols import RolloutGroups


def groups_of(rewards: Any, *, step: int = 0, advantages: Any = None, progress: float = 0.0) -> RolloutGroups:
    """
    Return the view of a generation.

    Args:
        rewards: Shape `(num_groups, group_size)`; a number `p` in place of a row is `p * 8` right of 8.
        advantages (*optional*): Same shape; 0 by default.
    """
    rows = [
        [1.0] * round(8 * row) + [0.0] * (8 - round(8 * row)) if isinstance(row, float) else row for row in rewards
    ]
    table = torch.tensor(rows)
    binary = bool(((table == 0) | (table == 1) | table.isnan()).all())
    rates = table.double().nanmean(1) if binary else torch.full((len(table),), torch.nan, dtype=torch.float64)
    given = torch.zeros_like(table) if advantages is None else torch.tensor(advantages)
    lengths = torch.ones_like(table, dtype=torch.long)
    return RolloutGroups(table, given, lengths, step, pass_rates=rates, progress=progress)


def context_of(size: int, **columns: Any) -> Any:
    """Return what a trainer would hand to `attach`."""

    def column(name: str) -> list[Any]:
        if name not in columns:
            raise ValueError(f"the training dataset has no column {name!r}. It has: {', '.join(columns)}.")
        return list(columns[name])

    return SimpleNamespace(size=size, group_size=8, seed=0, column=column)


class Simulated:
    """Prompts with fixed pass rates, answered by a coin."""

    def __init__(self, rates: Any, seed: int = 0, group_size: int = 8) -> None:
        self.rates, self.group_size = torch.as_tensor(rates, dtype=torch.float64), group_size
        self.generator = torch.Generator().manual_seed(seed)

    def answer(self, rows: list[int], step: int, progress: float = 0.0) -> RolloutGroups:
        drawn = torch.rand(len(rows), self.group_size, generator=self.generator, dtype=torch.float64)
        rewards = (drawn < self.rates[rows].unsqueeze(1)).float()
        return groups_of(rewards.tolist(), step=step, advantages=(rewards - rewards.mean(1, True)).tolist(),
                         progress=progress)  # fmt: skip
