"""Rows cut into forwards of at most so many tokens, and how evenly work is spread over ranks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence


def cut_to_budget(
    rows: Sequence[int],
    tokens: Callable[[list[int]], float],
    budget: float,
    groups: Sequence[Hashable] | None = None,
) -> list[list[int]]:
    """
    Cut rows, in their order, into as few pieces of neighbours as a budget of tokens allows.

    Next fit: a row joins the piece before it where the two together stay within the budget. A row that is over the
    budget alone is a piece of its own. With `groups`, neighbours of one group join together, and are cut only where
    they are over the budget on their own.

    Args:
        rows (`Sequence[int]`): Row numbers; rows that are cheap together stand side by side.
        tokens (`Callable[[list[int]], float]`): Tokens of one forward of some rows, with its padding.
        budget (`float`): The most tokens of a piece.
        groups (`Sequence[Hashable]`, *optional*): What is equal for rows that stay together, by row number.

    Returns:
        `list[list[int]]`: The pieces, in order; none for no rows.

    Example:
    ```python
    >>> lengths = [9, 3, 3, 2, 1]
    >>> cut_to_budget(range(5), lambda piece: len(piece) * max(lengths[row] for row in piece), budget=8)
    [[0], [1, 2], [3, 4]]
    >>> cut_to_budget(range(5), lambda piece: sum(lengths[row] for row in piece), budget=8)
    [[0], [1, 2, 3], [4]]
    ```
    """
    pieces: list[list[int]] = []
    for _, unit in itertools.groupby(rows, key=lambda row: row if groups is None else groups[row]):
        together = list(unit)
        if pieces and tokens([*pieces[-1], *together]) <= budget:
            pieces[-1] += together
        elif len(together) == 1:
            pieces.append(together)
        else:
            pieces += cut_to_budget(together, tokens, budget)
    return pieces


def cut_further(pieces: Sequence[Sequence[int]], lengths: Sequence[float], count: int) -> list[list[int]]:
    """
    Halve pieces until there are `count` of them, or until each is one row: the longest first, ties by their order.

    Args:
        pieces (`Sequence[Sequence[int]]`): Row numbers of each piece.
        lengths (`Sequence[float]`): Tokens of each row, by its number.
        count (`int`): How many pieces there ought to be.

    Example:
    ```python
    >>> cut_further([[0, 1, 2], [3]], lengths=[4, 2, 2, 9], count=3), cut_further([[0]], [5], count=4)
    ([[0], [1, 2], [3]], [[0]])
    ```
    """
    cut = [list(piece) for piece in pieces]
    while len(cut) < count:
        open_ones = [i for i, piece in enumerate(cut) if len(piece) > 1]
        if not open_ones:
            break
        longest = max(open_ones, key=lambda i: (sum(lengths[row] for row in cut[i]), -i))
        piece = cut[longest]
        halves = split_evenly([lengths[row] for row in piece], 2)
        cut[longest : longest + 1] = [[piece[place] for place in half] for half in halves]
    return cut


def split_evenly(costs: Sequence[float], parts: int) -> list[list[int]]:
    """
    Cut a list into so many pieces, none empty, with sums as even as cuts at the nearest place make them.

    Example:
    ```python
    >>> split_evenly([4, 4, 4, 12], 2), split_evenly([5, 5], 4)
    ([[0, 1, 2], [3]], [[0], [1]])
    ```
    """
    parts = min(parts, len(costs))
    total, pieces, begin, done = sum(costs), [], 0, 0.0
    for piece in range(parts):
        end, left = begin + 1, parts - piece - 1
        done += costs[begin]
        goal = total * (piece + 1) / parts
        while end < len(costs) - left and (left == 0 or done + costs[end] / 2 <= goal):
            done += costs[end]
            end += 1
        pieces.append(list(range(begin, end)))
        begin = end
    return pieces


def slowest_over_mean(costs: Sequence[Sequence[float]]) -> tuple[float, float]:
    """
    Return how much longer the slowest rank works than the mean of them, with waiting at the end and at each step.

    With the cost `c[r][i]` of rank `r` in step `i`: `max_r sum_i c / mean_r sum_i c`, and
    `sum_i max_r c / sum_i mean_r c`. Both are at least 1; 1 is no waiting. The first holds where ranks meet once in an
    update (DDP), the second where they meet in each forward (FSDP, ZeRO-3).

    Args:
        costs (`Sequence[Sequence[float]]`): Shape `(ranks, steps)`, not negative. All zero counts as even.

    Example:
    ```python
    >>> slowest_over_mean([[4, 0], [1, 3]]), slowest_over_mean([[3, 1], [1, 1]])
    ((1.0, 1.75), (1.3333333333333333, 1.3333333333333333))
    ```
    """
    ranks, sums = len(costs), [sum(steps) for steps in costs]
    total = sum(sums)
    if total == 0:
        return 1.0, 1.0
    return max(sums) * ranks / total, sum(map(max, zip(*costs, strict=True))) * ranks / total
