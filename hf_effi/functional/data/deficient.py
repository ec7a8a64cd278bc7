"""Rows that a model does badly on, and pairs of its answers to them: the data of iterative reinforced fine-tuning."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from ._checks import as_labels, check_number, clean_scores

_PIECES = re.compile(r"\w+|[^\w\s]")


def deficient_rows(
    losses: Tensor | Sequence[float],
    strata: Sequence[Hashable] | Tensor | None = None,
    ratio: float = 0.3,
    quantile_cap: float = 0.99,
) -> Tensor:
    """
    Return the rows of each stratum on which the loss of the gold answer is highest.

    Of `n` rows of a stratum the `floor((1 - quantile_cap) n)` worst are left out, which are mostly wrong labels, and
    the next `ceil(ratio n)` are taken. iTool, [2501.09766](https://huggingface.co/papers/2501.09766), takes 30 % by
    perplexity, with and without a call of a tool apart; the cap is ours.

    Args:
        losses (`torch.Tensor` or `Sequence[float]`): Loss or perplexity of the gold answer of each row under the
            current policy, shape `(num_rows,)`.
        strata (`Sequence`, *optional*): Label of each row; one stratum if `None`.
        ratio (`float`, *optional*, defaults to 0.3): In (0, 1].
        quantile_cap (`float`, *optional*, defaults to 0.99): In (0, 1]; 1 leaves out nothing.

    Returns:
        `torch.Tensor`: int64 row numbers, ascending.

    Raises:
        ValueError: no row, a NaN, another number of labels, or a setting out of range.

    Example:
    ```python
    >>> deficient_rows([3.0, 1.0, 2.0, 5.0], ["tool", "tool", "none", "none"], ratio=0.5).tolist()
    [0, 3]
    ```
    """
    values = clean_scores(losses, "losses")
    check_number("ratio", ratio, 0.0, 1.0, open_low=True)
    check_number("quantile_cap", quantile_cap, 0.0, 1.0, open_low=True)
    labels = [None] * len(values) if strata is None else list(as_labels(strata))
    if len(labels) != len(values):
        raise ValueError(f"strata has {len(labels)} labels for {len(values)} rows. Give one for each row.")
    members: dict[Hashable, list[int]] = {}
    for row, label in enumerate(labels):
        members.setdefault(label, []).append(row)
    chosen: list[int] = []
    for rows in members.values():
        worst = sorted(rows, key=lambda row: (-float(values[row]), row))
        capped = math.floor((1 - quantile_cap) * len(rows) + 1e-9)
        chosen += worst[capped : capped + math.ceil(ratio * len(rows) - 1e-9)]
    return torch.tensor(sorted(chosen), dtype=torch.int64)


def text_overlap(one: str, two: str) -> float:
    """
    Return the share of words and signs that two texts have in common, in order: twice the matches over all of them.

    Example:
    ```python
    >>> text_overlap("add(1, 2)", "add(1, 3)"), text_overlap("", "")
    (0.8333333333333334, 1.0)
    ```
    """
    pieces = _PIECES.findall(one), _PIECES.findall(two)
    return difflib.SequenceMatcher(None, *pieces, autojunk=False).ratio()


def preference_pairs(
    samples: Sequence[str],
    values: Sequence[float | None],
    min_gap: float = 0.1,
    floor: float = -0.3,
    max_overlap: float = 0.95,
    overlap: Callable[[str, str], float] = text_overlap,
) -> list[tuple[int, int]]:
    """
    Return pairs of answers to one prompt, as (chosen, rejected), that are worth learning the difference of.

    `v_chosen - v_rejected >= min_gap`, `v_chosen >= floor` and `overlap <= max_overlap`. The settings are those of
    iTool's code, [2501.09766](https://huggingface.co/papers/2501.09766), whose values come from a tree search.

    Args:
        samples (`Sequence[str]`): Answers to one prompt.
        values (`Sequence[float]`): Their values, in [-1, 1] in iTool; `None` or NaN where there is none.
        min_gap (`float`, *optional*, defaults to 0.1): At least 0. Equal values make no pair, whatever it is.
        floor (`float`, *optional*, defaults to -0.3): Lowest value of a chosen answer.
        max_overlap (`float`, *optional*, defaults to 0.95): In [0, 1].
        overlap (`Callable`, *optional*): Two texts to a number in [0, 1]; [`text_overlap`] by default, which is ours.

    Returns:
        `list[tuple[int, int]]`: Places in `samples`, by the value of the chosen one, then of the rejected one.

    Raises:
        ValueError: another number of values, or a setting out of range.

    Example:
    ```python
    >>> preference_pairs(["a", "b", "c", "d"], [1.0, 0.95, 0.2, -0.5])
    [(0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    ```
    """
    if len(samples) != len(values):
        raise ValueError(f"{len(values)} values for {len(samples)} samples. Give one for each.")
    check_number("min_gap", min_gap, 0.0)
    check_number("floor", floor, -math.inf)
    check_number("max_overlap", max_overlap, 0.0, 1.0)
    known = {place: value for place, value in enumerate(values) if value is not None and not math.isnan(value)}
    order = sorted(known, key=lambda place: (-known[place], place))
    return [
        (chosen, rejected)
        for place, chosen in enumerate(order)
        for rejected in order[place + 1 :]
        if known[chosen] >= floor
        and known[chosen] > known[rejected]
        and known[chosen] - known[rejected] >= min_gap - 1e-9
        and overlap(samples[chosen], samples[rejected]) <= max_overlap
    ]
