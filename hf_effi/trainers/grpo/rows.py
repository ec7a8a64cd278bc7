"""The rows of one generation: what stays on each rank, and what all ranks know of all rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ...functional.rollouts import DEMONSTRATION, binary_pass_rates, concat_rows, loss_mask, take_rows, trim_rows
from ...protocols import RolloutGroups, TokenStats
from .host import Host

#: The batch entries that can move between ranks. Image tensors are indexed by patch, not by row, and cannot.
ROW_KEYS = frozenset(
    "prompt_ids prompt_mask completion_ids completion_mask advantages num_items_in_batch old_per_token_logps "
    "ref_per_token_logps sampling_per_token_logps importance_sampling_ratio tool_mask".split()
) | {DEMONSTRATION}

#: The batch entry that a loss is multiplied by, a tensor without dimensions. TRL passes it through.
LOSS_SCALE = "effi_loss_scale"


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
        return replace(self, batch={key: _moved(value, device) for key, value in self.batch.items()})


def _moved(value: Any, device: Any) -> Any:
    if isinstance(value, list):
        return [_moved(part, device) for part in value]
    return value.to(device) if isinstance(value, Tensor) else value


def whole_rows(batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return tokens and mask of prompts and completions side by side, shape `(rows, columns)`."""
    ids, mask = (
        torch.cat([batch[f"{side}_{kind}"] for side in ("prompt", "completion")], dim=1) for kind in ("ids", "mask")
    )
    return ids, mask


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


_PER_ROW = ("rewards", "weighted_rewards", "advantages", "lengths", "loss_tokens")
#: what stands in the place of a completion that a smaller group does not have
_ABSENT = {"rewards": math.nan, "weighted_rewards": math.nan, "advantages": 0.0, "lengths": 0, "loss_tokens": 0}


@dataclass(frozen=True)
class Reading:
    """
    How the rows of a generation are shown to what chooses among them.

    Args:
        step, generation, progress, lookup: See [`~hf_effi.protocols.RolloutGroups`].
        reward_names (`tuple[str, ...]`): Of the reward functions.
        one_function (`bool`): Whether the reward that decides is that of one function, so that it can be right or
            wrong.
    """

    step: int
    generation: int
    progress: float
    reward_names: tuple[str, ...]
    one_function: bool
    lookup: Callable[[str, Sequence[int]], list[Any]] | None = None


@dataclass
class Generation:
    """
    All rounds of one generation. Global row `i` is row `i` of the gathered rounds, in round order.

    Args:
        mine (`list[Rows]`): The rows of this rank, by round.
        rounds (`list[GatheredRows]`): What all ranks know, by round.
        members (`list[list[int]]`): The global rows of each group.
        numbers (`list[int]`): The row of the dataset that each group has its prompt from; -1 where it is not known.
        stats (`list[TokenStats]`): Of the rows of each round, shape `(rows, tokens)`, where they are asked for.
        side (`list[dict]`): The side columns of each round, shape `(rows,)`.
    """

    mine: list[Rows] = field(default_factory=list)
    rounds: list[GatheredRows] = field(default_factory=list)
    members: list[list[int]] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    stats: list[TokenStats] = field(default_factory=list)
    side: list[dict[str, Tensor]] = field(default_factory=list)

    def open(self, numbers: Sequence[int]) -> list[int]:
        """Begin groups for these rows of the dataset, and return their indices."""
        first = len(self.members)
        self.members += [[] for _ in numbers]
        self.numbers += numbers
        return list(range(first, len(self.members)))

    def add(
        self, mine: Rows, everybodys: GatheredRows, groups: Sequence[int], side: Mapping[str, Tensor] | None = None
    ) -> None:
        """
        Add a round.

        Args:
            groups (`Sequence[int]`): The group of each row of all ranks.
        """
        first = self.rows_before(len(self.rounds))
        for i, group in enumerate(groups):
            self.members[group].append(first + i)
        self.mine.append(mine)
        self.rounds.append(everybodys)
        self.side.append(dict(side or {}))

    def rows_before(self, number: int) -> int:
        """Return how many rows all ranks have in the rounds before one."""
        return sum(len(part.rewards) for part in self.rounds[:number])

    def owner(self, row: int, world: int) -> tuple[int, int]:
        """Return `(rank, index in that rank's joined rounds)` of a global row."""
        local_offset = 0
        for size in map(len, self.mine):
            if row < size * world:
                return row // size, local_offset + row % size
            row -= size * world
            local_offset += size
        raise IndexError(f"row {row} is past the last round.")

    def places(self, groups: Sequence[int]) -> Tensor:
        """Return the global rows of these groups, shape `(groups, largest)`; -1 where a group has no more."""
        members = [self.members[group] for group in groups]
        width = max((len(rows) for rows in members), default=0)
        return torch.tensor([rows + [-1] * (width - len(rows)) for rows in members], dtype=torch.int64).view(-1, width)

    def view(self, groups: Sequence[int], reading: Reading) -> RolloutGroups:
        """Return what filters, pruners and selectors get of these groups."""
        places = self.places(groups)
        present, index = places >= 0, places.clamp(min=0)
        rows = join_rounds(self.rounds)

        def grouped(values: Tensor, absent: float) -> Tensor:
            found = values[index]
            return found if bool(present.all()) else found.masked_fill(~_like(present, found), absent)

        values: dict[str, Any] = {name: grouped(getattr(rows, name), _ABSENT[name]) for name in _PER_ROW}
        side = {
            name: grouped(torch.cat([part[name] for part in self.side]), math.nan)
            for name in dict.fromkeys(name for part in self.side for name in part)
            if all(name in part for part in self.side)
        }
        rates = binary_pass_rates(values["rewards"]) if reading.one_function else None
        return RolloutGroups(
            **values,
            step=reading.step,
            rewards_per_func=grouped(rows.rewards_per_func, math.nan),
            reward_names=reading.reward_names,
            pass_rates=rates,
            rows=tuple(self.numbers[group] for group in groups),
            present=present,
            side=side,
            generation=reading.generation,
            progress=reading.progress,
            token_stats=self._stats_of(index, present),
            lookup=reading.lookup,
        )

    def _stats_of(self, index: Tensor, present: Tensor) -> TokenStats | None:
        if not self.stats or len(self.stats) < len(self.rounds):
            return None
        width = max(part.mask.size(1) for part in self.stats)

        def joined(name: str) -> Tensor:
            parts = [getattr(part, name) for part in self.stats]
            found = torch.cat([functional.pad(part, (0, width - part.size(1))) for part in parts])[index]
            return found.masked_fill(~_like(present, found), 0)

        corrected = all(part.ratios is not None for part in self.stats)
        ratios = joined("ratios") if corrected else None
        return TokenStats(joined("logps"), joined("sum_sq_probs"), joined("mask"), ratios)


def _like(present: Tensor, values: Tensor) -> Tensor:
    return present if values.ndim == 2 else present.unsqueeze(-1)
