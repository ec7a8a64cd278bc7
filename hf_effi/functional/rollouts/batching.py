"""Bookkeeping of ragged rollout batches: join, pick, trim, bucket, deal. Nothing here changes a gradient."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

#: Keys of a rollout batch that are padded on the prompt side (left); every other 2-D key is on the completion side.
PROMPT_KEYS = ("prompt_ids", "prompt_mask", "prompt_token_type_ids", "prompt_mm_token_type_ids")

#: Above this the plan's quadratic table costs more than the padding it saves.
_EXACT_PLAN_ROWS = 512

Rows = dict[str, Any]


def take_rows(batch: Rows, rows: Sequence[int] | Tensor) -> Rows:
    """
    Pick rows of every per-row entry; scalars and `None` pass through.

    Args:
        batch (`dict`): Tensors of shape `(rows, ...)`, lists of `rows` entries, 0-dim tensors or `None`.
        rows (`Sequence[int]` or `torch.Tensor`): Row numbers, in the order wanted.

    Example:
    ```python
    >>> batch = {"advantages": torch.tensor([1.0, 2.0, 3.0]), "num_items_in_batch": torch.tensor(9)}
    >>> take_rows(batch, [2, 0])["advantages"].tolist()
    [3.0, 1.0]
    ```
    """
    index = torch.as_tensor(rows, dtype=torch.long)

    def pick(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim > 0:
            return value[index.to(value.device)]
        if isinstance(value, list):
            return [value[i] for i in index.tolist()]
        return value

    return {key: pick(value) for key, value in batch.items()}


def concat_rows(batches: Sequence[Rows], pad_token_id: int, ratio_padding: float | None = 1.0) -> Rows:
    """
    Join batches along the rows, padding prompts on the left and completions on the right to the widest.

    Args:
        batches (`Sequence[dict]`): Batches with the same keys.
        pad_token_id (`int`): Fills `prompt_ids` and `completion_ids`; masks and log-probs are filled with 0,
            `tool_mask` with 1 as TRL does.
        ratio_padding (`float` or `None`, *optional*, defaults to `1.0`): Fills an `importance_sampling_ratio` per
            token. TRL's padding has a difference of log-probs of 0, hence a ratio of 1 before it is clipped; VESPO
            sums its logarithm over all columns. `None` where the ratio is one number per row, shape `(rows, 1)`, which
            the loss broadcasts and nothing may pad. The shape cannot tell: a ratio per token has it too where every
            completion is one token long.

    Example:
    ```python
    >>> a = {"completion_ids": torch.tensor([[5, 6]]), "completion_mask": torch.tensor([[1, 1]])}
    >>> b = {"completion_ids": torch.tensor([[7]]), "completion_mask": torch.tensor([[1]])}
    >>> concat_rows([a, b], pad_token_id=0)["completion_ids"].tolist()
    [[5, 6], [7, 0]]
    >>> a = {"importance_sampling_ratio": torch.full((1, 2), 0.5)}
    >>> b = {"importance_sampling_ratio": torch.tensor([[0.25]])}
    >>> concat_rows([a, b], pad_token_id=0)["importance_sampling_ratio"].tolist()
    [[0.5, 0.5], [0.25, 1.0]]
    ```
    """
    if len(batches) == 1:
        return dict(batches[0])
    fills: dict[str, float | None] = {"prompt_ids": pad_token_id, "completion_ids": pad_token_id, "tool_mask": 1}
    fills["importance_sampling_ratio"] = ratio_padding
    joined: Rows = {}
    for key, first in batches[0].items():
        values = [batch[key] for batch in batches]
        if isinstance(first, list):
            joined[key] = [entry for value in values for entry in value]
        elif isinstance(first, Tensor) and (first.ndim == 1 or fills.get(key, 0) is None):
            joined[key] = torch.cat(values)
        elif isinstance(first, Tensor) and first.ndim == 2:
            width = max(value.size(1) for value in values)
            gaps = [(width - v.size(1), 0) if key in PROMPT_KEYS else (0, width - v.size(1)) for v in values]
            padded = [F.pad(v, gap, value=fills.get(key, 0)) for v, gap in zip(values, gaps, strict=True)]
            joined[key] = torch.cat(padded)
        else:
            joined[key] = first
    return joined


def trim_rows(batch: Rows) -> Rows:
    """
    Cut the columns that are padding in every row, keeping at least one on each side.

    Widths come from the masks. A row whose completion mask was cleared because it was truncated takes no part in the
    loss, and its tokens are cut where the other rows end: what is left of it is its prompt, as far as a forward sees
    it.

    Example:
    ```python
    >>> batch = {
    ...     "prompt_ids": torch.tensor([[0, 0, 4], [0, 5, 6]]), "prompt_mask": torch.tensor([[0, 0, 1], [0, 1, 1]]),
    ...     "completion_ids": torch.tensor([[7, 0, 0], [8, 9, 0]]),
    ...     "completion_mask": torch.tensor([[1, 0, 0], [1, 1, 0]]),
    ... }
    >>> {key: tuple(value.shape) for key, value in trim_rows(batch).items()}
    {'prompt_ids': (2, 2), 'prompt_mask': (2, 2), 'completion_ids': (2, 2), 'completion_mask': (2, 2)}
    ```
    """
    if batch["prompt_mask"].size(0) == 0:
        return dict(batch)
    prompt = max(1, int(batch["prompt_mask"].sum(1).max()))
    completion = max(1, int(batch["completion_mask"].sum(1).max()))
    full = batch["completion_mask"].size(1)

    def cut(key: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim != 2:
            return value
        if key in PROMPT_KEYS:
            return value[:, -prompt:]
        return value[:, :completion] if value.size(1) == full else value

    return {key: cut(key, value) for key, value in batch.items()}


@dataclass(frozen=True)
class Bucket:
    """Rows forwarded together: their numbers, and the width they are padded to (in tokens)."""

    rows: tuple[int, ...]
    width: int

    @property
    def tokens(self) -> int:
        """Tokens this bucket forwards, padding included."""
        return len(self.rows) * self.width


def plan_buckets(lengths: Sequence[int], num_buckets: int, max_rows: int | None = None) -> list[Bucket]:
    """
    Split rows into `num_buckets` buckets so that the padded tokens `sum_b rows_b * max_length_b` are fewest.

    Rows sorted by length, then an exact dynamic programme over the cut points (up to 512 rows; more are cut into equal
    counts). Equal lengths keep their row order, so the plan is the same on every backend.

    Args:
        lengths (`Sequence[int]`): Tokens of each row.
        num_buckets (`int`): Buckets wanted, >= 1; each gets at least one row, so at most `len(lengths)` come back.
        max_rows (`int`, *optional*): Most rows of one bucket (bounds memory); adds buckets where needed.

    Returns:
        `list[Bucket]`: by rising width.

    Example:
    ```python
    >>> [(b.rows, b.width) for b in plan_buckets([9, 2, 3, 2], num_buckets=2)]
    [((1, 3, 2), 3), ((0,), 9)]
    >>> sum(b.tokens for b in plan_buckets([9, 2, 3, 2], 2)), 4 * 9
    (18, 36)
    ```
    """
    rows = len(lengths)
    if rows == 0:
        return []
    limit = rows if max_rows is None else max(1, min(rows, max_rows))
    count = min(rows, max(num_buckets, -(-rows // limit)))
    ids = sorted(range(rows), key=lambda row: (lengths[row], row))
    if rows > _EXACT_PLAN_ROWS:
        bounds = [rows * cut // count for cut in range(count + 1)]
    else:
        bounds = _cheapest_cuts([lengths[row] for row in ids], count, limit)
    return [
        Bucket(rows=tuple(ids[a:b]), width=int(lengths[ids[b - 1]]))
        for a, b in zip(bounds[:-1], bounds[1:], strict=True)
    ]


def _cheapest_cuts(ordered_lengths: list[int], count: int, limit: int) -> list[int]:
    rows = len(ordered_lengths)
    ordered = torch.tensor(ordered_lengths, dtype=torch.float64)
    start, end = torch.arange(rows + 1).unsqueeze(0), torch.arange(rows + 1).unsqueeze(1)
    size = end - start
    # cost[end, start]: tokens of a bucket that holds the sorted rows start..end-1.
    cost = size * torch.cat([ordered.new_zeros(1), ordered]).unsqueeze(1)
    cost = cost.masked_fill((size < 1) | (size > limit), torch.inf)
    best = cost[:, 0]
    choices = []
    for _ in range(count - 1):
        best, choice = (cost + best.unsqueeze(0)).min(dim=1)
        choices.append(choice)
    cuts = [rows]
    for choice in reversed(choices):
        cuts.append(int(choice[cuts[-1]]))
    return [0, *reversed(cuts)]


def contiguous_rows(ids: Tensor, mask: Tensor, rows: Sequence[int], width: int, pad_token_id: int) -> Rows:
    """
    Move the real tokens of some rows to the left edge: `[pad.. prompt completion pad..]` becomes
    `[prompt completion pad..]`.

    Args:
        ids (`torch.Tensor`): Tokens, shape `(rows, columns)`; the real ones of a row are contiguous.
        mask (`torch.Tensor`): 1 on real tokens, same shape.
        rows (`Sequence[int]`): Which rows.
        width (`int`): Columns of the result, at least the longest of those rows.
        pad_token_id (`int`): Fills the rest.

    Returns:
        `dict`: `input_ids` and `attention_mask`, both `(len(rows), width)`.

    Example:
    ```python
    >>> ids, mask = torch.tensor([[0, 4, 5, 0]]), torch.tensor([[0, 1, 1, 0]])
    >>> contiguous_rows(ids, mask, [0], 3, pad_token_id=9)["input_ids"].tolist()
    [[4, 5, 9]]
    ```
    """
    index = torch.as_tensor(rows, dtype=torch.long, device=ids.device)
    picked, picked_mask = ids[index], mask[index]
    first = picked_mask.argmax(dim=1, keepdim=True)
    columns = torch.arange(width, device=ids.device).unsqueeze(0)
    real = columns < picked_mask.sum(1, keepdim=True)
    source = (first + columns).clamp(max=ids.size(1) - 1)
    return {
        "input_ids": picked.gather(1, source).masked_fill(~real, pad_token_id),
        "attention_mask": real.to(mask.dtype),
    }


def scatter_completion(values: Tensor, offsets: Tensor, lengths: Tensor, columns: int) -> Tensor:
    """
    Put per-token values of contiguous rows back into the right-padded completion layout.

    Args:
        values (`torch.Tensor`): Shape `(rows, window)`.
        offsets (`torch.Tensor`): Where each row's completion starts in its window, shape `(rows,)`.
        lengths (`torch.Tensor`): Completion tokens of each row, shape `(rows,)`.
        columns (`int`): Width of the completion layout.

    Returns:
        `torch.Tensor`: Shape `(rows, columns)`, 0 on padding.

    Example:
    ```python
    >>> values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    >>> scatter_completion(values, torch.tensor([0, 2]), torch.tensor([2, 1]), columns=4).tolist()
    [[1.0, 2.0, 0.0, 0.0], [6.0, 0.0, 0.0, 0.0]]
    ```
    """
    steps = torch.arange(columns, device=values.device).unsqueeze(0)
    source = (offsets.unsqueeze(1) + steps).clamp(max=values.size(1) - 1)
    return torch.where(steps < lengths.unsqueeze(1), values.gather(1, source), values.new_zeros(()))


def deal_rows(
    costs: Sequence[float], num_hands: int, groups: Sequence[Hashable] | None = None, shared: Sequence[float] = ()
) -> list[list[int]]:
    """
    Deal rows to ranks: equal row counts, costs as even as a greedy pass makes them.

    Longest first, each to the rank with the least cost so far that still has room; ties go to the lower rank, and
    among equal costs to the earlier row. With `groups` whole groups are dealt so; one that no rank has room for any
    more is dealt row by row.

    Args:
        costs (`Sequence[float]`): Cost of each row, e.g. its tokens.
        num_hands (`int`): Ranks; must divide the number of rows.
        groups (`Sequence[Hashable]`, *optional*): What is equal for rows that stay together.
        shared (`Sequence[float]`, *optional*): What each row's group costs once beside its rows, e.g. its prompt.

    Returns:
        `list[list[int]]`: row numbers of each rank, ascending.

    Raises:
        ValueError: the rows cannot be dealt evenly.

    Example:
    ```python
    >>> deal_rows([9, 1, 8, 2], 2)
    [[0, 1], [2, 3]]
    >>> deal_rows([9, 1, 8, 2], 2, groups="aabb")
    [[0, 1], [2, 3]]
    >>> deal_rows([5, 5, 5, 1, 1, 1], 2, groups="aaabbb"), deal_rows([5, 5, 5, 1, 1, 1], 2)
    ([[0, 1, 2], [3, 4, 5]], [[0, 2, 5], [1, 3, 4]])
    ```
    """
    rows = len(costs)
    if rows % num_hands:
        raise ValueError(f"{rows} rows cannot be dealt evenly to {num_hands} ranks.")
    room = rows // num_hands
    hands: list[list[int]] = [[] for _ in range(num_hands)]
    load = [0.0] * num_hands
    once = [0.0] * rows if not shared else shared
    members: dict[Hashable, list[int]] = {}
    for row in range(rows):
        members.setdefault(row if groups is None else groups[row], []).append(row)

    def cost(unit: list[int]) -> float:
        return sum(costs[row] for row in unit) + once[unit[0]]

    def by_cost(units: Iterable[list[int]]) -> list[list[int]]:
        return sorted(units, key=lambda unit: (-cost(unit), unit[0]))

    def give(unit: list[int]) -> bool:
        fitting = [rank for rank in range(num_hands) if len(hands[rank]) + len(unit) <= room]
        if not fitting:
            return False
        rank = min(fitting, key=lambda rank: (load[rank], rank))
        hands[rank] += unit
        load[rank] += cost(unit)
        return True

    left = [unit for unit in by_cost(members.values()) if not give(unit)]
    for single in by_cost([row] for unit in left for row in unit):
        give(single)
    return [sorted(hand) for hand in hands]


def even_repeats(rows: int, chunks: int, most: int) -> tuple[int, int]:
    """
    How to fill `chunks` micro-batches of equal size with fewer rows than there are micro-batches.

    A mean over micro-batches stays the mean over the rows only if each row comes equally often.

    Args:
        rows (`int`): Rows at hand, in [1, chunks).
        chunks (`int`): Micro-batches, times the ranks.
        most (`int`): Most rows of one micro-batch, >= 1.

    Returns:
        `tuple[int, int]`: how many of the rows to take (as many as can be), and how often each.

    Example:
    ```python
    >>> even_repeats(4, chunks=8, most=1), even_repeats(3, chunks=8, most=1), even_repeats(3, chunks=8, most=4)
    ((4, 2), (2, 4), (3, 8))
    ```
    """
    for kept in range(rows, 0, -1):
        size = kept // math.gcd(chunks, kept)
        if size <= most:
            return kept, chunks * size // kept
    raise ValueError(f"rows and most must be at least 1, got {rows} and {most}.")
