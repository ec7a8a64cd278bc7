"""DUMP and AdaRFT: which source of prompts teaches most, and which difficulty fits the policy."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def upper_bounds(means: Tensor, counts: Tensor, bonus: float = 1.0) -> Tensor:
    """
    UCB of each source: `mean|A|_j + bonus * sqrt(2 ln(n + 1) / (n_j + 1))`, `n = sum_j n_j`.

    Paper: [DUMP](https://huggingface.co/papers/2504.09710).

    Args:
        means (`torch.Tensor`): Mean `|A|` of the window of each source, 0 where it is empty; shape `(num_sources,)`.
        counts (`torch.Tensor`): Completions that were seen of each source, same shape.
        bonus (`float`, *optional*, defaults to 1.0): Weight of the exploration term; 0 is no exploration.

    Example:
    ```python
    >>> scores = upper_bounds(torch.tensor([0.8, 0.2, 0.5]), torch.tensor([100, 10, 50]))
    >>> [round(score, 5) for score in scores.tolist()]
    [1.11721, 1.16119, 0.9464]
    ```
    """
    counts = counts.to(torch.float64)
    return means.to(torch.float64) + bonus * (2 * math.log(float(counts.sum()) + 1) / (counts + 1)).sqrt()


def source_weights(scores: Tensor, temperature: float = 0.1) -> Tensor:
    """
    Probability with which each source is drawn: `softmax(score / temperature)`.

    Args:
        scores (`torch.Tensor`): See [`upper_bounds`], shape `(num_sources,)`.
        temperature (`float`, *optional*, defaults to 0.1): `tau > 0`.

    Example:
    ```python
    >>> scores = upper_bounds(torch.tensor([0.8, 0.2, 0.5]), torch.tensor([100, 10, 50]))
    >>> [round(weight, 4) for weight in source_weights(scores).tolist()]
    [0.3658, 0.5679, 0.0663]
    ```
    """
    return torch.softmax(scores.to(torch.float64) / temperature, dim=0)


def moved_target(
    target: float, reward: float, low: float, high: float, *, rate: float, sensitivity: float, wanted: float
) -> float:
    """
    Move the difficulty that is aimed at: `clip(T + rate * (high - low) * tanh(sensitivity * (reward - wanted)))`.

    Paper: [AdaRFT](https://huggingface.co/papers/2504.05520), whose step `eta` is in units of the difficulty,
    `eta = rate * (high - low)`.

    Args:
        target (`float`): `T`.
        reward (`float`): Mean reward of the step.
        low, high (`float`): Least and greatest difficulty of the dataset.
        rate (`float`): Largest step, as a share of the range of difficulties.
        sensitivity (`float`): `alpha`.
        wanted (`float`): `beta`, the mean reward at which the difficulty stays.

    Example:
    ```python
    >>> [round(moved_target(50, r, 0, 100, rate=0.1, sensitivity=2, wanted=0.5), 3) for r in (0.5, 1.0, 0.0)]
    [50.0, 57.616, 42.384]
    >>> moved_target(98, 1.0, 0, 100, rate=0.1, sensitivity=2, wanted=0.5)
    100
    ```
    """
    moved = target + rate * (high - low) * math.tanh(sensitivity * (reward - wanted))
    return min(high, max(low, moved))


def quantile_bins(values: Tensor, count: int) -> Tensor:
    """
    Cut numbers into bins of about equal size; equal numbers share a bin.

    Args:
        values (`torch.Tensor`): One number per row, shape `(num_rows,)`; no NaN.
        count (`int`): Most bins.

    Returns:
        `torch.Tensor`: Bin of each row, int64, from 0 (smallest numbers), without gaps.

    Example:
    ```python
    >>> quantile_bins(torch.tensor([0.1, 0.9, 0.5, 0.5, 0.2]), 2).tolist()
    [0, 1, 1, 1, 0]
    >>> quantile_bins(torch.tensor([1.0, 1.0, 1.0]), 2).tolist()
    [0, 0, 0]
    ```
    """
    ordered = torch.sort(values).values
    below, upto = torch.searchsorted(ordered, values), torch.searchsorted(ordered, values, right=True)
    middle = (below + upto) // 2  # rank, in the middle of the rows with the same number
    return torch.unique(middle * count // max(1, len(values)), return_inverse=True)[1]
