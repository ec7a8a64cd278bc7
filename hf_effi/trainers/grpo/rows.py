"""The rows of one generation: what stays on each rank, and what all ranks know of all rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from ...functional.rollouts import binary_pass_rates
from ...protocols import RolloutGroups

#: The batch entries that can move between ranks. Image tensors are indexed by patch, not by row, and cannot.
ROW_KEYS = frozenset(
    "prompt_ids prompt_mask completion_ids completion_mask advantages num_items_in_batch old_per_token_logps "
    "ref_per_token_logps sampling_per_token_logps importance_sampling_ratio tool_mask".split()
)


@dataclass(frozen=True)
class GatheredRows:
    """
    What every choice is made from: the rows of one round on all ranks, on the CPU.

    Args:
        rewards, weighted_rewards, advantages, lengths, loss_tokens (`torch.Tensor`): Shape `(rows,)`, see
            [`~hf_effi.protocols.RolloutGroups`].
        rewards_per_func (`torch.Tensor`): Shape `(rows, num_functions)`.
    """

    rewards: Tensor
    weighted_rewards: Tensor
    rewards_per_func: Tensor
    advantages: Tensor
    lengths: Tensor
    loss_tokens: Tensor


def join_rounds(rounds: Sequence[GatheredRows]) -> GatheredRows:
    """Join the rounds of a generation, in order."""
    return GatheredRows(
        **{f.name: torch.cat([getattr(part, f.name) for part in rounds]) for f in fields(GatheredRows)}
    )


def as_groups(
    rows: GatheredRows, group_size: int, step: int, reward_names: Sequence[str], one_function: bool
) -> RolloutGroups:
    """
    Return the view of `rows` that filters and selectors get.

    Args:
        one_function (`bool`): Whether `rows.rewards` are those of one function, so that they can be right or wrong.
    """
    grouped = {name: getattr(rows, name).view(-1, group_size) for name in _PER_ROW}
    per_func = rows.rewards_per_func.view(-1, group_size, rows.rewards_per_func.size(1))
    rates = binary_pass_rates(grouped["rewards"]) if one_function else None
    return RolloutGroups(
        **grouped, step=step, rewards_per_func=per_func, reward_names=tuple(reward_names), pass_rates=rates
    )


_PER_ROW = ("rewards", "weighted_rewards", "advantages", "lengths", "loss_tokens")


@dataclass
class Generation:
    """All rounds of one generation. Global row `i` is row `i` of the gathered rounds, in round order."""

    batches: list[dict[str, Any]] = field(default_factory=list)
    rows_per_rank: list[int] = field(default_factory=list)
    rounds: list[GatheredRows] = field(default_factory=list)

    def add(self, batch: dict[str, Any], rows: GatheredRows) -> None:
        self.batches.append(batch)
        self.rows_per_rank.append(batch["advantages"].size(0))
        self.rounds.append(rows)

    def owner(self, row: int, world: int) -> tuple[int, int]:
        """Return `(rank, index in that rank's joined rounds)` of a global row."""
        local_offset = 0
        for size in self.rows_per_rank:
            if row < size * world:
                return row // size, local_offset + row % size
            row -= size * world
            local_offset += size
        raise IndexError(f"row {row} is past the last round.")
