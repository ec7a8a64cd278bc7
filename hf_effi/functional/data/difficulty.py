"""Difficulty from outcomes that were recorded before training."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from ._checks import check_number


def pass_rate_difficulty(
    passed: Tensor | Sequence[int],
    tried: Tensor | Sequence[int],
    *,
    prior_passed: float = 1.0,
    prior_failed: float = 1.0,
) -> Tensor:
    """
    Return the expected failure rate `1 - (passed + a) / (tried + a + b)` under a Beta prior.

    Args:
        passed (`torch.Tensor` or `Sequence[int]`): Correct answers of each row, shape `(num_rows,)`.
        tried (`torch.Tensor` or `Sequence[int]`): Answers of each row, shape `(num_rows,)`; 0 gives the prior mean.
        prior_passed, prior_failed (`float`, *optional*, defaults to 1.0): `a` and `b`, at least 0. Both 0 is the raw
            rate.

    Returns:
        `torch.Tensor`: In `[0, 1]`, shape `(num_rows,)`, float64.

    Raises:
        ValueError: counts that are negative or contradict each other, or no answer and no prior.

    Example:
    ```python
    >>> pass_rate_difficulty([0, 4, 8, 0], [8, 8, 8, 0]).tolist()
    [0.9, 0.5, 0.09999999999999998, 0.5]
    ```
    """
    check_number("prior_passed", prior_passed, 0)
    check_number("prior_failed", prior_failed, 0)
    right = torch.as_tensor(passed).double()
    total = torch.as_tensor(tried).double()
    wrong = (right < 0) | (right > total) | right.isnan() | total.isnan()
    if right.shape != total.shape or right.ndim != 1 or bool(wrong.any()):
        raise ValueError(
            f"passed {tuple(right.shape)} and tried {tuple(total.shape)} must be of one shape (num_rows,) with "
            "0 <= passed <= tried."
        )
    weight = total + prior_passed + prior_failed
    if bool((weight == 0).any()):
        raise ValueError("A row was never tried and the prior is empty. Use prior_passed, prior_failed > 0.")
    return 1 - (right + prior_passed) / weight


def learnability(pass_rates: Tensor | Sequence[float]) -> Tensor:
    """
    Return `p (1 - p)`: largest where a row is solved half of the time, 0 where it always or never is.

    Raises:
        ValueError: a rate outside `[0, 1]`, or NaN.

    Example:
    ```python
    >>> learnability([0.0, 0.5, 1.0]).tolist()
    [0.0, 0.25, 0.0]
    ```
    """
    rates = torch.as_tensor(pass_rates).double()
    if not bool(((rates >= 0) & (rates <= 1)).all()):
        raise ValueError("pass_rates must lie in [0, 1] and have no NaN.")
    return rates * (1 - rates)


def word_rarity(token_ids: Sequence[Sequence[int]]) -> Tensor:
    """
    Return the mean negative log unigram probability of each row, in nats; the unigram comes from the rows themselves.

    Args:
        token_ids (`Sequence[Sequence[int]]`): Tokens of each row. An empty row has rarity 0.

    Returns:
        `torch.Tensor`: Shape `(num_rows,)`, float64.

    Example:
    ```python
    >>> [round(r, 4) for r in word_rarity([[1, 1], [1, 2]]).tolist()]
    [0.2877, 0.837]
    ```
    """
    counts: Counter[int] = Counter()
    for row in token_ids:
        counts.update(row)
    total = sum(counts.values())
    cost = {token: math.log(total / count) for token, count in counts.items()}
    return torch.tensor(
        [math.fsum(cost[token] for token in row) / len(row) if len(row) else 0.0 for row in token_ids],
        dtype=torch.float64,
    )
