"""What an object must offer to be plugged into a trainer. Structural types: nothing needs to inherit from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from .functional.rollouts import GroupDecision


@dataclass(frozen=True)
class RolloutGroups:
    """
    Read-only view of the groups of one generation, equal on every rank.

    Args:
        rewards (`torch.Tensor`): The reward the filter looks at, shape `(num_groups, group_size)`; NaN = unscorable.
        advantages (`torch.Tensor`): TRL's advantages from the full groups, shape `(num_groups, group_size)`.
        lengths (`torch.Tensor`): Completion tokens, shape `(num_groups, group_size)`.
        step (`int`): Optimizer steps done.
    """

    rewards: Tensor
    advantages: Tensor
    lengths: Tensor
    step: int


@runtime_checkable
class PromptSelector(Protocol):
    """Chooses dataset rows. Must be a pure function of its state, which all ranks replicate."""

    def select(self, count: int) -> list[int]:
        """Return `count` row numbers of the training dataset."""
        ...

    def observe(self, rows: list[int], pass_rates: list[float]) -> None:
        """Take the unfiltered pass rates of the rows that were generated."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@runtime_checkable
class GroupFilter(Protocol):
    """Decides which groups are trained on, from gathered rewards."""

    def decide(self, groups: RolloutGroups) -> GroupDecision:
        """Return the mask and a reason a group."""
        ...

    def fill_order(self, groups: RolloutGroups) -> list[int]:
        """Return all group indices, the least bad first, for when the batch cannot be filled."""
        ...


@runtime_checkable
class RolloutPruner(Protocol):
    """Decides which rows of the surviving groups are trained on."""

    def keep(self, advantages: Tensor, group_size: int, num_pools: int, step: int) -> Tensor:
        """
        Return a boolean mask over the rows.

        Args:
            advantages (`torch.Tensor`): Shape `(rows,)`, group after group.
            group_size (`int`): Rows of one group.
            num_pools (`int`): Ranks; the rows of a rank are a contiguous slice.
            step (`int`): Count of generations so far, for seeded choices.
        """
        ...
