"""Max-variance down-sampling: which completions tell the most about each other."""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: absorbs the rounding of `share * rows`, and of sums that would be equal on paper
_TOLERANCE = 1e-9
_EQUAL = 1e-12


def keep_by_variance(values: Tensor, keep: int, live: Tensor | None = None) -> Tensor:
    """
    PODS: the `keep` rows whose values have the largest variance.

    `argmax_{|S| = m} Var({v_i : i in S})` is reached by the `i` highest and the `m - i` lowest values for some `i` in
    `0..m`, so that one scan over a sorted list finds the exact optimum. With values of 0 and 1 it keeps as near to
    `m / 2` of each as there are. Of equally good subsets the one with more high values is kept, as in the released
    code; of equal values the lower row.

    A row that is NaN (unscorable) is kept only where nothing else is left, and a row without a token in the loss after
    that.

    Paper: [Not All Rollouts are Useful: Down-Sampling Rollouts in LLM Reinforcement
    Learning](https://huggingface.co/papers/2504.13818), section 3.2.

    Args:
        values (`torch.Tensor`): Rewards, or advantages of one scale, shape `(rows,)`.
        keep (`int`): Rows to keep, in [1, rows].
        live (`torch.Tensor`, *optional*): Boolean, shape `(rows,)`: rows with a token in the loss. By default all.

    Returns:
        `torch.Tensor`: Boolean, shape `(rows,)`, exactly `keep` true.

    Raises:
        ValueError: `keep` is outside its range.

    Example:
    ```python
    >>> keep_by_variance(torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 0.0]), keep=4).tolist()
    [True, True, True, False, True, False]
    >>> keep_by_variance(torch.tensor([0.9, 0.5, 0.4, 0.0]), keep=2).tolist()
    [True, False, False, True]
    ```
    """
    numbers = values.detach().to("cpu", torch.float64).tolist()
    alive = [True] * len(numbers) if live is None else live.tolist()
    if isinstance(keep, bool) or not isinstance(keep, int) or not 1 <= keep <= len(numbers):
        raise ValueError(f"keep must be a whole number in [1, {len(numbers)}] (the rows of the pool), got {keep!r}.")
    usable = [row for row, value in enumerate(numbers) if alive[row] and math.isfinite(value)]
    chosen = _widest(usable, numbers, keep) if keep < len(usable) else usable
    taken = set(chosen)
    rest = sorted((row for row in range(len(numbers)) if row not in taken), key=lambda row: (not alive[row], row))
    mask = torch.zeros(len(numbers), dtype=torch.bool)
    mask[[*chosen, *rest[: keep - len(chosen)]]] = True
    return mask


def _widest(rows: list[int], values: list[float], keep: int) -> list[int]:
    """Return the `keep` of `rows` with the largest variance, fewer than there are."""
    middle = math.fsum(values[row] for row in rows) / len(rows)
    down = sorted(rows, key=lambda row: (-values[row], row))
    ordered = [values[row] - middle for row in down]
    # sums[i] is that of the i highest, and of all but the last ones
    sums, squares = [0.0], [0.0]
    for value in ordered:
        sums.append(sums[-1] + value)
        squares.append(squares[-1] + value * value)
    best, high = -math.inf, keep
    for count in range(keep, -1, -1):
        first_low = len(rows) - (keep - count)
        total = sums[count] + sums[-1] - sums[first_low]
        spread = squares[count] + squares[-1] - squares[first_low] - total * total / keep
        if spread > best + _EQUAL * squares[-1]:
            best, high = spread, count
    chosen = down[:high]
    taken = set(chosen)
    up = sorted((row for row in rows if row not in taken), key=lambda row: (values[row], row))
    return chosen + up[: keep - high]


def kept_rows(rows: int, share: float, least: int = 1) -> int:
    """
    How many of `rows` a share keeps: `ceil(rows * share)`, at least `least` as far as there are so many.

    Example:
    ```python
    >>> [kept_rows(16, share) for share in (0.25, 0.3, 1.0)], kept_rows(4, 0.1, least=2), kept_rows(1, 0.1, least=2)
    ([4, 5, 16], 2, 1)
    ```
    """
    return min(rows, max(least, math.ceil(rows * share - _TOLERANCE)))


def between(start: float, end: float, progress: float) -> float:
    """
    D3S's schedule: `(1 - rho) * start + rho * end`, with the progress `rho` of the run held in [0, 1].

    Example:
    ```python
    >>> between(0.25, 0.75, 0.5), between(0.25, 0.75, 2.0)
    (0.5, 0.75)
    ```
    """
    rho = min(1.0, max(0.0, progress))
    return (1.0 - rho) * start + rho * end
