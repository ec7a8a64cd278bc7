"""The rows of one generation: what stays on each rank, and what all ranks know of all rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from ...functional.rollouts import binary_pass_rates, concat_rows, loss_mask, take_rows, trim_rows
from ...protocols import RolloutGroups
from .host import Host

#: The batch entries that can move between ranks. Image tensors are indexed by patch, not by row, and cannot.
ROW_KEYS = frozenset(
    "prompt_ids prompt_mask completion_ids completion_mask advantages num_items_in_batch old_per_token_logps "
    "ref_per_token_logps sampling_per_token_logps importance_sampling_ratio tool_mask".split()
)


@dataclass(frozen=True)
class Ratios:
    """
    The importance ratios of vLLM: what they do to the loss, and how they are laid out.

    Args:
        multiply (`bool`): Whether a ratio of exactly 0 takes a token out of the policy term; VESPO takes its logarithm
            instead.
        padding (`float`, *optional*): What a ratio per token is padded with, as in TRL; `None` where the mode has one
            ratio per sequence.
    """

    multiply: bool
    padding: float | None

    @classmethod
    def of(cls, host: Host) -> Ratios:
        """Return what the attributes of a trainer say now."""
        mode = host.vllm_importance_sampling_mode
        low, high = host.vllm_importance_sampling_clip_min, host.vllm_importance_sampling_clip_max
        low, high = -math.inf if low is None else low, math.inf if high is None else high
        clipped = min(max(1.0, low), high)
        padding = clipped if mode.endswith("truncate") else float(clipped == 1.0)
        return cls(host.loss_type != "vespo", None if mode.startswith("sequence") else padding)


@dataclass(frozen=True)
class Rows:
    """
    The rows of one rank, between TRL's generation and TRL's loss.

    Args:
        batch (`dict`): As TRL splits and buffers it: tensors whose first dimension is the rows, and counts.
        put_off (`tuple[str, ...]`, *optional*): Entries that hold no log-probs yet.
    """

    batch: dict[str, Any]
    put_off: tuple[str, ...] = ()

    @classmethod
    def joined(cls, parts: Sequence[Rows], pad_token_id: int, ratio_padding: float | None) -> Rows:
        """Join parts of a generation, which all put the same entries off."""
        return cls(concat_rows([part.batch for part in parts], pad_token_id, ratio_padding), parts[0].put_off)

    def __len__(self) -> int:
        return len(self.batch["advantages"])

    @property
    def loss_tokens(self) -> Tensor:
        """Tokens in the loss, shape `(rows,)`."""
        return loss_mask(self.batch).sum(1)

    def take(self, indices: Sequence[int]) -> Rows:
        """Return these rows, in this order; one may be there twice."""
        return replace(self, batch=take_rows(self.batch, indices))

    def trimmed(self) -> Rows:
        """Return the rows without columns that are padding in all of them."""
        return replace(self, batch=trim_rows(self.batch))

    def to(self, device: Any) -> Rows:
        """Return the rows with their tensors on a device."""
        moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in self.batch.items()}
        return replace(self, batch=moved)


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
    """
    All rounds of one generation. Global row `i` is row `i` of the gathered rounds, in round order.

    Args:
        mine (`list[Rows]`): The rows of this rank, by round.
        rounds (`list[GatheredRows]`): What all ranks know, by round.
    """

    mine: list[Rows] = field(default_factory=list)
    rounds: list[GatheredRows] = field(default_factory=list)

    def add(self, mine: Rows, everybodys: GatheredRows) -> None:
        self.mine.append(mine)
        self.rounds.append(everybodys)

    def owner(self, row: int, world: int) -> tuple[int, int]:
        """Return `(rank, index in that rank's joined rounds)` of a global row."""
        local_offset = 0
        for size in map(len, self.mine):
            if row < size * world:
                return row // size, local_offset + row % size
            row -= size * world
            local_offset += size
        raise IndexError(f"row {row} is past the last round.")
