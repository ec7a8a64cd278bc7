"""Scores of rows from what is known about them, and the rows that a score keeps."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from ._checks import check_count, check_number, clean_scores

#: Log expected loss from a reward model and three UniEval indicators: the later version of the rule.
INSTRUCT_MINING: Mapping[str, float] = MappingProxyType(
    {"intercept": 0.0274, "reward": -0.0078, "understandability": 0.4421, "naturalness": -0.3212, "coherence": -0.1520}
)
#: The first version: reward, length in tokens, and distance to the sixth nearest neighbour.
INSTRUCT_MINING_V1: Mapping[str, float] = MappingProxyType(
    {"intercept": 1.0694, "reward": -0.1498, "length": 8.257e-5, "knn6": -0.9350}
)


def perplexity(losses: Tensor | Sequence[float]) -> Tensor:
    """
    Return `exp(loss)` of mean losses in nats; a NaN stays one.

    Raises:
        ValueError: a negative loss.

    Example:
    ```python
    >>> [round(value, 4) for value in perplexity([0.0, 1.0]).tolist()]
    [1.0, 2.7183]
    ```
    """
    values = torch.as_tensor(losses).double()
    if bool((values < 0).any()):
        raise ValueError(f"loss={float(values.min())} is negative. Pass mean token losses in nats, in [0, inf).")
    return values.exp()


def row_lengths(rows: Sequence[Sequence]) -> Tensor:
    """
    Return the length of each row: tokens of token ids, characters of a string.

    Example:
    ```python
    >>> row_lengths([[5, 6, 7], [], "ab"]).tolist()
    [3.0, 0.0, 2.0]
    ```
    """
    return torch.tensor([len(row) for row in rows], dtype=torch.float64)


def token_counts(rows: Iterable[Sequence[int]]) -> dict[int, int]:
    """
    Return how often each token occurs, sorted by token: the unigram for [`rarity_under`].

    Example:
    ```python
    >>> token_counts([[1, 2], [1]])
    {1: 2, 2: 1}
    ```
    """
    counts: Counter[int] = Counter()
    for row in rows:
        counts.update(row)
    return dict(sorted(counts.items()))


def rarity_under(rows: Sequence[Sequence[int]], *, counts: Mapping[int, int]) -> Tensor:
    """
    Return the mean of `-ln(count / total)` over the tokens of each row, in nats, under a given unigram.

    Equal to `word_rarity(rows)` for `counts=token_counts(rows)`, and the same for a row whatever rows stand beside it.

    Args:
        rows (`Sequence[Sequence[int]]`): Tokens of each row. An empty row has rarity 0.
        counts (`Mapping[int, int]`): How often each token occurs, at least 1.

    Raises:
        ValueError: a token without a count, or a count below 1.

    Example:
    ```python
    >>> [round(r, 4) for r in rarity_under([[1, 1], [1, 2]], counts={1: 3, 2: 1}).tolist()]
    [0.2877, 0.837]
    ```
    """
    for token, count in counts.items():
        check_count(f"counts[{token!r}]", count)
    total = sum(counts.values())
    missing = sorted({token for row in rows for token in row} - counts.keys())
    if missing:
        raise ValueError(
            f"counts has no token {missing[0]} ({len(missing)} such). Count over all rows: "
            "token_counts(dataset[column])."
        )
    cost = {token: math.log(total / count) for token, count in counts.items()}
    means = [math.fsum(cost[token] for token in row) / len(row) if len(row) else 0.0 for row in rows]
    return torch.tensor(means, dtype=torch.float64)


def instruct_mining(
    indicators: Mapping[str, Tensor | Sequence[float]], *, coefficients: Mapping[str, float] = INSTRUCT_MINING
) -> Tensor:
    """
    Return InstructMining's estimate of the log loss after tuning on a row, `b + sum_i c_i x_i`: lower is better data.

    Args:
        indicators (`Mapping[str, Sequence[float]]`): One sequence a name of `coefficients`, each of shape
            `(num_rows,)`.
        coefficients (`Mapping[str, float]`, *optional*): `"intercept"` (0 if absent) and one number an indicator.

    Raises:
        ValueError: names or lengths that do not fit, or a NaN.

    Example:
    ```python
    >>> same = dict.fromkeys(["understandability", "naturalness", "coherence"], [0.5, 0.5])
    >>> given = {"reward": [1.0, 2.0], **same}
    >>> [round(value, 5) for value in instruct_mining(given).tolist()]
    [0.00405, -0.00375]
    ```
    """
    wanted = sorted(set(coefficients) - {"intercept"})
    if sorted(indicators) != wanted or not wanted:
        raise ValueError(f"indicators {sorted(indicators)} do not fit the coefficients of {wanted}. Give one each.")
    columns = {name: clean_scores(indicators[name], name) for name in wanted}
    if len({column.numel() for column in columns.values()}) > 1:
        sizes = {name: column.numel() for name, column in columns.items()}
        raise ValueError(f"indicators have different lengths: {sizes}. Give each of them one number per row.")
    result = torch.full_like(columns[wanted[0]], coefficients.get("intercept", 0.0))
    for name in coefficients:  # in the order of the rule, so that equal inputs give equal bits
        if name != "intercept":
            result += coefficients[name] * columns[name]
    return result


def keep_by_judge(
    ratings: Tensor | Sequence[float], *, threshold: float = 4.5, lowest: float = 0.0, highest: float = 5.0
) -> Tensor:
    """
    Return the mask `rating >= threshold`: AlpaGasus' filter.

    Args:
        ratings (`torch.Tensor` or `Sequence[float]`): Rating of each row by a judge, shape `(num_rows,)`.
        threshold (`float`, *optional*, defaults to 4.5): Inclusive.
        lowest, highest (`float`, *optional*, defaults to 0 and 5): Scale of the judge.

    Raises:
        ValueError: a NaN, or a rating or a threshold outside the scale.

    Example:
    ```python
    >>> keep_by_judge([4.4, 4.5, 5.0]).tolist()
    [False, True, True]
    ```
    """
    check_number("threshold", threshold, lowest, highest)
    values = clean_scores(ratings, "ratings")
    outside = ((values < lowest) | (values > highest)).nonzero().flatten()
    if outside.numel():
        row = int(outside[0])
        raise ValueError(
            f"ratings[{row}]={float(values[row])} is outside [{lowest}, {highest}], as {outside.numel()} of "
            f"{values.numel()} are. Set lowest and highest to the judge's scale, or rate these rows again."
        )
    return values >= threshold


def keep_top(scores: Tensor | Sequence[float], count: int) -> Tensor:
    """
    Return the mask of the `count` highest scores; of equal scores the earlier rows are kept.

    Raises:
        ValueError: a NaN, or a count outside `[0, num_rows]`.

    Example:
    ```python
    >>> keep_top([1.0, 3.0, 2.0, 2.0], 2).tolist()
    [False, True, True, False]
    ```
    """
    values = clean_scores(scores)
    check_count("count", count, 0)
    if count > values.numel():
        raise ValueError(f"count={count} exceeds the {values.numel()} rows. Use a count in [0, {values.numel()}].")
    mask = torch.zeros(values.numel(), dtype=torch.bool)
    mask[values.argsort(descending=True, stable=True)[:count]] = True
    return mask


def kept_shares(mask: Tensor | Sequence[bool], groups: Sequence[Hashable]) -> dict[Hashable, float]:
    """
    Return the share of rows kept of each group, in the order in which groups first occur: what a filter costs a skill.

    Raises:
        ValueError: another number of groups than rows.

    Example:
    ```python
    >>> kept_shares([True, False, True], ["maths", "code", "maths"])
    {'maths': 1.0, 'code': 0.0}
    ```
    """
    kept = torch.as_tensor(mask).bool().tolist()
    if len(kept) != len(groups):
        raise ValueError(f"mask has {len(kept)} rows and groups has {len(groups)}. Give one group per row.")
    totals, hits = Counter(groups), Counter(group for group, keep in zip(groups, kept, strict=True) if keep)
    return {group: hits[group] / total for group, total in totals.items()}
