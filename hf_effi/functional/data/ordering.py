"""Static orders: by a score, by a score within sources, by level across subjects."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from ._checks import as_labels, check_count, clean_scores, seeded


def score_order(
    scores: Tensor | Sequence[float],
    *,
    seed: int = 0,
    descending: bool = False,
    buckets: int | None = None,
    folds: int = 1,
    sources: Sequence[Hashable] | None = None,
    nan: str = "error",
) -> Tensor:
    """
    Sort rows by a score; every row occurs exactly once.

    A seeded shuffle comes first and the sort is stable, so equal scores are in random order and constant scores give a
    plain shuffle. Sources replace each score by its percentile within its source, `(rank + 1/2) / size`, which keeps
    the mixture constant along the order. Folds cut the order into `folds` interleaved passes `order[j::folds]`.
    Buckets sort only which of `buckets` equal parts a row lies in, and shuffle inside each.

    Args:
        scores (`torch.Tensor` or `Sequence[float]`): One number per row, shape `(num_rows,)`.
        seed (`int`, *optional*, defaults to 0): Seed of ties and of the shuffles in buckets.
        descending (`bool`, *optional*, defaults to `False`): Highest first.
        buckets (`int`, *optional*): In `[1, num_rows]`; a full sort if `None`.
        folds (`int`, *optional*, defaults to 1): Ascending passes, in `[1, num_rows]`.
        sources (`Sequence[Hashable]`, *optional*): Source of each row, for a stratified sort.
        nan (`str`, *optional*, defaults to `"error"`): `"error"` or `"median"`, see [`clean_scores`].

    Returns:
        `torch.Tensor`: A permutation, shape `(num_rows,)`, int64.

    Raises:
        ValueError: NaN scores, `buckets` or `folds` out of range, or another number of sources.

    Example:
    ```python
    >>> score_order([0.3, 0.1, 0.2]).tolist()
    [1, 2, 0]
    >>> score_order([1, 2, 3, 4, 5], folds=2).tolist()
    [0, 2, 4, 1, 3]
    >>> score_order([10, 20, 1, 2], sources=["a", "a", "b", "b"]).sort().values.tolist()
    [0, 1, 2, 3]
    ```
    """
    values = clean_scores(scores, nan=nan)
    size = values.numel()
    for name, value in (("buckets", buckets), ("folds", folds)):
        if value is not None and check_count(name, value) > size:
            raise ValueError(f"{name}={value} exceeds the {size} rows. Use at most {size}.")
    generator = seeded(seed)
    if sources is not None:
        values = percentile_within(values, sources)
    shuffle = torch.randperm(size, generator=generator)
    order = shuffle[torch.sort(values[shuffle], stable=True, descending=descending).indices]
    if buckets is not None:
        bounds = [round(part * size / buckets) for part in range(buckets + 1)]
        parts = [order[low:high] for low, high in zip(bounds, bounds[1:], strict=False)]
        order = torch.cat([part[torch.randperm(part.numel(), generator=generator)] for part in parts])
    return torch.cat([order[fold::folds] for fold in range(folds)])


def percentile_within(scores: Tensor, sources: Sequence[Hashable]) -> Tensor:
    """
    Return `(rank + 1/2) / size` of each row within its source; equal scores share the mean of their ranks.

    Raises:
        ValueError: another number of sources than scores.

    Example:
    ```python
    >>> percentile_within(torch.tensor([10.0, 20.0, 5.0]), ["a", "a", "b"]).tolist()
    [0.25, 0.75, 0.5]
    ```
    """
    sources = as_labels(sources)
    if len(sources) != scores.numel():
        raise ValueError(f"sources has {len(sources)} entries for {scores.numel()} scores. Give one per row.")
    members: dict[Hashable, list[int]] = {}
    for row, source in enumerate(sources):
        members.setdefault(source, []).append(row)
    percentiles = torch.empty(scores.numel(), dtype=torch.float64)
    for rows in members.values():
        index = torch.tensor(rows)
        _, group, count = torch.unique(scores[index], return_inverse=True, return_counts=True)
        below = count.cumsum(0) - count
        mean_rank = below + (count - 1) / 2
        percentiles[index] = (mean_rank[group].double() + 0.5) / len(rows)
    return percentiles


def interleave_levels(
    levels: Sequence[float] | Sequence[tuple[float, ...]], subjects: Sequence[Hashable], *, seed: int = 0
) -> Tensor:
    """
    Order rows by level, and inside a level take the subjects in turn: CORGI's interleaving.

    Args:
        levels (`Sequence[float]` or `Sequence[tuple[float, ...]]`): Level of each row, ascending in difficulty; tuples
            such as `(education stage, Bloom level)` compare from the left.
        subjects (`Sequence[Hashable]`): Subject of each row.
        seed (`int`, *optional*, defaults to 0): Order of the rows within a subject and of the subjects within a level.

    Returns:
        `torch.Tensor`: A permutation, shape `(num_rows,)`. Neighbours of one level differ in subject as long as two
        subjects have rows left.

    Raises:
        ValueError: lengths differ, no row, or a NaN level.

    Example:
    ```python
    >>> domains = ["art", "art", "law", "law", "law"]
    >>> order = interleave_levels([1, 1, 1, 1, 2], domains)
    >>> [domains[i] for i in order[:4].tolist()] in (["art", "law"] * 2, ["law", "art"] * 2)
    True
    >>> int(order[4])
    4
    ```
    """
    levels, subjects = as_labels(levels), as_labels(subjects)
    if len(levels) != len(subjects) or len(levels) == 0:
        raise ValueError(
            f"levels has {len(levels)} and subjects {len(subjects)} entries. Give one of each per row, at least one."
        )
    queues: dict[tuple[float, ...], dict[Hashable, list[int]]] = {}
    for row in torch.randperm(len(levels), generator=seeded(seed)).tolist():
        level = levels[row]
        key = tuple(level) if isinstance(level, (tuple, list)) else (level,)
        if any(part != part for part in key):
            raise ValueError(f"levels[{row}] is NaN. Give every row a level.")
        queues.setdefault(key, {}).setdefault(subjects[row], []).append(row)
    order: list[int] = []
    last: Hashable = object()
    for key in sorted(queues):
        waiting = queues[key]
        names = list(waiting)
        if len(names) > 1 and names[0] == last:
            names = [*names[1:], names[0]]  # the turn goes on across the border of two levels
        for turn in range(max(map(len, waiting.values()))):
            for name in names:
                if turn < len(waiting[name]):
                    order.append(waiting[name][turn])
                    last = name
    return torch.tensor(order)
