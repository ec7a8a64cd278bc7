"""Several experiments in one run: where rows go, how they are found again, and whether the experiments interact."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._checks import check_count

#: 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom; the normal one beyond
_T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
#: of the hash of a window, modulo 2**64
_BASE = 6364136223846793005


def draw_places(count: int, total: int, taken: Collection[int], key: str) -> list[int]:
    """
    Return `count` different places of `range(total)` that are not taken, in the order in which they were drawn.

    The draw depends on its arguments alone: not on a global seed, the process, or the versions of torch and numpy.

    Args:
        count (`int`): At least 0.
        total (`int`): Places there are.
        taken (`Collection[int]`): Places that are not free.
        key (`str`): Seeds the draw, such as `"3 canary"`.

    Raises:
        ValueError: fewer than `count` places are free.

    Example:
    ```python
    >>> draw_places(3, 10, {0, 1, 2}, "0 canary")
    [4, 6, 3]
    >>> draw_places(2, 2, {1}, "0 canary")
    Traceback (most recent call last):
    ...
    ValueError: 2 places are wanted of 2 rows, of which 1 is free. Inject fewer rows or copies.
    ```
    """
    check_count("count", count, 0)
    blocked = {place for place in taken if 0 <= place < total}
    if count > total - len(blocked):
        free = total - len(blocked)
        raise ValueError(
            f"{count} places are wanted of {total} rows, of which {free} {'is' if free == 1 else 'are'} free. Inject "
            "fewer rows or copies."
        )
    draws, found = random.Random(key), list[int]()
    if 2 * (count + len(blocked)) > total:  # nearly full: drawing until one is free would take long
        return draws.sample([place for place in range(total) if place not in blocked], count)
    while len(found) < count:
        place = draws.randrange(total)
        if place not in blocked:
            blocked.add(place)
            found.append(place)
    return found


def count_rows(tokens: Tensor, rows: Sequence[Sequence[int]]) -> list[int]:
    """
    Return how often each row of tokens stands in a batch, at any place of it.

    Args:
        tokens (`torch.Tensor`): Integer ids, shape `(batch, length)` or `(length,)`; padded or packed.
        rows (`Sequence[Sequence[int]]`): Token ids to look for, each at least one, no two equal.

    Example:
    ```python
    >>> count_rows(torch.tensor([[5, 1, 2, 3], [1, 2, 1, 2]]), [[1, 2], [1, 2, 3], [9]])
    [3, 1, 0]
    ```
    """
    found = [0] * len(rows)
    for number, _, _ in find_rows(tokens, rows):
        found[number] += 1
    return found


def find_rows(tokens: Tensor, rows: Sequence[Sequence[int]]) -> list[tuple[int, int, int]]:
    """
    Return where rows of tokens stand in a batch: (which row, row of the batch, first position), in no stated order.

    Windows are compared by a hash first, one pass over the batch for each length of a row and token of it, and then
    token by token.

    Args:
        tokens, rows: As in [`count_rows`].

    Raises:
        ValueError: an empty row.

    Example:
    ```python
    >>> find_rows(torch.tensor([[5, 1, 2, 3]]), [[2, 3]])
    [(0, 0, 2)]
    ```
    """
    batch = tokens.detach().to("cpu", torch.int64)
    batch = batch.unsqueeze(0) if batch.ndim == 1 else batch
    by_length: dict[int, dict[tuple[int, ...], int]] = {}
    for number, row in enumerate(rows):
        if not len(row):
            raise ValueError(f"row {number} has no token, and would stand everywhere. Leave it out.")
        by_length.setdefault(len(row), {})[tuple(row)] = number
    found = []
    for length, wanted in by_length.items():
        windows = batch.shape[-1] - length + 1
        if windows < 1 or not batch.numel():
            continue
        hashes = torch.zeros(batch.shape[0], windows, dtype=torch.int64)
        targets = torch.zeros(len(wanted), dtype=torch.int64)
        ids = torch.tensor(list(wanted), dtype=torch.int64)
        for offset in range(length):
            hashes = hashes * _BASE + batch[:, offset : offset + windows]
            targets = targets * _BASE + ids[:, offset]
        for line, start in torch.isin(hashes, targets).nonzero().tolist():
            number = wanted.get(tuple(batch[line, start : start + length].tolist()), -1)
            if number >= 0:
                found.append((number, line, start))
    return found


@dataclass(frozen=True)
class Interaction:
    """
    Whether one experiment comes out differently beside the others, over paired seeds.

    Args:
        name (`str`): The experiment.
        alone (`float`): Its effect by itself: mean of its measure with it alone minus with none.
        together (`float`): Its effect beside the others: mean with all minus with all but it.
        difference (`float`): `together - alone`, the mean over the seeds.
        low, high (`float`): 95 % interval of the difference, by Student's t over the seeds.
        seeds (`int`): How many.
    """

    name: str
    alone: float
    together: float
    difference: float
    low: float
    high: float
    seeds: int

    @property
    def within_noise(self) -> bool:
        """Whether the interval holds 0. That is no proof of independence: read `bound` beside it."""
        return self.low <= 0 <= self.high

    @property
    def bound(self) -> float:
        """The size of an interaction that the seeds cannot exclude."""
        return max(abs(self.low), abs(self.high))

    def __str__(self) -> str:
        told = "within the noise of the seeds" if self.within_noise else "BEYOND the noise of the seeds"
        return (
            f"{self.name}: effect {self.alone:.4g} alone, {self.together:.4g} beside the others; interaction "
            f"{self.difference:.4g} ({self.low:.4g} to {self.high:.4g}, {self.seeds} seeds), {told}"
        )


def measure_interactions(runs: Mapping[int, Mapping[str, Mapping[str, float]]]) -> dict[str, Interaction]:
    """
    Return what the experiments of one run do to each other's result.

    Formula: `effect alone = m(only e) - m(none)`, `effect together = m(all) - m(all but e)`; the interaction is their
    difference for each seed, with `mean +- t_0.975(n - 1) s / sqrt(n)`. Paper: Train Once, Answer All
    ([2509.23383](https://huggingface.co/papers/2509.23383)), which tests by runs that continue a checkpoint.

    Args:
        runs (`Mapping`): Seed -> arm -> the measure of each experiment. Arms: `"all"`, `"none"`, and `"only NAME"`
            and `"without NAME"` for each experiment.

    Raises:
        ValueError: fewer than 2 seeds, an arm that is missing, or a measure that is not finite.

    Example:
    ```python
    >>> def arms(both, alone):
    ...     zero = {"a": 0.0, "b": 0.0}
    ...     a, b = {"a": alone, "b": 0.0}, {"a": 0.0, "b": alone}
    ...     full = {"a": both, "b": both}
    ...     return {"all": full, "none": zero, "only a": a, "only b": b, "without a": b, "without b": a}
    >>> found = measure_interactions({0: arms(1.0, 1.5), 1: arms(2.0, 1.5)})
    >>> print(found["a"].alone, found["a"].together, found["a"].difference, found["a"].within_noise)
    1.5 1.5 0.0 True
    ```
    """
    if len(runs) < 2:
        raise ValueError(f"{len(runs)} seed: the noise is not known. Run at least 2, better 3.")
    names = list(next(iter(runs.values())).get("all", {}))
    found = {}
    for name in names:
        alone, together = [], []
        for seed, arms in runs.items():
            for arm in ("all", "none", f"only {name}", f"without {name}"):
                if not math.isfinite(arms.get(arm, {}).get(name, math.nan)):
                    raise ValueError(f"seed {seed} has no finite measure of {name!r} in the arm {arm!r}.")
            alone.append(arms[f"only {name}"][name] - arms["none"][name])
            together.append(arms["all"][name] - arms[f"without {name}"][name])
        gaps = [one - other for one, other in zip(together, alone, strict=True)]
        mean, count = statistics.fmean(gaps), len(gaps)
        quantile = _T_95[count - 2] if count - 2 < len(_T_95) else 1.96
        half = quantile * statistics.stdev(gaps) / math.sqrt(count)
        found[name] = Interaction(
            name, statistics.fmean(alone), statistics.fmean(together), mean, mean - half, mean + half, count
        )
    return found


@torch.no_grad()
def continuations(logits: Tensor, ids: Tensor, start: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """
    Return for each row whether the continuation of its beginning is exact, and its mean loss.

    A greedy decoder that is given the first `start` tokens writes the rest exactly if and only if each token of the
    rest is the likeliest one after the true tokens before it; so one forward is enough.

    Args:
        logits (`torch.Tensor`): Shape `(rows, tokens, vocabulary)`.
        ids (`torch.Tensor`): Token ids, padded on the right, shape `(rows, tokens)`.
        start, length (`torch.Tensor`): Tokens that are given, and tokens of the row, shape `(rows,)`, with
            `1 <= start < length`.

    Returns:
        `tuple`: bool and float64, both of shape `(rows,)`: exact, and mean `-log p` in nats per token of the rest.

    Example:
    ```python
    >>> logits = torch.tensor([[[0.0, 9.0], [9.0, 0.0], [0.0, 0.0]]])  # after token 0 comes 1, after token 1 comes 0
    >>> exact, loss = continuations(logits, torch.tensor([[0, 1, 0]]), torch.tensor([1]), torch.tensor([3]))
    >>> exact.tolist(), round(float(loss), 4)
    ([True], 0.0001)
    ```
    """
    positions = torch.arange(1, ids.shape[1], device=ids.device)
    asked = (positions >= start.unsqueeze(1)) & (positions < length.unsqueeze(1))
    following = ids[:, 1:]
    right = logits[:, :-1].argmax(-1).eq(following)
    logp = logits[:, :-1].double().log_softmax(-1).gather(-1, following.unsqueeze(-1)).squeeze(-1)
    return (right | ~asked).all(1), -(logp * asked).sum(1) / asked.sum(1)


def as_ids(row: Any, name: str) -> tuple[int, ...]:
    """
    Return a row of token ids as a tuple of integers.

    Raises:
        ValueError: fewer than 2 tokens, or something that is no token id.

    Example:
    ```python
    >>> as_ids(torch.tensor([3, 4]), "canary")
    (3, 4)
    ```
    """
    values = row.tolist() if isinstance(row, Tensor) else row
    wrong = isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Sequence)
    if wrong or any(isinstance(v, bool) or not isinstance(v, int) or v < 0 for v in values):
        raise ValueError(
            f"a row of {name!r} is {str(row)[:60]!r}. Pass token ids, as tokenizer(text)['input_ids'] gives them."
        )
    if len(values) < 2:
        raise ValueError(
            f"a row of {name!r} has {len(values)} tokens. It needs 2: one that is given, one that follows."
        )
    return tuple(values)
