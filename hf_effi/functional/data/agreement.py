"""Filters of answers that nobody has labelled: agreement of several models, and length."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from ._checks import check_count, check_number


def majority_answers(
    answers: Sequence[Sequence[Hashable | None]], min_agreement: float = 0.5
) -> list[Hashable | None]:
    """
    Return the most frequent answer of each problem, or `None` where too few voters gave it.

    An answer wins with `votes / num_voters >= min_agreement` and more votes than any other. `None` is a vote for
    nothing.

    Args:
        answers (`Sequence[Sequence]`): Answers of each voter, shape `(num_voters, num_problems)`.
        min_agreement (`float`, *optional*, defaults to 0.5): In `(0, 1]`. The paper: 0.5 to 0.7 of 5 voters.

    Raises:
        ValueError: no voter, voters with different numbers of answers, or a share out of range.

    Example:
    ```python
    >>> majority_answers([["a", "b", None], ["a", "c", None], ["b", "d", "e"]], min_agreement=0.6)
    ['a', None, None]
    ```
    """
    check_number("min_agreement", min_agreement, 0, 1, open_low=True)
    sizes = {len(voter) for voter in answers}
    if len(sizes) != 1:
        raise ValueError(f"Voters gave {sorted(sizes)} answers. Ask at least one voter, and each the same problems.")
    winners: list[Hashable | None] = []
    for votes in zip(*answers, strict=True):
        first, *rest = Counter(vote for vote in votes if vote is not None).most_common(2) or [(None, 0)]
        enough = first[1] >= min_agreement * len(answers) - 1e-9
        winners.append(first[0] if enough and all(first[1] > other[1] for other in rest) else None)
    return winners


def keep_by_length(lengths: Tensor | Sequence[int], slack: int = 1, quantile: float = 1.0) -> Tensor:
    """
    Return the mask `length >= longest - slack`: an answer much shorter than the others of its level lost a part.

    `longest` is the maximum, as in the paper, where one run-on answer drops all right ones; a `quantile` below 1
    passes over so many of the longest.

    Args:
        lengths (`torch.Tensor` or `Sequence[int]`): Of the answers of one level, shape `(num_answers,)`.
        slack (`int`, *optional*, defaults to 1): At least 0. The paper: 1 or 2.
        quantile (`float`, *optional*, defaults to 1.0): Quantile of the lengths that counts as `longest`, in `(0, 1]`.

    Raises:
        ValueError: an argument out of range.

    Example:
    ```python
    >>> keep_by_length([7, 8, 5]).tolist()
    [True, True, False]
    >>> keep_by_length([7, 7, 7, 30], quantile=0.75).tolist()
    [True, True, True, True]
    ```
    """
    check_count("slack", slack, 0)
    check_number("quantile", quantile, 0, 1, open_low=True)
    values = torch.as_tensor(lengths)
    if not values.numel():
        return torch.empty(0, dtype=torch.bool)
    longest = values.sort().values[math.ceil(quantile * values.numel() - 1e-9) - 1]
    return values >= longest - slack
