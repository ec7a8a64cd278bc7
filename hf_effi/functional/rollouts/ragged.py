"""Advantages of groups that have different sizes, by TRL's formulas."""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: ways in which the rewards of several functions become one advantage
AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")
#: what the centred rewards are divided by
REWARD_SCALES = ("group", "batch", "none")
#: what TRL adds to a standard deviation before it divides by it
_EPSILON = 1e-4


def ragged_advantages(
    rewards_per_func: Tensor,
    weights: Tensor,
    present: Tensor | None = None,
    aggregation: str = "sum_then_normalize",
    scale_rewards: str = "group",
) -> Tensor:
    """
    GRPO advantages from the rows that are there, with the formulas of TRL's `GRPOTrainer`.

    `"sum_then_normalize"`: `R_i = sum_k w_k r_ik`, `A_i = (R_i - mean(R)) / (std(R) + 1e-4)`, with the mean of the
    group, and the standard deviation of the group (`"group"`), of all rows (`"batch"`), or no division (`"none"`).
    `"normalize_then_sum"` (GDPO): `z_ik = (r_ik - mean_k) / (std_k + 1e-4)` in the group for each function,
    `Z_i = sum_k w_k z_ik`, `A_i = (Z_i - mean(Z)) / (std(Z) + 1e-4)` over all rows, whatever `scale_rewards` is.
    Standard deviations are unbiased.

    Where all places are present, the result has the bits of TRL's. Rows that are not present count nowhere, so that
    the mask of a pruner gives the advantages measured from the kept rows alone. Rewards that are all equal can give
    advantages that are not exactly 0, as in TRL: see [`equal_reward_groups`].

    Args:
        rewards_per_func (`torch.Tensor`): Shape `(num_groups, group_size, num_functions)`; NaN where a function does
            not apply. A row with nothing but NaN is unscorable.
        weights (`torch.Tensor`): Weight of each function, shape `(num_functions,)`.
        present (`torch.Tensor`, *optional*): Rows that there are, boolean, shape `(num_groups, group_size)`; any
            pattern. Defaults to all.
        aggregation (`str`, *optional*, defaults to `"sum_then_normalize"`): TRL's `multi_objective_aggregation`.
        scale_rewards (`str`, *optional*, defaults to `"group"`): `"group"`, `"batch"` or `"none"`.

    Returns:
        `torch.Tensor`: Shape `(num_groups, group_size)`, dtype and device of the rewards; 0 for rows that are not
        present or unscorable, and for a row alone in its group.

    Raises:
        ValueError: a shape does not fit the others, or `aggregation` or `scale_rewards` is unknown.

    Example:
    ```python
    >>> rewards = torch.tensor([[[1.0], [0.0], [0.0], [1.0]], [[1.0], [0.0], [9.0], [9.0]]])
    >>> present = torch.tensor([[True] * 4, [True, True, False, False]])
    >>> ragged_advantages(rewards, torch.ones(1), present, scale_rewards="none").tolist()
    [[0.5, -0.5, -0.5, 0.5], [0.5, -0.5, 0.0, 0.0]]
    ```
    """
    present = _checked(rewards_per_func, weights, present, aggregation, scale_rewards)
    if not rewards_per_func.numel():
        return rewards_per_func.new_zeros(present.shape)
    values = rewards_per_func.masked_fill(~present.unsqueeze(-1), math.nan)
    if aggregation == "normalize_then_sum":
        values = (values - torch.nanmean(values, dim=1, keepdim=True)) / (_std(values, 1) + _EPSILON)
    flat = values.reshape(-1, values.size(2))
    rewards = (flat * weights.to(flat.device).unsqueeze(0)).nansum(dim=1).view_as(present)
    # A row that no function could score has no reward; nansum has made it 0.
    unscorable = torch.isnan(rewards_per_func).all(dim=2) | ~present
    rewards = rewards.masked_fill(unscorable, math.nan)
    if aggregation == "normalize_then_sum":
        rewards = rewards.reshape(-1)
        advantages = ((rewards - torch.nanmean(rewards)) / (_std(rewards) + _EPSILON)).view_as(present)
    else:
        advantages = rewards - torch.nanmean(rewards, dim=1, keepdim=True)
        if scale_rewards != "none":
            std = _std(rewards, 1) if scale_rewards == "group" else _std(rewards.reshape(-1))
            advantages = advantages / (std + _EPSILON)
    return torch.nan_to_num(advantages, nan=0.0)


def _checked(
    rewards_per_func: Tensor, weights: Tensor, present: Tensor | None, aggregation: str, scale_rewards: str
) -> Tensor:
    if rewards_per_func.ndim != 3:
        raise ValueError(
            "rewards_per_func must have shape (num_groups, group_size, num_functions), got "
            f"{tuple(rewards_per_func.shape)}. For one function use rewards.unsqueeze(-1)."
        )
    shape = rewards_per_func.shape[:2]
    if present is None:
        present = torch.ones(shape, dtype=torch.bool)
    if weights.shape != rewards_per_func.shape[2:]:
        raise ValueError(
            f"weights must have one number per function, shape ({rewards_per_func.size(2)},), got "
            f"{tuple(weights.shape)}."
        )
    if present.shape != shape or present.dtype != torch.bool:
        raise ValueError(
            f"present must be boolean of shape {tuple(shape)}, got {tuple(present.shape)} of {present.dtype}."
        )
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation must be one of {AGGREGATIONS}, got {aggregation!r}.")
    if scale_rewards not in REWARD_SCALES:
        raise ValueError(f"scale_rewards must be one of {REWARD_SCALES}, got {scale_rewards!r}.")
    return present.to(rewards_per_func.device)


def _std(values: Tensor, dim: int | None = None) -> Tensor:
    """Unbiased standard deviation of what is not NaN, with the dimension kept; 0 for one place, NaN for one value."""
    if (values.numel() if dim is None else values.size(dim)) < 2:
        return torch.zeros_like(values)
    mean = torch.nanmean(values, dim=dim, keepdim=True)
    count = (~torch.isnan(values)).sum(dim=dim, keepdim=True)
    bessel = torch.where(count > 1, count / (count - 1), math.nan)
    return torch.sqrt(torch.nanmean((values - mean) ** 2, dim=dim, keepdim=True) * bessel)
