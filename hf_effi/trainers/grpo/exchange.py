"""Rows that move between ranks, so that each trains on the same number of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from ...functional.rollouts import deal_rows
from .rows import Rows


def share_out(
    rows: Rows,
    owners: Sequence[tuple[int, int]],
    costs: Sequence[float],
    accelerator: Any,
    join: Callable[[Sequence[Rows]], Rows],
) -> tuple[Rows, int]:
    """
    Give every rank the same number of the chosen rows. They move only where the ranks hold different numbers of them.

    Only rows that change their rank are sent, as the bytes of their tensors without padding, in one collective; one
    number for each chosen row goes before.

    Args:
        rows ([`Rows`]): What this rank generated.
        owners (`Sequence[tuple[int, int]]`): `(rank, index in its rows)` of each chosen row, the same on every rank.
        costs (`Sequence[float]`): Of each chosen row, its tokens in the loss, which are dealt evenly too.
        accelerator (`Accelerator`): Whose ranks these are.
        join (`Callable`): Joins rows of several ranks.

    Returns:
        `tuple[Rows, int]`: `len(owners) // world_size` rows, on this rank's device, and how many came from others.
    """
    world, rank = accelerator.num_processes, accelerator.process_index
    counts = [sum(owner == r for owner, _ in owners) for r in range(world)]
    if all(count == len(owners) // world for count in counts):
        return rows.take([index for owner, index in owners if owner == rank]), 0
    hands = hands_of_ranks(deal_rows(costs, world), [owner for owner, _ in owners])
    goes_to = {row: receiver for receiver, hand in enumerate(hands) for row in hand}
    sent = [
        sorted(row for row, receiver in goes_to.items() if receiver == r and owners[row][0] == rank and r != rank)
        for r in range(world)
    ]
    got = [sorted(row for row in hands[rank] if owners[row][0] == r and r != rank) for r in range(world)]
    parcels = {row: as_bytes(rows.take([owners[row][1]])) for part in sent for row in part}
    sizes = torch.zeros(len(owners), dtype=torch.int64)
    for row, parcel in parcels.items():
        sizes[row] = len(parcel)
    sizes = sizes.to(accelerator.device)
    dist.all_reduce(sizes)
    size_of = sizes.tolist()
    outgoing = torch.cat([torch.empty(0, dtype=torch.uint8), *(parcels[row] for part in sent for row in part)])
    incoming = torch.empty(
        sum(size_of[row] for part in got for row in part), dtype=torch.uint8, device=accelerator.device
    )
    dist.all_to_all_single(
        incoming,
        outgoing.to(accelerator.device),
        [sum(size_of[row] for row in part) for part in got],
        [sum(size_of[row] for row in part) for part in sent],
    )
    arrived, at = {}, 0
    received = incoming.cpu()
    for row in (row for part in got for row in part):
        arrived[row] = from_bytes(received[at : at + size_of[row]], rows)
        at += size_of[row]
    mine = rows.to("cpu")
    parts = [arrived[row] if row in arrived else mine.take([owners[row][1]]) for row in hands[rank]]
    return join(parts).to(accelerator.device), len(arrived)


def hands_of_ranks(hands: Sequence[list[int]], owners: Sequence[int]) -> list[list[int]]:
    """
    Return which hand each rank takes, so that many rows are there already: the best pairs first, ties to lower ranks.

    Args:
        hands (`Sequence[list[int]]`): Rows of each hand.
        owners (`Sequence[int]`): Rank that holds each row.

    Example:
    ```python
    >>> hands_of_ranks([[0, 3], [1, 2]], owners=[1, 0, 0, 0])
    [[1, 2], [0, 3]]
    ```
    """
    pairs = sorted(
        (
            (-sum(owners[row] == rank for row in hand), rank, i)
            for i, hand in enumerate(hands)
            for rank in range(len(hands))
        )
    )
    taken: dict[int, list[int]] = {}
    left = set(range(len(hands)))
    for _, rank, i in pairs:
        if rank not in taken and i in left:
            taken[rank] = hands[i]
            left.remove(i)
    return [taken[rank] for rank in range(len(hands))]


def as_bytes(row: Rows) -> Tensor:
    """
    Return one row as bytes: the width of each entry, then the entries without padding, in the order of their names.

    Args:
        row ([`Rows`]): Of one row; entries are tensors whose first dimension is the rows, numbers or `None`.
    """
    batch = row.trimmed().to("cpu").batch
    entries = [batch[name] for name in _per_row(batch)]
    widths = torch.tensor([entry[0].numel() for entry in entries], dtype=torch.int64)
    return torch.cat([widths.view(torch.uint8), *(e.contiguous().flatten().view(torch.uint8) for e in entries)])


def from_bytes(data: Tensor, like: Rows) -> Rows:
    """
    Return the row that [`as_bytes`] made these bytes of.

    Args:
        data (`torch.Tensor`): Bytes, on the CPU.
        like ([`Rows`]): Rows of this rank: names, kinds and counts are the same on all.
    """
    names = _per_row(like.batch)
    data = data.clone()  # begins at a place that any kind of number may begin at
    at = 8 * len(names)
    widths = data[:at].view(torch.int64).tolist()
    found = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in like.batch.items()}
    for name, width in zip(names, widths, strict=True):
        kind = like.batch[name]
        end = at + width * kind.element_size()
        values = data[at:end].clone().view(kind.dtype)
        found[name] = values.view(1, width) if kind.ndim > 1 else values
        at = end
    return replace(like, batch=found)


def _per_row(batch: dict[str, Any]) -> list[str]:
    """Return the names of the entries that belong to rows, in one order for all ranks."""
    names = sorted(name for name, value in batch.items() if isinstance(value, Tensor) and value.ndim > 0)
    unknown = [n for n, v in batch.items() if isinstance(v, list) or (isinstance(v, Tensor) and v.ndim > 2)]
    if unknown:
        raise TypeError(f"rows cannot move between ranks with entries of another form: {', '.join(sorted(unknown))}.")
    return names
