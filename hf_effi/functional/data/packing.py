"""Micro-batches of equal cost from rows of unequal length: token budget, cost of a row, dealing to ranks."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence

import torch
from torch import Tensor

from ._checks import check_count, check_number


def flop_coefficients(num_params: int, num_layers: int, num_heads: int, head_dim: int) -> tuple[float, float]:
    """
    Return `(a, b)` of the cost `a l + b l^2` of training on a row of `l` tokens, in floating-point operations.

    `a = 6 N`, `b = 12 L H D`: two operations a parameter or attention product, forward once and backward twice.
    Attention counts the full square; with kernels that skip the masked half, halve `b`.

    Args:
        num_params (`int`): Parameters that multiply each token, `N`: all but an input embedding of its own.
        num_layers, num_heads, head_dim (`int`): `L`, query heads `H` and `D`.

    Raises:
        ValueError: a count below 1.

    Example:
    ```python
    >>> flop_coefficients(7_000_000_000, 32, 32, 128)
    (42000000000.0, 1572864.0)
    ```
    """
    check_count("num_params", num_params)
    per_layer = check_count("num_heads", num_heads) * check_count("head_dim", head_dim)
    return 6.0 * num_params, 12.0 * check_count("num_layers", num_layers) * per_layer


def batch_costs(batches: Sequence[Sequence[int]], cost: tuple[float, float], padded: bool = True) -> Tensor:
    """
    Return the cost of each micro-batch of rows with these lengths.

    Padded: `n (a m + b m^2)` for `n` rows of at most `m` tokens. Padding-free: the sum of `a l + b l^2`.

    Args:
        batches (`Sequence[Sequence[int]]`): Lengths of the rows of each micro-batch, in tokens.
        cost (`tuple[float, float]`): `(a, b)`, each at least 0.
        padded (`bool`, *optional*, defaults to `True`): Whether each row is padded to the longest of its micro-batch.

    Raises:
        ValueError: no pair, a negative coefficient, or both 0.

    Example:
    ```python
    >>> batch_costs([[3, 1], [2]], (1.0, 0.5)).tolist()
    [15.0, 4.0]
    >>> batch_costs([[3, 1], [2]], (1.0, 0.5), padded=False).tolist()
    [9.0, 4.0]
    ```
    """
    if not isinstance(cost, (tuple, list)) or len(cost) != 2:
        raise ValueError(f"cost={cost!r} must be a pair (a, b), such as (1, 0); see flop_coefficients.")
    a, b = (check_number(f"cost[{i}]", value, 0) for i, value in enumerate(cost))
    if a == b == 0:
        raise ValueError("cost=(0, 0) makes all micro-batches equal. Pass (1, 0) to balance tokens.")
    sizes = torch.tensor([len(batch) for batch in batches])
    owner = torch.arange(len(batches)).repeat_interleave(sizes)
    lengths = torch.tensor([length for batch in batches for length in batch], dtype=torch.float64)
    if padded:
        lengths = lengths.new_zeros(len(batches)).scatter_reduce(0, owner, lengths, "amax")[owner]
    return lengths.new_zeros(len(batches)).index_add(0, owner, a * lengths + b * lengths.square())


def pack_best_fit(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """
    Pack rows into batches of at most `max_tokens` tokens, best fit decreasing: longest row first, into the fullest
    batch that still takes it.

    Args:
        lengths (`Sequence[int]`): Tokens of each row, in `[1, max_tokens]`.
        max_tokens (`int`): Budget of a batch.

    Returns:
        `list[list[int]]`: Row numbers of each batch; each row once.

    Raises:
        ValueError: an empty row, or one that exceeds the budget.

    Example:
    ```python
    >>> pack_best_fit([5, 7, 3, 2, 4], 10)
    [[1, 2], [0, 4], [3]]
    ```
    """
    check_lengths(lengths, max_tokens)
    batches: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # batches by what still fits in
    rooms: list[int] = []  # keys of by_room, ascending
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect_left(rooms, lengths[row])
        if place == len(rooms):
            room, batch = max_tokens, len(batches)
            batches.append([])
        else:
            room = rooms[place]
            batch = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[place]
        batches[batch].append(row)
        room -= lengths[row]
        if room not in by_room:
            by_room[room] = []
            insort(rooms, room)
        by_room[room].append(batch)
    return batches


def pack_padded(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """
    Pack rows into batches of at most `max_tokens` tokens, padding counted: rows of neighbouring lengths, longest
    first.

    Args:
        lengths (`Sequence[int]`): Tokens of each row, in `[1, max_tokens]`.
        max_tokens (`int`): Budget of a batch: rows times the longest row.

    Returns:
        `list[list[int]]`: Row numbers of each batch; each row once.

    Raises:
        ValueError: an empty row, or one that exceeds the budget.

    Example:
    ```python
    >>> pack_padded([5, 7, 3, 2, 4], 10)
    [[1], [0, 4], [2, 3]]
    ```
    """
    check_lengths(lengths, max_tokens)
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches, begin = [], 0
    while begin < len(longest_first):
        end = begin + max_tokens // lengths[longest_first[begin]]
        batches.append(longest_first[begin:end])
        begin = end
    return batches


def fill_to_multiple(
    batches: Sequence[Sequence[int]],
    lengths: Sequence[int],
    multiple: int,
    cost: tuple[float, float] = (1.0, 0.0),
    padded: bool = True,
) -> list[list[int]]:
    """
    Halve the dearest batches until their number is a multiple: no row is dropped, none is repeated.

    Args:
        batches (`Sequence[Sequence[int]]`): Row numbers of each batch.
        lengths (`Sequence[int]`): Tokens of each row.
        multiple (`int`): At least 1.
        cost, padded: See [`batch_costs`].

    Raises:
        ValueError: fewer rows than batches are needed.

    Example:
    ```python
    >>> fill_to_multiple([[0, 1, 2], [3]], [4, 3, 2, 9], 3)
    [[0, 2], [1], [3]]
    ```
    """
    needed = -(-len(batches) // check_count("multiple", multiple)) * multiple
    rows = sum(map(len, batches))
    if rows < needed:
        raise ValueError(
            f"{rows} rows make {len(batches)} micro-batches, and {needed} are needed to give each of {multiple} "
            "(processes times accumulation steps) as many. Use fewer processes or accumulation steps, or add or drop "
            "rows."
        )

    def priced(some: Sequence[Sequence[int]]) -> list[tuple[float, list[int]]]:
        prices = batch_costs([[lengths[row] for row in batch] for batch in some], cost, padded).tolist()
        # A single row cannot be halved: last on the heap.
        return [(-price if len(batch) > 1 else 0.0, list(batch)) for price, batch in zip(prices, some, strict=True)]

    heap = priced(batches)
    heapq.heapify(heap)
    while len(heap) < needed:
        _, batch = heapq.heappop(heap)
        for half in priced([batch[::2], batch[1::2]]):
            heapq.heappush(heap, half)
    return [batch for _, batch in sorted(heap, key=lambda item: item[1])]


def deal_snake(costs: Tensor | Sequence[float], ranks: int, accumulation: int = 1) -> Tensor:
    """
    Deal batches to `accumulation x ranks` places an update, dearest first, back and forth.

    The batches of an update are neighbours in cost, so that no rank waits; the direction turns with every update and
    every micro-batch, so that no rank gets the dearer ones again and again.

    Args:
        costs (`torch.Tensor` or `Sequence[float]`): Cost of each batch; their number is a multiple of the places.
        ranks, accumulation (`int`): Processes, and micro-batches of an update. At least 1.

    Returns:
        `torch.Tensor`: Batch numbers, shape `(updates, accumulation, ranks)`.

    Raises:
        ValueError: a count below 1, or a number of batches that is no multiple.

    Example:
    ```python
    >>> deal_snake([8, 7, 6, 5, 4, 3, 2, 1], ranks=2, accumulation=2).tolist()
    [[[0, 1], [3, 2]], [[6, 7], [5, 4]]]
    ```
    """
    places = check_count("ranks", ranks) * check_count("accumulation", accumulation)
    costs = torch.as_tensor(costs, dtype=torch.float64)
    if costs.numel() % places:
        raise ValueError(f"{costs.numel()} batches cannot be dealt to {places} places. Use fill_to_multiple first.")
    dealt = costs.argsort(descending=True, stable=True).view(-1, accumulation, ranks).clone()
    dealt[:, 1::2] = dealt[:, 1::2].flip(-1)
    dealt[1::2] = dealt[1::2].flip(1, 2)
    return dealt


def check_lengths(lengths: Sequence[int], max_tokens: int) -> None:
    """
    Check that every row has a token and fits into the budget.

    Raises:
        ValueError: no row, or one that does not; the message names it.
    """
    check_count("max_tokens", max_tokens)
    if not len(lengths):
        raise ValueError("There are no rows to pack.")
    for row, length in enumerate(lengths):
        if length < 1:
            raise ValueError(f"Row {row} has {length} tokens. Filter empty rows out of the dataset.")
        if length > max_tokens:
            raise ValueError(
                f"Row {row} has {length} tokens, the budget of a micro-batch is max_tokens={max_tokens}. Raise "
                f"max_tokens to at least {max(lengths)}, truncate, or filter out longer rows."
            )
