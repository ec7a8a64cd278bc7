"""Advantages of plain REINFORCE for `advantage_transform=`: Reinforce-Rej and RAFT++."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from ..functional.data import check_number
from ..functional.rollouts import equal_reward_groups

if TYPE_CHECKING:
    from ..protocols import RolloutGroups


@dataclass(frozen=True)
class ReinforceAdvantages:
    """
    REINFORCE without a baseline: the advantage of a completion is its reward, neither centred nor scaled.

    `A_i = r_i` where `r_i > 0`, `A_i = wrong` elsewhere, and `A_i = 0` in groups whose rewards are all equal. With
    `wrong=-1` and rewards of 0 and 1 (or -1 and 1) these are the advantages of Reinforce-Rej, and `wrong=0` is RAFT++,
    which learns from right answers only. TRL's importance ratios and clipping stay. Paper:
    [2504.11343](https://huggingface.co/papers/2504.11343).

    Args:
        wrong (`float`, *optional*, defaults to -1): Advantage of a completion whose reward is not above 0, <= 0.
        reject (`bool`, *optional*, defaults to `True`): Whether groups that are all right or all wrong have an
            advantage of 0. Without it, it is plain REINFORCE.

    Example:
    ```python
    >>> from hf_effi.protocols import RolloutGroups
    >>> rewards = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [1.0, float("nan"), 0.0]])
    >>> groups = RolloutGroups(rewards, torch.zeros(3, 3), torch.full((3, 3), 5), step=0)
    >>> ReinforceAdvantages()(groups).tolist()
    [[1.0, -1.0, -1.0], [0.0, 0.0, 0.0], [1.0, 0.0, -1.0]]
    >>> ReinforceAdvantages(wrong=0.0)(groups).tolist()
    [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]
    ```
    """

    wrong: float = -1.0
    reject: bool = True

    def __post_init__(self) -> None:
        check_number("wrong", self.wrong, -float("inf"), 0)
        if not isinstance(self.reject, bool):
            raise ValueError(f"reject must be True or False, got {self.reject!r}.")

    def __call__(self, groups: RolloutGroups) -> Tensor:
        """Return the advantages, shape `(num_groups, group_size)`, see [`~hf_effi.protocols.AdvantageTransform`]."""
        rewards = cast(Tensor, groups.weighted_rewards)  # filled in when the view was made
        advantages = torch.where(rewards > 0, rewards, torch.full_like(rewards, self.wrong))
        advantages = advantages.masked_fill(torch.isnan(rewards) | ~groups.live.to(rewards.device), 0.0)
        if self.reject:
            advantages = advantages.masked_fill(equal_reward_groups(rewards).unsqueeze(1), 0.0)
        return advantages.to(groups.advantages)
