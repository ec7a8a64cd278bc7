"""Whether draws have the distribution that they should: chi-square with a limit that chance passes once in 10 000."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping

#: of the normal distribution: 1 in 10 000 lies above
_Z = 3.719


def chi_square(draws: Iterable[Hashable], expected: Mapping[Hashable, float]) -> tuple[float, float]:
    """
    Return Pearson's statistic and its limit (Wilson and Hilferty's approximation).

    Values that are expected fewer than 5 times are one cell; one that cannot come makes the statistic infinite.

    Args:
        draws (`Iterable`): What was drawn, independently.
        expected (`Mapping`): Probability of each value.
    """
    counts: dict[Hashable, int] = {}
    for value in draws:
        counts[value] = counts.get(value, 0) + 1
    total = sum(counts.values())
    if any(expected.get(value, 0.0) <= 0 for value in counts):
        return math.inf, 0.0
    cells = [(counts.get(value, 0), total * p) for value, p in expected.items() if total * p >= 5]
    rare = [(counts.get(value, 0), total * p) for value, p in expected.items() if 0 < total * p < 5]
    if sum(p for _, p in rare) > 0:
        cells.append((sum(count for count, _ in rare), sum(p for _, p in rare)))
    statistic = sum((count - p) ** 2 / p for count, p in cells)
    free = len(cells) - 1
    limit = free * (1 - 2 / (9 * free) + _Z * math.sqrt(2 / (9 * free))) ** 3
    return statistic, limit
