"""Prompts by a predicted success rate: those nearest to a target, and how good the predictions were."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def nearest_to(values: Tensor, target: float, count: int) -> Tensor:
    """
    Return the places of the `count` values nearest to a target, in ascending order.

    `argmin_{|S| = count} sum_{i in S} |v_i - target|`; the lower place wins a tie, and NaN comes last.

    Args:
        values (`torch.Tensor`): Shape `(n,)`.
        target (`float`): A number.
        count (`int`): In [0, n].

    Returns:
        `torch.Tensor`: int64, shape `(count,)`.

    Raises:
        ValueError: more places than values.

    Example:
    ```python
    >>> nearest_to(torch.tensor([0.9, 0.45, 0.1, 0.55, 0.5]), 0.5, 3).tolist()
    [1, 3, 4]
    >>> nearest_to(torch.tensor([0.25, 0.75, 0.25]), 0.5, 2).tolist()  # a tie
    [0, 1]
    ```
    """
    if not 0 <= count <= values.numel():
        raise ValueError(f"count={count} is outside [0, {values.numel()}], the number of values.")
    distance = torch.nan_to_num((values.detach().double() - target).abs(), nan=math.inf)
    return torch.sort(distance, stable=True).indices[:count].sort().values


def explained_variance(predicted: Tensor, observed: Tensor) -> float:
    """
    Return `1 - Var(observed - predicted) / Var(observed)`: 1 is perfect, 0 is no better than a constant.

    Args:
        predicted, observed (`torch.Tensor`): Shape `(n,)`; places where either is NaN are left out.

    Returns:
        `float`: At most 1; NaN where what was observed does not vary.

    Example:
    ```python
    >>> observed = torch.tensor([0.0, 0.5, 1.0])
    >>> explained_variance(torch.tensor([0.25, 0.5, 0.75]), observed)
    0.75
    >>> explained_variance(torch.full((3,), 0.3), observed)
    0.0
    ```
    """
    predicted, observed = predicted.detach().double(), observed.detach().double()
    known = ~(torch.isnan(predicted) | torch.isnan(observed))
    predicted, observed = predicted[known], observed[known]
    spread = float(observed.var(correction=0)) if observed.numel() else 0.0
    if spread == 0.0:
        return math.nan
    return 1.0 - float((observed - predicted).var(correction=0)) / spread


def token_entropy(logits: Tensor) -> Tensor:
    """
    Return the entropy of the next token, `-sum_v p_v log p_v` in nats, `p = softmax(logits)`.

    Args:
        logits (`torch.Tensor`): Shape `(..., vocabulary)`.

    Returns:
        `torch.Tensor`: Shape `(...)`, in [0, log(vocabulary)].

    Example:
    ```python
    >>> [round(entropy, 4) for entropy in token_entropy(torch.tensor([[0.0, 0.0], [9.0, -9.0]])).tolist()]
    [0.6931, 0.0]
    ```
    """
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    # A token without any probability adds nothing.
    return -torch.where(log_probs.isneginf(), 0.0, log_probs.exp() * log_probs).sum(-1)
