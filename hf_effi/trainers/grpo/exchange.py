"""Rows that move between ranks, so that each trains on the same number of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from ...functional.rollouts import deal_rows
from .rows import Rows

#: dimensions that one row of an entry can have, and bits of a width
_MOST_DIMENSIONS, _WIDTH_BITS = 6, 48


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
    return move_rows(rows, owners, hands, accelerator, join)


def move_rows(
    rows: Rows,
    owners: Sequence[tuple[int, int]],
    hands: Sequence[list[int]],
    accelerator: Any,
    join: Callable[[Sequence[Rows]], Rows],
) -> tuple[Rows, int]:
    """
    Bring rows to the ranks that they are dealt to. Only those that change their rank are sent.

    Args:
        rows, owners, accelerator, join: As in [`share_out`].
        hands (`Sequence[list[int]]`): Which of the owned rows each rank gets, in the order wanted.

    Returns:
        `tuple[Rows, int]`: The rows of this rank's hand, on its device, and how many came from others.
    """
    world, rank = accelerator.num_processes, accelerator.process_index
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
    Return one row as bytes: the shape of each entry, then the entries without padding, in the order of their names.

    Args:
        row ([`Rows`]): Of one row; entries are tensors whose first dimension is the rows, lists with one tensor or
            number for each row, numbers or `None`.
    """
    batch = row.trimmed().to("cpu").batch
    entries = [_entry(batch[name]) for name in _per_row(batch)]
    # One number for an entry of up to one dimension, with the count of dimensions above its width.
    shapes = [
        [entry.ndim << _WIDTH_BITS | (entry.shape[0] if entry.ndim else 0), *entry.shape[1:]] for entry in entries
    ]
    head = torch.tensor([number for shape in shapes for number in shape], dtype=torch.int64)
    parts = (entry.contiguous().flatten().view(torch.uint8) for entry in entries)
    return torch.cat([head.view(torch.uint8), *parts])


def from_bytes(data: Tensor, like: Rows) -> Rows:
    """
    Return the row that [`as_bytes`] made these bytes of.

    Args:
        data (`torch.Tensor`): Bytes, on the CPU.
        like ([`Rows`]): Rows of this rank: names, kinds and counts are the same on all.
    """
    names = _per_row(like.batch)
    data = data.clone()  # begins at a place that any kind of number may begin at
    head = data[: len(data) // 8 * 8].view(torch.int64)
    shapes: list[list[int]] = []
    at = 0
    for _ in names:
        dimensions, width = divmod(int(head[at]), 1 << _WIDTH_BITS)
        rest = head[at + 1 : at + max(1, dimensions)].tolist()
        shapes.append([width, *rest] if dimensions else [])
        at += 1 + len(rest)
    at *= 8
    found = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in like.batch.items()}
    for name, shape in zip(names, shapes, strict=True):
        value = like.batch[name]
        kind = _entry(value).dtype
        end = at + math.prod(shape) * kind.itemsize
        entry = data[at:end].clone().view(kind).view(shape)
        at = end
        if isinstance(value, Tensor):
            found[name] = entry.unsqueeze(0)
        else:
            found[name] = [entry if isinstance(value[0], Tensor) else entry.item()]
    return replace(like, batch=found)


def _entry(value: Any) -> Tensor:
    """Return what the first row has of an entry."""
    first = value[0]
    return first.cpu() if isinstance(first, Tensor) else torch.tensor(first)


def _per_row(batch: dict[str, Any]) -> list[str]:
    """Return the names of the entries that belong to rows, in one order for all ranks."""
    names = sorted(
        name for name, value in batch.items() if isinstance(value, list) or (isinstance(value, Tensor) and value.ndim)
    )
    for name in names:
        value = batch[name]
        numbers = isinstance(value, Tensor) or all(isinstance(x, (Tensor, int, float)) for x in value)
        if not numbers or (len(value) and _entry(value).ndim > _MOST_DIMENSIONS):
            raise TypeError(f"rows cannot move between ranks with entries of another form: {name}.")
    return names
