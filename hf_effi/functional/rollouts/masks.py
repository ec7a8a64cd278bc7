"""Which rows of a rollout batch have a gradient: one definition for selection, savings and metrics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: the entry of a batch that says what a token of a row weighs in the loss of demonstrations, shape `(rows,)`; 0 = none
DEMONSTRATION = "effi_demonstration"


def loss_mask(batch: dict[str, Any]) -> Tensor:
    """
    Tokens that the loss is taken over: `completion_mask * tool_mask`, shape `(rows, columns)`.

    A row can be empty: `mask_truncated_completions` clears the mask of a completion that was cut off.

    Example:
    ```python
    >>> batch = {"completion_mask": torch.tensor([[1, 1, 0]]), "tool_mask": torch.tensor([[0, 1, 1]])}
    >>> loss_mask(batch).tolist()
    [[0, 1, 0]]
    ```
    """
    mask = batch["completion_mask"]
    return mask if batch.get("tool_mask") is None else mask * batch["tool_mask"]


def policy_mask(batch: dict[str, Any], ratio_multiplies: bool = True) -> Tensor:
    """
    Tokens whose policy term can have a gradient: those in the loss whose importance ratio is not exactly 0.

    TRL's `*_mask` modes of the vLLM correction set the ratio of a token or a whole sequence to 0 and multiply the loss
    by it. Such a token still counts in the normaliser and in the KL term, so [`loss_mask`] keeps it.

    Args:
        batch (`dict`): `completion_mask`, shape `(rows, columns)`, and where present `tool_mask` of that shape and
            `importance_sampling_ratio`, shape `(rows, columns)` or `(rows, 1)`.
        ratio_multiplies (`bool`, *optional*, defaults to `True`): Whether the loss is multiplied by the ratio, which
            is so for every `loss_type` but `"vespo"`.

    Returns:
        `torch.Tensor`: Boolean, shape `(rows, columns)`.

    Example:
    ```python
    >>> batch = {"completion_mask": torch.ones(2, 2), "importance_sampling_ratio": torch.tensor([[0.0], [1.5]])}
    >>> policy_mask(batch).tolist()
    [[False, False], [True, True]]
    ```
    """
    mask = loss_mask(batch) != 0
    ratio = batch.get("importance_sampling_ratio")
    return mask & (ratio != 0) if ratio is not None and ratio_multiplies else mask


def row_advantages(batch: dict[str, Any], ratio_multiplies: bool = True) -> Tensor:
    """
    The advantage of each row as selection must see it: 0 where no token of the row has a policy term.

    With per-token advantages `A_it` the size is the mean of `|A_it|` over the row's tokens and the sign that of their
    sum, so that it is 0 exactly where every one of them is.

    Args:
        batch (`dict`): As in [`policy_mask`], with `advantages`, shape `(rows,)`, `(rows, 1)` or `(rows, columns)`.
        ratio_multiplies (`bool`, *optional*, defaults to `True`): As in [`policy_mask`].

    Returns:
        `torch.Tensor`: Shape `(rows,)`.

    Example:
    ```python
    >>> mask = torch.tensor([[1, 1], [0, 0], [1, 0]])
    >>> row_advantages({"completion_mask": mask, "advantages": torch.tensor([0.5, -2.0, 0.0])}).tolist()
    [0.5, 0.0, 0.0]
    >>> per_token = torch.tensor([[0.5, -1.5], [9.0, 9.0], [2.0, 9.0]])
    >>> row_advantages({"completion_mask": mask, "advantages": per_token}).tolist()
    [-1.0, 0.0, 2.0]
    ```
    """
    advantages, mask = batch["advantages"], policy_mask(batch, ratio_multiplies)
    if advantages.ndim == 1:
        return torch.where(mask.any(1), advantages, torch.zeros_like(advantages))
    masked = torch.where(mask, advantages, torch.zeros_like(advantages))
    size = masked.abs().sum(1) / mask.sum(1).clamp(min=1)
    return torch.where(masked.sum(1) < 0, -size, size)


def rows_with_gradient(batch: dict[str, Any], ratio_multiplies: bool = True) -> Tensor:
    """
    Rows that have a gradient: a non-zero advantage on at least one token of [`policy_mask`], or a demonstration.
    `ratio_multiplies` is that function's.

    Returns:
        `torch.Tensor`: Boolean, shape `(rows,)`.

    Example:
    ```python
    >>> mask = torch.tensor([[1, 1], [0, 0], [1, 0]])
    >>> rows_with_gradient({"completion_mask": mask, "advantages": torch.tensor([0.5, -2.0, 0.0])}).tolist()
    [True, False, False]
    ```
    """
    advantages = batch["advantages"]
    per_token = advantages.unsqueeze(1) if advantages.ndim == 1 else advantages
    active = (policy_mask(batch, ratio_multiplies) & (per_token != 0)).any(1)
    shown = batch.get(DEMONSTRATION)
    return active if shown is None else active | (shown > 0)
