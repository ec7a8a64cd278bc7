"""What is logged of choices: rewards before and after them, and what pruning leaves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...functional import metrics
from ...functional.rollouts import REASONS
from .rows import GatheredRows

#: TRL's `_metrics["train"]`
Log = dict[str, list[float]]


def log_rewards(log: Log, everything: GatheredRows, rows: Sequence[int], filtered: bool) -> None:
    """
    Log the mean rewards of what was generated and of what is kept.

    Args:
        rows (`Sequence[int]`): Global rows that are trained on; one may be there several times.
        filtered (`bool`): Whether groups were filtered, by a reward that may be another than TRL's weighted one.
    """
    kept = sorted(set(rows))
    rewards = [(metrics.REWARD_GENERATED, metrics.REWARD_KEPT, everything.weighted_rewards)]
    if filtered:
        rewards.append((metrics.FILTER_REWARD_GENERATED, metrics.FILTER_REWARD_KEPT, everything.rewards))
    for of_generated, of_kept, values in rewards:
        log[of_generated].append(float(torch.nanmean(values)))
        log[of_kept].append(float(torch.nanmean(values[kept])))


def log_dropped_groups(log: Log, reasons: Sequence[str], sizes: Sequence[int], chosen: Sequence[int]) -> None:
    """
    Log the completions of the groups that are not trained on, by the reason of their filter.

    Args:
        reasons (`Sequence[str]`): Of each group; `"kept"` groups that are not trained on are `surplus`.
        sizes (`Sequence[int]`): Completions of each group.
        chosen (`Sequence[int]`): Groups that are trained on.
    """
    dropped = dict.fromkeys((*REASONS[1:], "surplus", *sorted({*reasons} - {"kept"})), 0)
    for group in set(range(len(reasons))) - set(chosen):
        dropped["surplus" if reasons[group] == "kept" else reasons[group]] += sizes[group]
    for reason, completions in dropped.items():
        log[metrics.DROPPED + reason].append(float(completions))


def log_pruning(log: Log, advantages: Tensor, keep: Tensor) -> None:
    """Log what a pruner kept, from advantages and mask of shape `(num_groups, group_size)`."""
    kept = advantages[keep]
    log[metrics.PRUNE_ABS_ADVANTAGE_KEPT].append(float(kept.abs().mean()))
    log[metrics.PRUNE_POSITIVE_FRACTION].append(float((kept > 0).float().mean()))
    sign = torch.where(keep, torch.sign(advantages), 0.0)
    one_sign = ((sign > 0).any(1) != (sign < 0).any(1)).float()
    log[metrics.PRUNE_GROUPS_WITH_ONE_SIGN].append(float(one_sign.mean()))
