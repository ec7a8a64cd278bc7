"""GRESO: prompts whose last groups were all right or all wrong are skipped with a probability that adjusts itself."""

from __future__ import annotations

import torch
from torch import Tensor


def streaks_after(streaks: Tensor, rates: Tensor, hard_at: float = 0.0, easy_at: float = 1.0) -> Tensor:
    """
    Count how often in a row a prompt was all right or all wrong, with its newest group.

    Positive numbers count groups in a row with `p >= easy_at`, negative ones groups with `p <= hard_at`; anything else
    ends the streak. `z_easy = max(streak, 0)` and `z_hard = max(-streak, 0)` are the paper's trailing counts.

    Args:
        streaks (`torch.Tensor`): Before the group, int, shape `(num_groups,)`; 0 for a prompt that was not seen.
        rates (`torch.Tensor`): Pass rate of the group, same shape; NaN (nothing was scorable) leaves it as it is.
        hard_at, easy_at (`float`, *optional*, default to 0 and 1): `hard_at < easy_at`.

    Example:
    ```python
    >>> streaks_after(torch.tensor([0, 2, -1, 3]), torch.tensor([1.0, 1.0, 1.0, 0.5])).tolist()
    [1, 3, 1, 0]
    >>> streaks_after(torch.tensor([0, 2, -1]), torch.tensor([0.0, 0.0, float("nan")])).tolist()
    [-1, -1, -1]
    ```
    """
    easy, hard = rates >= easy_at, rates <= hard_at
    after = torch.where(easy, streaks.clamp(min=0) + 1, torch.where(hard, streaks.clamp(max=0) - 1, 0))
    return torch.where(torch.isnan(rates), streaks, after).to(streaks.dtype)


def visit_probability(streaks: Tensor, p_easy: float, p_hard: float, least: float = 0.01) -> Tensor:
    """
    Probability that a prompt is not skipped: `max(p^z, least)`, with `p` and `z` of the kind of its streak.

    Paper: [GRESO](https://huggingface.co/papers/2506.02177), which skips with `1 - p^z`.

    Args:
        streaks (`torch.Tensor`): See [`streaks_after`], shape `(num_rows,)`.
        p_easy, p_hard (`float`): Base probabilities, in (0, 1].
        least (`float`, *optional*, defaults to 0.01): However long the streak.

    Returns:
        `torch.Tensor`: float64, shape `(num_rows,)`; 1 where there is no streak.

    Example:
    ```python
    >>> visit_probability(torch.tensor([0, 1, 2, -1, -9]), p_easy=0.5, p_hard=0.2).tolist()
    [1.0, 0.5, 0.25, 0.2, 0.01]
    ```
    """
    bases = torch.tensor([p_hard, p_easy], dtype=torch.float64)
    base = bases[(streaks > 0).long()]
    return torch.where(streaks == 0, 1.0, base.pow(streaks.abs()).clamp(min=least))


def adjusted_base(
    base: float, dead_share: float, target: float, change: float = 0.01, low: float = 0.05, high: float = 0.95
) -> float:
    """
    Move a base probability by one step: down where more prompts were dead than wanted, up where fewer were.

    `p - change` if `dead_share >= target`, else `p + change`, clipped to `[low, high]`.

    Args:
        base (`float`): `p`.
        dead_share (`float`): Share of the generated prompts that were dead of this kind, in [0, 1].
        target (`float`): The share wanted.
        change (`float`, *optional*, defaults to 0.01): Size of the step.
        low, high (`float`, *optional*, default to 0.05 and 0.95): Ends.

    Example:
    ```python
    >>> round(adjusted_base(0.5, 0.3, target=0.1), 3), round(adjusted_base(0.5, 0.0, target=0.1), 3)
    (0.49, 0.51)
    >>> adjusted_base(0.95, 0.0, target=0.1)
    0.95
    ```
    """
    return min(high, max(low, base - change if dead_share >= target else base + change))
