"""Which rows of a batch that is being generated need a forward: equal prompts once, and finished rows not for long."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

#: Copying the cached keys and values of a row, in forwards of one token of that row. A forward with a dynamic cache
#: copies them as well, beside its matrix products, so that it is below 1; a generation takes as long at 0.1 as at 1.
COPY_COST = 0.25


def equal_rows(columns: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """
    Return the first row of each set of equal rows, and the set of each row.

    Formula: `of[i] = of[j]` exactly where all columns of row `i` equal those of row `j`, and `first[of[i]] <= i` is
    the first such row. Sets are in the order of their first rows. NaN equals nothing.

    Args:
        columns (`Iterable[Tensor]`): One or more tensors `(rows, ...)` of numbers below 2^53, on any device.

    Returns:
        `tuple[Tensor, Tensor]`: `first` of shape `(sets,)` and `of` of shape `(rows,)`, both int64 on the CPU.

    Raises:
        ValueError: no tensor is given.

    Example:
    ```python
    >>> prompts = torch.tensor([[7, 1], [7, 2], [7, 1], [5, 5]])
    >>> first, of = equal_rows([prompts])
    >>> first.tolist(), of.tolist()
    ([0, 1, 3], [0, 1, 0, 2])
    ```
    """
    flat = [column.detach().cpu().double().reshape(len(column), -1) for column in columns]
    if not flat:
        raise ValueError("equal_rows needs at least one tensor of rows.")
    together = torch.cat(flat, dim=1)
    sets, of = torch.unique(together, dim=0, return_inverse=True)
    rows = torch.arange(len(together))
    first = torch.full((len(sets),), len(together)).scatter_reduce(0, of, rows, "amin")
    order = first.argsort()
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    return first[order], place[of]


def compaction_pays(live: int, held: int, wasted: int, copy_cost: float = COPY_COST) -> bool:
    """
    Say whether finished rows should leave the batch before the next token.

    Formula: `live < held` and `wasted >= copy_cost * live`. This is the rule of renting until the rent equals the
    price: lengths need not be known, and forwards of finished rows never cost more than the copies that avoid them,
    plus those of one token.

    Args:
        live (`int`): Rows that are not finished, which a compaction copies.
        held (`int`): Rows of the batch as it is.
        wasted (`int`): Forwards of one token of finished rows since the last compaction, the next token included.
        copy_cost (`float`, *optional*, defaults to 0.25): Of one row, in such forwards; 0 compacts whenever a row is
            finished.

    Raises:
        ValueError: a negative `copy_cost`, or one that is no number.

    Example:
    ```python
    >>> compaction_pays(live=8, held=16, wasted=8), compaction_pays(live=15, held=16, wasted=1)
    (True, False)
    >>> compaction_pays(live=15, held=16, wasted=8)  # after some more tokens
    True
    ```
    """
    if not copy_cost >= 0 or math.isinf(copy_cost):
        raise ValueError(f"copy_cost must be a number >= 0, got {copy_cost}.")
    return 0 < live < held and wasted >= copy_cost * live
