"""Mixtures of domains that change with progress, in exact shares."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from ._checks import as_labels, check_count, check_number, seeded
from .apportion import apportion

Waypoints = Sequence[tuple[float, Mapping[Hashable, float]]]


def mixture_at(progress: float, waypoints: Waypoints, smooth: bool = False) -> dict[Hashable, float]:
    """
    Return the share of each domain at a progress: the last way-point passed, or the line between two of them.

    Args:
        progress (`float`): In `[0, 1]`; clamped.
        waypoints (`Sequence[tuple[float, Mapping]]`): `(progress, weights)`, ascending, the first at 0. Weights are
            normalised; a domain that is not named has weight 0.
        smooth (`bool`, *optional*, defaults to `False`): Interpolate linearly instead of switching.

    Raises:
        ValueError: no way-point at 0, order, negative or all-zero weights.

    Example:
    ```python
    >>> plan = [(0.0, {"web": 1.0}), (0.8, {"web": 1.0, "math": 3.0})]
    >>> mixture_at(0.5, plan), mixture_at(0.8, plan)
    ({'web': 1.0, 'math': 0.0}, {'web': 0.25, 'math': 0.75})
    >>> mixture_at(0.4, plan, smooth=True)
    {'web': 0.625, 'math': 0.375}
    ```
    """
    marks, table = _check_waypoints(waypoints)
    names = list(table[0])
    done = min(max(float(progress), 0.0), 1.0)
    last = max(index for index, mark in enumerate(marks) if mark <= done)
    if not smooth or last == len(marks) - 1:
        return dict(table[last])
    part = (done - marks[last]) / (marks[last + 1] - marks[last])
    return {name: (1 - part) * table[last][name] + part * table[last + 1][name] for name in names}


def _check_waypoints(waypoints: Waypoints) -> tuple[list[float], list[dict[Hashable, float]]]:
    if not waypoints or waypoints[0][0] != 0:
        raise ValueError(f"waypoints={waypoints!r} must be (progress, weights) pairs, the first at progress 0.")
    marks = [check_number("progress of a way-point", mark, 0, 1) for mark, _ in waypoints]
    if any(b <= a for a, b in zip(marks, marks[1:], strict=False)):
        raise ValueError(f"the way-points' progress {marks} must ascend.")
    names = list(dict.fromkeys(name for _, weights in waypoints for name in weights))
    table = []
    for mark, weights in waypoints:
        for name, weight in weights.items():
            check_number(f"weight of {name!r} at {mark}", weight, 0)
        total = sum(weights.values())
        if total <= 0:
            raise ValueError(f"all weights at progress {mark} are 0. Give at least one domain a weight.")
        table.append({name: weights.get(name, 0.0) / total for name in names})
    return marks, table


def mixture_counts(num_samples: int, block: int, waypoints: Waypoints, smooth: bool = False) -> list[dict]:
    """
    Return how many samples of each domain every block of `block` samples holds.

    Shares are rounded on the running totals by [`apportion`]: after every block each domain has got what it is owed,
    rounded down or up, no count is negative, and each block is full. A domain whose share is 0 gets nothing. The share
    of a block is that of its first sample. Weights count as the decimal numbers that they are printed as: 0.05 is
    1/20.

    Args:
        num_samples (`int`): Samples of the run.
        block (`int`): Such as the global batch size.
        waypoints, smooth: See [`mixture_at`].

    Raises:
        ValueError: an argument out of range.

    Example:
    ```python
    >>> mixture_counts(12, 4, [(0.0, {"old": 1.0, "new": 5.0})])
    [{'old': 1, 'new': 3}, {'old': 0, 'new': 4}, {'old': 1, 'new': 3}]
    ```
    """
    check_count("num_samples", num_samples)
    check_count("block", block)
    names = list(_check_waypoints(waypoints)[1][0])
    starts = range(0, num_samples, block)
    sizes = [min(block, num_samples - first) for first in starts]
    shares = _whole_shares(waypoints, num_samples, starts, smooth)
    return [dict(zip(names, counts, strict=True)) for counts in apportion(sizes, shares)]


def _whole_shares(waypoints: Waypoints, num_samples: int, starts: Sequence[int], smooth: bool) -> list[list[int]]:
    """Return the shares of [`mixture_at`] at each of `starts` as whole numbers, all rows with the same sum."""
    names = list(dict.fromkeys(name for _, weights in waypoints for name in weights))
    marks = [_as_printed(mark) for mark, _ in waypoints]
    table = [[_as_printed(weights.get(name, 0)) for name in names] for _, weights in waypoints]
    table = [[weight / sum(weights) for weight in weights] for weights in table]
    # Between two way-points a share is `level + slope * first sample`.
    lines: list[list[tuple[Fraction, Fraction]]] = []
    for index, shares in enumerate(table):
        later = min(index + 1, len(table) - 1) if smooth else index
        run = (marks[later] - marks[index] or 1) * num_samples
        slopes = [(end - share) / run for share, end in zip(shares, table[later], strict=True)]
        lines.append(
            [(s - slope * marks[index] * num_samples, slope) for s, slope in zip(shares, slopes, strict=True)]
        )
    scale = math.lcm(*(number.denominator for line in lines for pair in line for number in pair))
    whole = [[(int(level * scale), int(slope * scale)) for level, slope in line] for line in lines]
    rows = []
    for first in starts:
        # A switch is where `mixture_at` has it, in floats; on a line both sides of a way-point agree.
        done = Fraction(first, num_samples) if smooth else first / num_samples
        last = max(i for i, mark in enumerate(marks) if (mark if smooth else float(mark)) <= done)
        rows.append([level + slope * first for level, slope in whole[last]])
    return rows


def _as_printed(number: float) -> Fraction:
    return Fraction(number) if isinstance(number, int) else Fraction(repr(float(number)))


def mixture_order(
    domains: Sequence[Hashable],
    waypoints: Waypoints,
    num_samples: int,
    *,
    block: int,
    smooth: bool = False,
    in_order: bool = False,
    seed: int = 0,
) -> Tensor:
    """
    Return an order whose every block has the composition of [`mixture_counts`].

    Within a domain rows come in fresh permutations, one after another, so after every block the rows of a
    domain have been served equally often, or differ by one.

    Args:
        domains (`Sequence[Hashable]`): Domain of each row.
        waypoints, num_samples, block, smooth: See [`mixture_counts`].
        in_order (`bool`, *optional*, defaults to `False`): Rows of a domain in dataset order instead, over and over.
        seed (`int`, *optional*, defaults to 0): Seed of the permutations and of the places inside a block.

    Returns:
        `torch.Tensor`: Row numbers, shape `(num_samples,)`.

    Raises:
        ValueError: a domain with weight but without rows, or an argument out of range.

    Example:
    ```python
    >>> order = mixture_order(["old", "old", "new", "new"], [(0.0, {"old": 1, "new": 1})], 4, block=2)
    >>> sorted(order[:2].tolist())[0] < 2 <= sorted(order[:2].tolist())[1], sorted(order.tolist())
    (True, [0, 1, 2, 3])
    ```
    """
    members: dict[Hashable, list[int]] = {}
    for row, name in enumerate(as_labels(domains)):
        members.setdefault(name, []).append(row)
    blocks = mixture_counts(num_samples, block, waypoints, smooth)
    streams: dict[Hashable, list[int]] = {}
    for place, name in enumerate(blocks[0]):
        need = sum(counts[name] for counts in blocks)
        rows = members.get(name, [])
        if need and not rows:
            raise ValueError(f"domain {name!r} has a weight but no row. Known domains: {sorted(map(str, members))}.")
        generator = seeded(seed, place, 1)
        index = torch.tensor(rows, dtype=torch.int64)
        passes = -(-need // len(rows)) if rows else 0
        parts = [index if in_order else index[torch.randperm(len(rows), generator=generator)] for _ in range(passes)]
        streams[name] = torch.cat(parts).tolist() if parts else []
    taken = dict.fromkeys(streams, 0)
    generator, order = seeded(seed), []
    for counts in blocks:
        here: list[int] = []
        for name, count in counts.items():
            here += streams[name][taken[name] : taken[name] + count]
            taken[name] += count
        order.append(torch.tensor(here)[torch.randperm(len(here), generator=generator)])
    return torch.cat(order)
