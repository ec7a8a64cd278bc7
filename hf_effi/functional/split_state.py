"""Which part of the weights has an optimizer state for now: the draws of FRUGAL, as functions of their number."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .low_rank import draw_seed

#: in which order whole tensors take their turn
ORDERS = ("random", "ascending", "descending")


def draws_per_round(density: float) -> int:
    """
    Return after how many draws every block had a state, `ceil(1 / density)`; 1 where nothing is drawn.

    Example:
    ```python
    >>> draws_per_round(0.25), draws_per_round(0.3), draws_per_round(0.0)
    (4, 4, 1)

    ```
    """
    _check_density(density)
    return math.ceil(1 / density - 1e-9) if density else 1


def blocks_of_draw(
    sizes: Sequence[int], density: float, index: int, order: str = "random", seed: int = 0
) -> tuple[int, ...]:
    """
    Return the numbers of the blocks that one draw makes active.

    A round has `ceil(1 / density)` draws and one order of the blocks. Each draw goes on where the last one ended, and
    takes blocks until their weights are at least `density` of all; so a round leaves no block out, and a draw is
    larger than `density` by less than its last block.

    Args:
        sizes (`Sequence[int]`): Weights in each block.
        density (`float`): Share of the weights, in [0, 1].
        index (`int`): Number of the draw, from 0.
        order (`str`, *optional*, defaults to `"random"`): `"random"` (another one in each round), `"ascending"` or
            `"descending"`.
        seed (`int`, *optional*, defaults to 0): Of the random orders.

    Returns:
        `tuple[int, ...]`: In ascending order.

    Raises:
        ValueError: a value out of range.

    Example:
    ```python
    >>> [blocks_of_draw([4, 4, 4, 4], 0.5, index, "ascending") for index in range(3)]
    [(0, 1), (2, 3), (0, 1)]

    ```
    """
    _check_density(density)
    if order not in ORDERS:
        raise ValueError(f"order={order!r} must be one of {', '.join(ORDERS)}.")
    if not density or not sizes:
        return ()
    round_, place = divmod(index, draws_per_round(density))
    turns = list(range(len(sizes)))
    if order == "descending":
        turns.reverse()
    elif order == "random":
        turns = _permutation(len(sizes), draw_seed(seed, "blocks", round_)).tolist()
    wanted, start, taken = density * sum(sizes) * (1 - 1e-9), 0, 0
    for _ in range(place + 1):
        start, taken, covered = start + taken, 0, 0
        while covered < wanted and taken < len(turns):
            covered += sizes[turns[(start + taken) % len(turns)]]
            taken += 1
    return tuple(sorted(turns[(start + offset) % len(turns)] for offset in range(taken)))


def positions_of_draw(length: int, density: float, index: int, name: str, seed: int = 0) -> Tensor:
    """
    Return the positions along one axis that a draw makes active, at random and each once in a round.

    Args:
        length (`int`): Positions in all: columns, rows or weights.
        density (`float`): Share of them, in [0, 1]; above 0 at least one.
        index (`int`): Number of the draw, from 0.
        name (`str`): Of the parameter, so that each has draws of its own.
        seed (`int`, *optional*, defaults to 0): Of the run.

    Returns:
        `Tensor`: `ceil(density length)` positions as int64, ascending, on the CPU.

    Raises:
        ValueError: a density out of range.

    Example:
    ```python
    >>> first, second = (positions_of_draw(4, 0.5, index, "w") for index in range(2))
    >>> sorted(first.tolist() + second.tolist())
    [0, 1, 2, 3]

    ```
    """
    _check_density(density)
    count = math.ceil(density * length - 1e-9)
    if not count:
        return torch.empty(0, dtype=torch.int64)
    round_, place = divmod(index, math.ceil(length / count))
    turns = _permutation(length, draw_seed(seed, name, round_))
    return turns[(torch.arange(count) + place * count) % length].sort().values


def _permutation(length: int, seed: int) -> Tensor:
    return torch.randperm(length, generator=torch.Generator("cpu").manual_seed(seed))


def _check_density(density: float) -> None:
    if isinstance(density, bool) or not isinstance(density, (int, float)) or not 0 <= density <= 1:
        raise ValueError(f"density={density!r} must be a number in [0, 1], e.g. 0.25 for a quarter of the weights.")
