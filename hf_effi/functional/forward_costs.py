"""What a forward and backward of some rows costs, padded, packed, or with the prompts that they share once."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .rollouts import plan_buckets

#: the layouts of a forward
LAYOUTS = ("trim", "pack", "share")


class RowLengths(NamedTuple):
    """
    Lengths of one row.

    Args:
        prompt (`Hashable`): What is equal for rows with the same prompt.
        prompt_tokens, completion_tokens (`int`): Its tokens.
    """

    prompt: Hashable
    prompt_tokens: int
    completion_tokens: int

    @property
    def tokens(self) -> int:
        """Prompt and completion."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class ForwardCosts:
    """
    The cost of rows in three layouts, in tokens that run through the linear layers.

    With `t` tokens and `a` pairs of a query and a key that attention computes in `s` calls: `t + per_pair a +
    per_call s`. A padded bucket of `n` rows of width `w` has `t = n w`, `a = n w^2` and one call; a packed row of
    length `l` has `t = l`, `a = l^2 / 2` and a call of its own; of rows that share a prompt of `p` tokens, the prompt
    has `p`, `p^2 / 2` and one call, and a completion of `c` tokens `c + 1`, `(c + 1)^2 / 2 + (c + 1) p` and one call,
    with one more call for all completions of a prompt.

    Args:
        per_pair (`float`): Cost of a pair. With `4 h` operations a pair and `2 n` a token, for width `h` and `n`
            weights of a layer, `2 h / n`.
        per_call (`float`): Cost of a call of attention: that of its overhead. 0 where one kernel takes all segments.

    Example:
    ```python
    >>> costs = ForwardCosts(per_pair=0.0, per_call=0.0)
    >>> rows = [RowLengths("a", 9, 1), RowLengths("a", 9, 3), RowLengths("b", 4, 4)]
    >>> costs.padded(rows, 1), costs.packed(rows), costs.shared(rows)
    (36.0, 30.0, 22.0)
    ```
    """

    per_pair: float
    per_call: float

    def padded(self, rows: Sequence[RowLengths], buckets: int) -> float:
        """Return the cost of rows in this many buckets, each padded to its longest."""
        plan = plan_buckets([row.tokens for row in rows], buckets)
        return float(sum(b.tokens * (1 + self.per_pair * b.width) + self.per_call for b in plan))

    def packed(self, rows: Sequence[RowLengths]) -> float:
        """Return the cost of rows end to end."""
        return float(sum(self._segment(row.tokens) for row in rows))

    def shared(self, rows: Sequence[RowLengths]) -> float:
        """Return the cost of rows end to end in which each prompt comes once."""
        groups: dict[Hashable, list[RowLengths]] = {}
        for row in rows:
            groups.setdefault(row.prompt, []).append(row)
        total = 0.0
        for group in groups.values():
            prefix = group[0].prompt_tokens - 1  # its last token is at the head of each branch
            if len(group) == 1 or prefix < 1:
                total += self.packed(group)
                continue
            branches = [row.completion_tokens + 1 for row in group]
            total += self._segment(prefix) + sum(map(self._segment, branches))
            total += self.per_pair * prefix * sum(branches) + self.per_call
        return total

    def of(self, layout: str, rows: Sequence[RowLengths], buckets: int) -> float:
        """Return the cost of rows in one of `LAYOUTS`; `trim` pads them in so many buckets."""
        if layout == "trim":
            return self.padded(rows, buckets)
        return self.packed(rows) if layout == "pack" else self.shared(rows)

    def _segment(self, tokens: int) -> float:
        return tokens + self.per_pair * tokens**2 / 2 + self.per_call


def bucket_count(rows: int, wanted: int = 0, max_rows: int | None = None, trims: bool = True) -> int:
    """
    Return in how many buckets padded rows are forwarded.

    Args:
        rows (`int`): From 0.
        wanted (`int`, *optional*, defaults to `0`): Length buckets; 0 takes `rows // 8`, between 1 and 8.
        max_rows (`int`, *optional*): Most rows of a forward.
        trims (`bool`, *optional*, defaults to `True`): Whether buckets are padded to their own longest row; where not,
            only `max_rows` splits them.

    Example:
    ```python
    >>> bucket_count(32), bucket_count(32, max_rows=4), bucket_count(32, trims=False)
    (4, 8, 1)

    ```
    """
    count = (wanted or max(1, min(8, rows // 8))) if trims else 1
    return count if max_rows is None else max(count, -(-rows // max_rows))


def grouped_order(rows: Sequence[RowLengths], active: Sequence[bool]) -> list[int]:
    """
    Return row numbers: those without a gradient first, then the rows of one prompt side by side, short groups first.

    Example:
    ```python
    >>> rows = [RowLengths("a", 4, 9), RowLengths("b", 4, 1), RowLengths("a", 4, 2), RowLengths("b", 4, 2)]
    >>> grouped_order(rows, [True, True, True, False])
    [3, 1, 2, 0]
    ```
    """
    totals: dict[Hashable, int] = {}
    for row in rows:
        totals[row.prompt] = totals.get(row.prompt, 0) + row.completion_tokens
    first = {row.prompt: i for i, row in reversed(list(enumerate(rows)))}
    return sorted(
        range(len(rows)),
        key=lambda i: (active[i], totals[rows[i].prompt], first[rows[i].prompt], rows[i].tokens, i),
    )
