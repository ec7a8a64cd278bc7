"""The built-in group filter and rollout pruner: thin objects over the pure functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data._checks import check_count, is_finite_number
from ..options import refuse_idle
from .selection import (
    GroupDecision,
    check_difficulty_range,
    fill_order,
    keep_by_advantage,
    keep_groups_by_pass_rate,
    pruned_count,
)

#: what the rows of a pool are pruned by
PRUNE_METRICS = ("smallest", "largest", "random")
#: in which pool rows compete: those of a prompt, of a rank, or of all ranks
PRUNE_SCOPES = ("group", "rank", "global")


def rewards_named(groups: Any, reward: str | None) -> Tensor:
    """
    Return the rewards of one function by its name, shape `(num_groups, group_size)`; without a name those that decide.

    Args:
        groups ([`~hf_effi.protocols.RolloutGroups`]): Of one generation.
        reward (`str`, *optional*): Name of a reward function.

    Raises:
        ValueError: there is no function of this name.

    Example:
    ```python
    >>> from types import SimpleNamespace
    >>> per_func = torch.tensor([[[1.0, 0.5], [0.0, 0.25]]])
    >>> groups = SimpleNamespace(rewards=per_func[..., 0], rewards_per_func=per_func, reward_names=("right", "short"))
    >>> rewards_named(groups, "short").tolist(), rewards_named(groups, None).tolist()
    ([[0.5, 0.25]], [[1.0, 0.0]])
    ```
    """
    if reward is None:
        rewards: Tensor = groups.rewards
        return rewards
    if reward not in groups.reward_names:
        known = ", ".join(groups.reward_names) or "none by name"
        raise ValueError(f"reward={reward!r} is not a reward function of this run. Known: {known}.")
    named: Tensor = groups.rewards_per_func[..., groups.reward_names.index(reward)]
    return named


def check_reward_name(reward: Any) -> None:
    """Raise `ValueError` unless `reward` is `None` or the name of a reward function."""
    if reward is not None and (not isinstance(reward, str) or not reward):
        raise ValueError(f"reward must be the name of a reward function, got {reward!r}.")


@dataclass(frozen=True)
class PassRateBand:
    """
    Online difficulty filter: keep groups whose pass rate lies in `[low, high]`; the ends 0 and 1 are open.

    Args:
        low (`float`, *optional*, defaults to `0.2`): In [0, 1).
        high (`float`, *optional*, defaults to `0.8`): In (low, 1].
        reward (`str`, *optional*): Name of the reward function that is looked at; by default the one that decides.

    Example:
    ```python
    >>> PassRateBand(0.2, 0.8)
    PassRateBand(low=0.2, high=0.8, reward=None)
    ```
    """

    low: float = 0.2
    high: float = 0.8
    reward: str | None = None

    def __post_init__(self) -> None:
        check_difficulty_range(self.low, self.high)
        check_reward_name(self.reward)

    def decide(self, groups: Any) -> GroupDecision:
        return keep_groups_by_pass_rate(rewards_named(groups, self.reward), self.low, self.high, groups.has_gradient)

    def fill_order(self, groups: Any) -> list[int]:
        rewards = rewards_named(groups, self.reward)
        return fill_order(rewards, self.low, self.high, groups.has_gradient, groups.live)


@dataclass(frozen=True)
class AdvantagePruner:
    """
    CPPO completion pruning over all rows of a generation.

    A place that a pool cannot fill with a row that has a token in the loss goes to the best such row left in the
    others.

    Args:
        prune_rate (`float`): Share of rows dropped, in [0, 1).
        metric (`str`, *optional*, defaults to `"smallest"`): What is pruned, see [`keep_by_advantage`].
        scope (`str`, *optional*, defaults to `"rank"`): Pool in which rows compete: `"group"` (the completions of one
            prompt, as in the paper's text), `"rank"` (all rows of a process, as in the released code), `"global"`.
        balance_signs (`bool`, *optional*, defaults to `False`): Give each sign of the advantage half of the places.
        seed (`int`, *optional*, defaults to `0`): Seed of the random metric.

    Example:
    ```python
    >>> advantages = torch.tensor([1.0, 0.9, -0.8, 0.7, 0.0, 0.0, 0.0, 0.1])
    >>> AdvantagePruner(0.5, scope="group").keep_rows(advantages, group_size=4, num_pools=1, step=0).tolist()
    [True, True, False, False, True, False, False, True]
    >>> AdvantagePruner(0.5, scope="global").keep_rows(advantages, group_size=4, num_pools=1, step=0).tolist()
    [True, True, True, True, False, False, False, False]
    ```
    """

    prune_rate: float
    metric: str = "smallest"
    scope: str = "rank"
    balance_signs: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not is_finite_number(self.prune_rate) or not 0 <= self.prune_rate < 1:
            raise ValueError(f"prune_rate must be in [0, 1), got {self.prune_rate!r}. CPPO uses 0.5 to 0.9375.")
        if self.metric not in PRUNE_METRICS:
            raise ValueError(f"prune_metric must be one of {PRUNE_METRICS}, got {self.metric!r}.")
        if self.scope not in PRUNE_SCOPES:
            raise ValueError(f"prune_scope must be one of {PRUNE_SCOPES}, got {self.scope!r}.")
        if not isinstance(self.balance_signs, bool):
            raise ValueError(f"balance_signs must be True or False, got {self.balance_signs!r}.")
        check_count("seed", self.seed, 0)
        refuse_idle("balance_signs", self.balance_signs, False, self.metric != "random", "without metric='random'")
        refuse_idle("seed", self.seed, 0, self.metric == "random", "with metric='random'")

    def keep(self, groups: Any) -> Tensor:
        """Return the mask over [`~hf_effi.protocols.RolloutGroups`], see [`~hf_effi.protocols.RolloutPruner`]."""
        if not bool(groups.present.all()):
            raise ValueError(
                "CPPO prunes a share of groups of one size, and these have several. Drop `rollout_allocator=`, or "
                "pruning."
            )
        flat = groups.advantages.reshape(-1)
        live = groups.live.reshape(-1)
        kept = self.keep_rows(flat, groups.advantages.size(1), groups.num_pools, groups.generation, live)
        return kept.view_as(groups.advantages)

    def keep_rows(
        self, advantages: Tensor, group_size: int, num_pools: int, step: int, live: Tensor | None = None
    ) -> Tensor:
        """
        Return the boolean mask over the rows.

        Args:
            advantages (`torch.Tensor`): Shape `(rows,)`, group after group; 0 where no token of the row is in the
                loss.
            group_size (`int`): Rows of one group.
            num_pools (`int`): Ranks; the rows of a rank are a contiguous slice.
            step (`int`): Count of generations so far, for seeded choices.
            live (`torch.Tensor`, *optional*): Boolean, shape `(rows,)`: rows with a token in the loss. Default: all.
        """
        pool_size = {"group": group_size, "rank": advantages.numel() // num_pools, "global": advantages.numel()}
        size = pool_size[self.scope]
        generator = None
        if self.metric == "random":
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) % 2**63)
        advantages = advantages.detach().cpu()
        live = torch.ones_like(advantages, dtype=torch.bool) if live is None else live.cpu()
        masks = [
            keep_by_advantage(
                pool,
                pruned_count(size, self.prune_rate),
                metric=self.metric,
                balance_signs=self.balance_signs,
                generator=generator,
                live=alive,
            )
            for pool, alive in zip(advantages.split(size), live.split(size), strict=True)
        ]
        mask = torch.cat(masks)
        empty, left = (mask & ~live).nonzero().flatten(), (live & ~mask).nonzero().flatten()
        moved = min(len(empty), len(left))
        if moved:
            best = keep_by_advantage(advantages[left], moved, metric=self.metric, generator=generator)
            mask[left[best]] = True
            mask[empty[len(empty) - moved :]] = False
        return mask
