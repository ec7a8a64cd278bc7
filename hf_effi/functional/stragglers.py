"""Which process the others wait for: from the seconds that each one computed in each update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StragglerReport:
    """
    What [`find_straggler`] found. All processes have the same.

    Args:
        ratio (`float`): Mean seconds of the slowest process over the mean of all, at least 1.
        rank (`int`): The slowest process, by its mean.
        persistence (`float`): Share of the updates in which it was the slowest, in `[0, 1]`. By chance it is 1 over
            the number of processes.
        waiting_fraction (`float`): Share of all processes' time that is spent waiting, in `[0, 1)`.
        updates (`int`): How many updates were looked at.
    """

    ratio: float
    rank: int
    persistence: float
    waiting_fraction: float
    updates: int

    def is_straggling(self, ratio: float = 1.15, persistence: float = 0.5) -> bool:
        """
        Return whether one process is slow again and again, and not another one each time.

        Args:
            ratio (`float`, *optional*, defaults to 1.15): Slowest over mean that is passed.
            persistence (`float`, *optional*, defaults to 0.5): Share of the updates that is reached.
        """
        return self.ratio > ratio and self.persistence >= persistence


def find_straggler(seconds: Sequence[Sequence[float]]) -> StragglerReport:
    """
    Find the process that is slowest, how often it is, and what the others lose by it.

    Formula, with `t[r][u]` the seconds that process `r` computes in update `u`: `ratio = max_r mean_u t / mean_ru t`;
    `waiting_fraction = 1 - mean_ru t / mean_u max_r t`, since every update takes as long as its slowest process.

    Args:
        seconds (`Sequence[Sequence[float]]`): Shape `(processes, updates)`, not negative.

    Raises:
        ValueError: no process, no update, rows of different lengths, or a negative time.

    Example:
    ```python
    >>> report = find_straggler([[1.0, 1.0, 1.0], [1.0, 2.0, 2.0]])
    >>> report.rank, round(report.ratio, 3), round(report.persistence, 3), round(report.waiting_fraction, 3)
    (1, 1.25, 0.667, 0.2)
    >>> report.is_straggling()
    True
    ```
    """
    updates = len(seconds[0]) if seconds else 0
    if not updates or any(len(row) != updates for row in seconds):
        raise ValueError(
            f"seconds has rows of {[len(row) for row in seconds]} updates. Give at least one process and one update, "
            "and as many updates for each process."
        )
    if any(not value >= 0 for row in seconds for value in row):
        raise ValueError("seconds holds a time that is negative or no number. Give seconds of a monotonic clock.")
    means = [sum(row) / updates for row in seconds]
    mean, rank = sum(means) / len(means), max(range(len(means)), key=means.__getitem__)
    slowest = [max(row[update] for row in seconds) for update in range(updates)]
    # Where several are equally slow nobody is the slowest one.
    wins = [
        row_max == seconds[rank][update] and sum(row[update] == row_max for row in seconds) == 1
        for update, row_max in enumerate(slowest)
    ]
    longest = sum(slowest) / updates
    return StragglerReport(
        ratio=1.0 if mean == 0 else means[rank] / mean,
        rank=rank,
        persistence=sum(wins) / updates,
        waiting_fraction=0.0 if longest == 0 else 1 - mean / longest,
        updates=updates,
    )
