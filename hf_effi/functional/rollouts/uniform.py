"""Uniform draws of dataset rows: the share of exploration that every selector has, and its candidates."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def draw_uniform(free: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """
    Draw rows uniformly, without repetition, among those that are free.

    Args:
        free (`torch.Tensor`): Rows that may be drawn, boolean, shape `(num_rows,)`.
        count (`int`): Rows wanted; all free rows where there are fewer.
        generator (`torch.Generator`): On the CPU.

    Returns:
        `torch.Tensor`: Different row numbers, int64, shape `(min(count, free rows),)`, in the order of the draw.

    Example:
    ```python
    >>> free = torch.tensor([True, False, True, True])
    >>> sorted(draw_uniform(free, 5, torch.Generator().manual_seed(0)).tolist())
    [0, 2, 3]
    ```
    """
    rows = free.nonzero().flatten()
    return rows[torch.randperm(len(rows), generator=generator)[:count]]


def round_at_random(value: float, generator: torch.Generator) -> int:
    """
    Round down or up so that the mean is `value`: a share of 0.1 of 4 rows is one row in 4 of 10 calls.

    Args:
        value (`float`): At least 0.
        generator (`torch.Generator`): One number is drawn from it, whatever the value.

    Example:
    ```python
    >>> generator = torch.Generator().manual_seed(0)
    >>> [round_at_random(0.4, generator) for _ in range(10)].count(1), round_at_random(3.0, generator)
    (3, 3)
    ```
    """
    whole = math.floor(value)
    return whole + int(float(torch.rand((), generator=generator, dtype=torch.float64)) < value - whole)


def smallest_rows(scores: Tensor, free: Tensor, count: int, then: Tensor | None = None) -> Tensor:
    """
    Return the free rows with the smallest scores, without sorting all of them.

    Args:
        scores (`torch.Tensor`): One number per row, shape `(num_rows,)`; no NaN.
        free (`torch.Tensor`): Rows that may be returned, boolean, same shape.
        count (`int`): Rows wanted; all free rows where there are fewer.
        then (`torch.Tensor`, *optional*): Decides among rows whose score is that of the last place, smaller first.
            What is equal there too goes by the row number.

    Returns:
        `torch.Tensor`: Different row numbers, int64, by score and then by number.

    Example:
    ```python
    >>> scores = torch.tensor([3.0, 1.0, 2.0, 1.0, 0.0])
    >>> smallest_rows(scores, torch.tensor([True, True, True, True, False]), 2).tolist()
    [1, 3]
    >>> smallest_rows(torch.zeros(4), torch.ones(4, dtype=torch.bool), 2, then=torch.tensor([1, 0, 1, 0])).tolist()
    [1, 3]
    ```
    """
    rows = free.nonzero().flatten()
    count = min(count, len(rows))
    if count == 0:
        return rows[:0]
    values = scores[rows]
    last = torch.kthvalue(values, count).values
    # Those below the last value are fewer than `count`; the places left go to some of those that equal it.
    below, equal = (values < last).nonzero().flatten(), (values == last).nonzero().flatten()
    if then is not None:
        equal = equal[torch.sort(then[rows[equal]], stable=True).indices]
    places = torch.cat([below, equal[: count - len(below)]]).sort().values
    return rows[places[torch.sort(values[places], stable=True).indices]]
