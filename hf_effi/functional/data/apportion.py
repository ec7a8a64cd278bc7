"""Whole numbers for shares that change over time: every running total is the ideal one, rounded down or up."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence

#: A place in the flow below: (domain, block), or (`_BLOCK`, block) for the block itself.
Node = tuple[int, int]
_BLOCK = -1


def apportion(sizes: Sequence[int], shares: Sequence[Sequence[int]]) -> list[list[int]]:
    """
    Return how many places of each block each domain gets.

    With `owed_i(b) = sum over the blocks up to b of size * share_i / sum(share)`, the places that domain `i` has got
    after block `b` are `floor(owed_i(b))` or `ceil(owed_i(b))`: always within one of what it is owed. Every block is
    full, no count is negative, and a domain gets nothing in a block where its share is 0.

    Such counts always exist: places are a flow from blocks to domains, whose running totals are bounded by whole
    numbers, and the fractional shares are one such flow. Each block is filled by earliest deadline (the block by which
    a running total must have grown; among equals the largest remainder). That is optimal while no share is 0 in
    between; where one is, earlier blocks exchange places along an augmenting path.

    Args:
        sizes (`Sequence[int]`): Places of each block, at least 0.
        shares (`Sequence[Sequence[int]]`): Of each block, one whole number per domain, at least 0. All blocks have the
            same positive sum.

    Raises:
        ValueError: a negative size or share, or sums that differ.

    Example:
    ```python
    >>> apportion([4, 4, 4], [[1, 5]] * 3)
    [[1, 3], [0, 4], [1, 3]]
    >>> apportion([1] * 5, [[2, 2, 1]] * 5)
    [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0], [0, 1, 0]]
    ```
    """
    if any(size < 0 for size in sizes) or any(share < 0 for row in shares for share in row):
        raise ValueError("apportion() was given a negative size or share. All must be whole numbers of at least 0.")
    sums = {sum(row) for row in shares}
    if len(sizes) != len(shares) or len(sums) > 1 or 0 in sums:
        raise ValueError(
            f"apportion() was given {len(sizes)} sizes and {len(shares)} rows of shares with the sums "
            f"{sorted(sums)[:3]}. Give one row per block, all with the same positive sum."
        )
    plan = _Plan(sizes, shares)
    for block in range(len(sizes)):
        plan.fill(block)
    return plan.counts()


class _Plan:
    """
    Running totals (`served`) between their bounds (`lower`, `upper`), one list per domain, filled block by block.
    """

    def __init__(self, sizes: Sequence[int], shares: Sequence[Sequence[int]]) -> None:
        self.sizes, self.shares = sizes, shares
        self.domains = range(len(shares[0]) if shares else 0)
        scale = sum(shares[0]) if shares else 1
        self.lower: list[list[int]] = [[] for _ in self.domains]
        self.upper: list[list[int]] = [[] for _ in self.domains]
        self.part: list[list[float]] = [[] for _ in self.domains]
        self.served: list[list[int]] = [[] for _ in self.domains]
        for domain in self.domains:
            owed = 0
            for size, row in zip(sizes, shares, strict=True):
                owed += size * row[domain]
                whole, rest = divmod(owed, scale)
                self.lower[domain].append(whole)
                self.upper[domain].append(whole + (rest > 0))
                self.part[domain].append(rest / scale)

    def fill(self, block: int) -> None:
        """Give the places of the next block away."""
        room = self.sizes[block]
        for domain in self.domains:
            before = self.served[domain][-1] if block else 0
            due = max(self.lower[domain][block] - before, 0) if self.shares[block][domain] else 0
            self.served[domain].append(before + min(due, room))
            room -= min(due, room)
        for domain in sorted(self._open(block), key=lambda domain: self._urgency(domain, block))[:room]:
            self.served[domain][block] += 1
            room -= 1
        for _ in range(room):
            self._exchange([(_BLOCK, block)], set(self._below(self.upper, block)), block)
        while behind := self._below(self.lower, block):
            ahead = [(d, block) for d in self.domains if self.served[d][block] > self.lower[d][block]]
            for domain, _ in self._exchange(ahead, set(behind), block)[:1]:
                self.served[domain][block] -= 1

    def _open(self, block: int) -> list[int]:
        return [domain for domain, _ in self._below(self.upper, block) if self.shares[block][domain]]

    def _below(self, bound: list[list[int]], block: int) -> list[Node]:
        return [(domain, block) for domain in self.domains if self.served[domain][block] < bound[domain][block]]

    def _urgency(self, domain: int, block: int) -> tuple[int, float, int]:
        """
        The block by which the domain must have one more; then the largest remainder; then the order of the domains.
        """
        served = self.served[domain][block]
        remainder = self.lower[domain][block] - served + self.part[domain][block]
        return bisect_left(self.lower[domain], served + 1), -remainder, domain

    def _exchange(self, starts: list[Node], goals: set[Node], block: int) -> list[Node]:
        """Move one place along a shortest path from a start to a goal, where it stays; return the path."""
        came: dict[Node, Node | None] = dict.fromkeys(starts)
        queue = deque(starts)
        while queue[0] not in goals:
            node = queue.popleft()
            for following in self._next(node, block):
                if following not in came:
                    came[following] = node
                    queue.append(following)
        path, before = [queue[0]], came[queue[0]]
        while before is not None:
            path.append(before)
            before = came[before]
        path.reverse()
        for (domain, first), (other, second) in zip(path, path[1:], strict=False):
            if domain == other:
                self.served[domain][min(first, second)] += 1 if second > first else -1
        self.served[path[-1][0]][block] += 1
        return path

    def _next(self, node: Node, block: int) -> list[Node]:
        """
        Where one place can go: on to a later block, back to an earlier one, or out of its block for another domain.
        """
        domain, at = node
        if domain == _BLOCK:
            return [(other, at) for other in self.domains if self.shares[at][other]]
        lower, upper, served = self.lower[domain], self.upper[domain], self.served[domain]
        found = []
        if at < block and served[at] < upper[at]:
            found.append((domain, at + 1))
        if at and served[at - 1] > lower[at - 1]:
            found.append((domain, at - 1))
        if served[at] > (served[at - 1] if at else 0):
            found.append((_BLOCK, at))
        return found

    def counts(self) -> list[list[int]]:
        """Return the places of each block and domain."""
        return [
            [self.served[d][b] - (self.served[d][b - 1] if b else 0) for d in self.domains]
            for b in range(len(self.sizes))
        ]
