"""Which few prompts to train on, from how the accuracy of each moved over a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..data import check_count


def accuracy_spread(history: Tensor | Sequence[Sequence[float]]) -> Tensor:
    """
    Return the standard deviation of the accuracy of each row over the epochs, population form.

    Args:
        history (`torch.Tensor` or `Sequence`): Accuracies, shape `(num_epochs, num_rows)`; NaN where a row was not
            seen in an epoch, which is left out.

    Returns:
        `torch.Tensor`: float64, shape `(num_rows,)`; NaN for a row that was seen fewer than twice.

    Raises:
        ValueError: another number of dimensions, or an infinite accuracy.

    Example:
    ```python
    >>> nan = float("nan")
    >>> [round(value, 3) for value in accuracy_spread([[0.0, 0.5, nan], [1.0, 0.5, 0.2]]).tolist()]
    [0.5, 0.0, nan]
    ```
    """
    table = torch.as_tensor(history, dtype=torch.float64)
    if table.ndim != 2 or bool(torch.isinf(table).any()):
        raise ValueError(
            f"history must be finite accuracies of shape (num_epochs, num_rows), NaN for a row that was not seen, got "
            f"shape {tuple(table.shape)}."
        )
    if not len(table):
        return torch.full((table.size(1),), math.nan, dtype=torch.float64)
    seen = ~table.isnan()
    number = seen.sum(0)
    values = table.nan_to_num(0.0)
    mean = values.sum(0) / number.clamp(min=1)
    spread = ((values - mean).square() * seen).sum(0).div(number.clamp(min=1)).sqrt()
    # The mean of equal numbers can be off by a rounding: a row that never moved has a spread of exactly 0.
    high, low = table.nan_to_num(-math.inf).amax(0), table.nan_to_num(math.inf).amin(0)
    return torch.where(high == low, 0.0, spread).masked_fill(number < 2, math.nan)


def high_variance_rows(history: Tensor | Sequence[Sequence[float]], k: int = 1) -> list[int]:
    """
    Return the `k` rows whose accuracy moved most over the epochs of a run, the largest spread first.

    One-shot RLVR trains on these: [2504.20571](https://huggingface.co/papers/2504.20571), Sec. 2. Of equal spreads the
    lower row number comes first.

    Args:
        history (`torch.Tensor` or `Sequence`): As for [`accuracy_spread`], such as
            [`~hf_effi.callbacks.PassRateHistoryCallback`] collects.
        k (`int`, *optional*, defaults to 1): Rows wanted, at least 1.

    Raises:
        ValueError: fewer than `k` rows have an accuracy that changed: a row that never changed, or was seen once, was
            chosen by nothing.

    Example:
    ```python
    >>> high_variance_rows([[0.0, 0.5, 0.2], [1.0, 0.5, 0.4]], k=2)
    [0, 2]
    ```
    """
    check_count("k", k)
    spread = accuracy_spread(history)
    moved = int((spread > 0).sum())
    if moved < k:
        raise ValueError(
            f"k={k} rows were asked for, and the accuracy of {moved} of {len(spread)} changed between the epochs that "
            "they were seen in. Record more epochs, sample more completions for each prompt, or ask for fewer rows."
        )
    order = torch.sort(spread.nan_to_num(-1.0), descending=True, stable=True).indices
    rows: list[int] = order[:k].tolist()
    return rows


def stacked_history(visits: Mapping[int, Sequence[float]], num_rows: int) -> Tensor:
    """
    Return the table of [`accuracy_spread`] from the accuracies of each row in the order of its visits.

    Args:
        visits (`Mapping[int, Sequence[float]]`): Row number -> accuracies.
        num_rows (`int`): Rows of the dataset.

    Returns:
        `torch.Tensor`: float64, shape `(most visits of a row, num_rows)`, padded with NaN.

    Raises:
        ValueError: a row that the dataset does not have.

    Example:
    ```python
    >>> stacked_history({1: [0.5, 1.0]}, num_rows=2).tolist()
    [[nan, 0.5], [nan, 1.0]]
    ```
    """
    check_count("num_rows", num_rows)
    if wrong := [row for row in visits if not 0 <= row < num_rows]:
        raise ValueError(
            f"row {wrong[0]} was seen, and num_rows={num_rows}. Give the rows of the dataset of that run."
        )
    table = torch.full((max(map(len, visits.values()), default=0), num_rows), math.nan, dtype=torch.float64)
    for row, accuracies in visits.items():
        table[: len(accuracies), row] = torch.as_tensor(accuracies, dtype=torch.float64)
    return table
