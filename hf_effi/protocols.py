"""What an object must offer to be plugged into a trainer. Structural types: nothing needs to inherit from them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from .functional.rollouts import GroupDecision

__all__ = ["GroupFilter", "PromptSelector", "RolloutGroups", "RolloutPruner"]


@dataclass(frozen=True)
class RolloutGroups:
    """
    Read-only view of the groups of one generation, equal on every rank.

    Args:
        rewards (`torch.Tensor`): The reward that decides, shape `(num_groups, group_size)`: what the function named by
            `difficulty_reward` returned (the only function's by default; the weighted reward where there are several
            and none is named). Not multiplied by `reward_weights`; NaN = unscorable.
        advantages (`torch.Tensor`): TRL's advantages from the full groups, shape `(num_groups, group_size)`; 0 where
            no token of the row is in the loss, because nothing can be learned from it.
        lengths (`torch.Tensor`): Completion tokens, shape `(num_groups, group_size)`, whether in the loss or not.
        step (`int`): Optimizer steps done.
        loss_tokens (`torch.Tensor`, *optional*): Completion tokens that are in the loss, shape
            `(num_groups, group_size)`: 0 for a truncated completion under `mask_truncated_completions`. Defaults to
            `lengths`.
        weighted_rewards (`torch.Tensor`, *optional*): TRL's `reward`, the sum over the functions times
            `reward_weights`, shape `(num_groups, group_size)`; NaN = unscorable. Defaults to `rewards`.
        rewards_per_func (`torch.Tensor`, *optional*): What each function returned, shape
            `(num_groups, group_size, num_functions)`; NaN = not applicable. Defaults to `rewards` alone.
        reward_names (`tuple[str, ...]`, *optional*): Names of the functions.
        pass_rates (`torch.Tensor`, *optional*): Share of right completions, float64, shape `(num_groups,)`, where
            `rewards` are those of one function and all of them 0 or 1; NaN elsewhere, and by default.
    """

    rewards: Tensor
    advantages: Tensor
    lengths: Tensor
    step: int
    loss_tokens: Tensor | None = None
    weighted_rewards: Tensor | None = None
    rewards_per_func: Tensor | None = None
    reward_names: tuple[str, ...] = ()
    pass_rates: Tensor | None = None

    def __post_init__(self) -> None:
        defaults = {
            "loss_tokens": self.lengths,
            "weighted_rewards": self.rewards,
            "rewards_per_func": self.rewards.unsqueeze(-1),
            "pass_rates": torch.full((len(self.rewards),), math.nan, dtype=torch.float64),
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    @property
    def live(self) -> Tensor:
        """Rows with a token in the loss, boolean, shape `(num_groups, group_size)`."""
        return cast(Tensor, self.loss_tokens) > 0  # filled in when the view was made

    @property
    def has_gradient(self) -> Tensor:
        """Rows with a token in the loss and a non-zero advantage, boolean, shape `(num_groups, group_size)`."""
        return self.live & (self.advantages != 0)

    def __iter__(self) -> Iterator[NoReturn]:
        raise TypeError(
            "RolloutGroups is not a list of pass rates. `observe(rows, groups)` gets the groups of those rows: read "
            "groups.pass_rates (NaN where the reward is not 0 or 1), groups.weighted_rewards or groups.advantages."
        )


@runtime_checkable
class PromptSelector(Protocol):
    """
    Chooses dataset rows. Must be a pure function of its state, which all ranks replicate.

    No prompt is trained on twice in a step: rows whose prompt the step already has are passed over, and `select` is
    asked again for what is missing. A `select` that would give the same rows again can take the row numbers of the
    step as a keyword, `select(count, exclude=frozenset({...}))`. Where the selector has nothing else to give, prompts
    repeat.
    """

    def select(self, count: int) -> list[int]:
        """Return `count` row numbers of the training dataset."""
        ...

    def observe(self, rows: list[int], groups: RolloutGroups) -> None:
        """Take what was generated for these rows, before any filter: `rows[i]` is the prompt of group `i`."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the state: tensors, numbers, strings, and lists and dicts of these. Saved with `torch.save`."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` stopped. It was read with `weights_only=True`, its tensors are on the CPU."""
        ...


@runtime_checkable
class GroupFilter(Protocol):
    """Decides which groups are trained on, from gathered rewards."""

    def decide(self, groups: RolloutGroups) -> GroupDecision:
        """Return the mask and a reason per group. `groups.has_gradient` says which rows can teach something."""
        ...

    def fill_order(self, groups: RolloutGroups) -> list[int]:
        """Return all group indices, the least bad first, for when the batch cannot be filled."""
        ...


@runtime_checkable
class RolloutPruner(Protocol):
    """Decides which rows of the surviving groups are trained on."""

    def keep(
        self, advantages: Tensor, group_size: int, num_pools: int, step: int, live: Tensor | None = None
    ) -> Tensor:
        """
        Return a boolean mask over the rows.

        Args:
            advantages (`torch.Tensor`): Shape `(rows,)`, group after group; 0 where no token of the row is in the
                loss.
            group_size (`int`): Rows of one group.
            num_pools (`int`): Ranks; the rows of a rank are a contiguous slice.
            step (`int`): Count of generations so far, for seeded choices.
            live (`torch.Tensor`): Boolean, shape `(rows,)`: rows with a token in the loss. Passed by name, and only to
                a pruner that takes it.
        """
        ...
