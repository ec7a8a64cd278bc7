"""Rows that move between ranks, so that each trains on the same number of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from accelerate.utils import gather_object

from ...functional.rollouts import deal_rows
from .rows import Rows


def share_out(
    rows: Rows,
    owners: Sequence[tuple[int, int]],
    costs: Sequence[float],
    accelerator: Any,
    join: Callable[[Sequence[Rows]], Rows],
) -> Rows:
    """
    Give every rank the same number of the chosen rows. They move only where the ranks hold different numbers of them.

    Args:
        rows ([`Rows`]): What this rank generated.
        owners (`Sequence[tuple[int, int]]`): `(rank, index in its rows)` of each chosen row, the same on every rank.
        costs (`Sequence[float]`): Of each chosen row, its tokens in the loss, which are dealt evenly too.
        accelerator (`Accelerator`): Whose ranks these are.
        join (`Callable`): Joins rows of several ranks.

    Returns:
        [`Rows`]: `len(owners) // world_size` rows, on the device of this rank.
    """
    world, rank = accelerator.num_processes, accelerator.process_index
    mine = rows.take([index for owner, index in owners if owner == rank])
    counts = [sum(owner == r for owner, _ in owners) for r in range(world)]
    if all(count == len(owners) // world for count in counts):
        return mine
    pools = gather_object([mine.trimmed().to("cpu")])
    # Rows of a rank are sent in the order they were chosen, so position k of rank r is its k-th chosen row.
    position, seen = [], [0] * world
    for owner, _ in owners:
        position.append((owner, seen[owner]))
        seen[owner] += 1
    hand = deal_rows(costs, world)[rank]
    return join([pools[owner].take([index]) for owner, index in (position[i] for i in hand)]).to(accelerator.device)
