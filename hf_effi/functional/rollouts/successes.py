"""Right answers of a prompt, counted from rewards that may be neither 0 nor 1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..data import check_number


def count_successes(rewards: Tensor, success_at: float | None = None) -> tuple[Tensor, Tensor]:
    """
    Count the right completions of each group, and the scorable ones.

    `s = #{i : r_i >= success_at}`, `n = #{i : r_i is a number}`. A reward of NaN (unscorable, or a place that is not
    there) is in neither: it is no wrong answer.

    Args:
        rewards (`torch.Tensor`): Shape `(num_groups, group_size)`; NaN rows are ignored.
        success_at (`float`, *optional*): Lowest reward of a right answer. Without it every reward must be 0 or 1.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: successes and counts, float64, shape `(num_groups,)` each.

    Raises:
        ValueError: a reward is neither 0 nor 1, and there is no `success_at`.

    Example:
    ```python
    >>> successes, counts = count_successes(torch.tensor([[1.0, 0.0, float("nan")], [1.0, 1.0, 1.0]]))
    >>> successes.tolist(), counts.tolist()
    ([1.0, 3.0], [2.0, 3.0])
    >>> count_successes(torch.tensor([[0.1, 1.1, -1.0]]), success_at=1.0)[0].tolist()
    [1.0]
    ```
    """
    scorable = ~torch.isnan(rewards)
    if success_at is None:
        other = rewards[scorable & (rewards != 0) & (rewards != 1)]
        if other.numel():
            raise _not_binary(f"a reward is {float(other[0])!r}")
        success_at = 1.0
    right = scorable & (rewards >= success_at)
    return right.sum(1, dtype=torch.float64), scorable.sum(1, dtype=torch.float64)


def successes_of(groups: Any, success_at: float | None) -> tuple[Tensor, Tensor]:
    """
    Count the right completions of the groups of a generation, as [`count_successes`] does.

    Without `success_at` the groups must have pass rates: those of one reward function that gives 0 or 1. A weighted
    sum of several functions that happens to be 0 or 1 is no answer to whether a completion is right.

    Args:
        groups ([`~hf_effi.protocols.RolloutGroups`]): Of one generation.
        success_at (`float`, *optional*): Lowest reward of a right answer.

    Raises:
        ValueError: there are scorable rewards and no pass rates, and there is no `success_at`.
    """
    rewards = groups.rewards.detach().cpu()
    if success_at is None:
        unknown = torch.isnan(groups.pass_rates).cpu() & ~torch.isnan(rewards).all(1)
        if bool(unknown.any()):
            names = ", ".join(groups.reward_names) or "the reward"
            raise _not_binary(f"{names} has no pass rates")
    return count_successes(rewards, success_at)


def check_success_at(success_at: float | None) -> None:
    """Raise `ValueError` unless `success_at` is `None` or a finite number."""
    if success_at is not None:
        check_number("success_at", success_at, -float("inf"))


def _not_binary(what: str) -> ValueError:
    return ValueError(
        f"{what}, so that it cannot be told which completions are right: the rewards that decide must be 0 or 1. Name "
        "the reward function that says right or wrong by difficulty_reward=, or give the lowest reward of a right "
        "answer by success_at=, e.g. success_at=1.0."
    )
