"""Budgets of length that fall during a run, and what a completion of some length is worth under one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data import check_count, check_number

#: what rounding may take off a budget that is a whole number
_ROUNDING = 1e-9


def _floor(value: float, least: int) -> int:
    return max(least, math.floor(value + _ROUNDING))


#: more tokens than any completion has
LARGEST_TOKENS = 2**31 - 1


def check_tokens(name: str, value: int) -> int:
    """
    Return a number of tokens, or raise: no completion has more than 2^31 - 1 of them.

    Raises:
        ValueError: it is no integer from 1 to 2^31 - 1.
    """
    check_count(name, value)
    if value > LARGEST_TOKENS:
        raise ValueError(f"{name} must be at most {LARGEST_TOKENS}, got a number of {len(hex(value)) - 2} hex digits.")
    return value


def exponential_budget(
    step: int, start: int, decay: float, every_steps: int, least: int = 1, continuous: bool = False
) -> int:
    """
    Return a budget that is multiplied by `decay` every few updates.

    Formula: `B(t) = max(least, floor(B_0 gamma^floor(t / T)))` of Train Long, Think Short (2508.08940). With
    `continuous=True` the exponent is `min(1, t / T)`, as in Reinforcement Mid-Training, where `T` is the whole run.

    Args:
        step (`int`): Updates done, >= 0.
        start (`int`): `B_0` in tokens, >= 1.
        decay (`float`): `gamma` in (0, 1].
        every_steps (`int`): `T` in updates, >= 1.
        least (`int`, *optional*, defaults to 1): The lowest budget in tokens, >= 1.
        continuous (`bool`, *optional*, defaults to `False`): Fall with each update, once over `T` updates.

    Returns:
        `int`: Tokens.

    Raises:
        ValueError: a value out of its range.

    Example:
    ```python
    >>> [exponential_budget(step, 256, 0.7, 150) for step in (0, 149, 150, 300, 450, 599)]
    [256, 256, 179, 125, 87, 87]
    >>> [exponential_budget(step, 800, 0.2, 100, continuous=True) for step in (0, 25, 50, 75, 100, 200)]
    [800, 534, 357, 239, 160, 160]
    ```
    """
    check_count("step", step, 0)
    check_tokens("start", start)
    check_number("decay", decay, 0, 1, open_low=True)
    check_count("every_steps", every_steps)
    check_tokens("least", least)
    exponent = min(1.0, step / every_steps) if continuous else step // every_steps
    return _floor(start * decay**exponent, least)


def linear_budget(step: int, start: int, end: int, total_steps: int) -> int:
    """
    Return a budget on the straight line from `start` to `end`.

    Formula: `B(t) = floor(B_0 + (B_f - B_0) min(1, t / T))`. The linear variant of 2508.08940.

    Args:
        step (`int`): Updates done, >= 0.
        start, end (`int`): `B_0` and `B_f` in tokens; `1 <= end <= start`.
        total_steps (`int`): `T`, where `end` is reached, >= 1.

    Returns:
        `int`: Tokens.

    Raises:
        ValueError: a value out of its range.

    Example:
    ```python
    >>> [linear_budget(step, 256, 87, 600) for step in (0, 150, 300, 600, 900)]
    [256, 213, 171, 87, 87]
    ```
    """
    check_count("step", step, 0)
    _check_ends(start, end)
    check_count("total_steps", total_steps)
    return _floor(start + (end - start) * min(1.0, step / total_steps), 1)


def n_decay_budget(step: int, start: int, end: int, decays: int, total_steps: int) -> int:
    """
    Return a budget that falls from `start` to `end` by the same factor a number of times.

    Formula: `B_k = floor(B_0 d^k)` with `d = (B_f / B_0)^(1/n)` and `k = min(n, floor(t / I))`, `I = T / (n + 1)`.
    From 2508.08940.

    Args:
        step (`int`): Updates done, >= 0.
        start, end (`int`): `B_0` and `B_f` in tokens; `1 <= end <= start`.
        decays (`int`): `n`, how often it falls, >= 1.
        total_steps (`int`): `T`, the updates of the run, >= 1.

    Returns:
        `int`: Tokens.

    Raises:
        ValueError: a value out of its range.

    Example:
    ```python
    >>> [n_decay_budget(step, 256, 87, 3, 600) for step in (0, 149, 150, 300, 450, 600, 900)]
    [256, 256, 178, 124, 87, 87, 87]
    ```
    """
    check_count("step", step, 0)
    _check_ends(start, end)
    check_tokens("decays", decays)
    check_count("total_steps", total_steps)
    place = min(decays, step * (decays + 1) // total_steps)
    return _floor(start * (end / start) ** (place / decays), 1)


def _check_ends(start: int, end: int) -> None:
    check_tokens("start", start)
    check_tokens("end", end)
    if end > start:
        raise ValueError(f"end={end} is above start={start}: a budget falls. Swap them, or give the reward a number.")


@dataclass(frozen=True)
class ExponentialBudget:
    """
    [`exponential_budget`] as a value, for a reward, a cap and a prompt that share it.

    Args:
        start (`int`, *optional*, defaults to 256): Tokens at first, >= 1.
        decay (`float`, *optional*, defaults to 0.7): Factor in (0, 1].
        every_steps (`int`, *optional*, defaults to 150): Updates from one fall to the next. `None` falls with each
            update, by `decay` in the whole run: the budget of Reinforcement Mid-Training (800, 0.2).
        least (`int`, *optional*, defaults to 1): The lowest budget.

    Raises:
        ValueError: a value out of its range.

    Example:
    ```python
    >>> [ExponentialBudget().at(step, total_steps=600) for step in (0, 150, 300, 450)]
    [256, 179, 125, 87]
    >>> [ExponentialBudget(800, 0.2, None).at(step, total_steps=4) for step in range(5)]
    [800, 534, 357, 239, 160]
    ```
    """

    start: int = 256
    decay: float = 0.7
    every_steps: int | None = 150
    least: int = 1

    def __post_init__(self) -> None:
        self.at(0, 1)

    def at(self, step: int, total_steps: int) -> int:
        """
        Return the budget in tokens of the generation that follows `step` finished updates.

        Args:
            step (`int`): Updates done.
            total_steps (`int`): Updates of the run.
        """
        every = total_steps if self.every_steps is None else self.every_steps
        return exponential_budget(step, self.start, self.decay, every, self.least, self.every_steps is None)


@dataclass(frozen=True)
class LinearBudget:
    """
    [`linear_budget`] over the whole run, as a value.

    Args:
        start, end (`int`): Tokens at first and at the end; `1 <= end <= start`. Equal ones are a budget that stays.

    Raises:
        ValueError: a value out of its range.

    Example:
    ```python
    >>> [LinearBudget(256, 87).at(step, total_steps=600) for step in (0, 300, 600)]
    [256, 171, 87]
    ```
    """

    start: int
    end: int

    def __post_init__(self) -> None:
        self.at(0, 1)

    def at(self, step: int, total_steps: int) -> int:
        """Return the budget in tokens, as [`ExponentialBudget.at`] does."""
        return linear_budget(step, self.start, self.end, total_steps)


@dataclass(frozen=True)
class NDecayBudget:
    """
    [`n_decay_budget`] over the whole run, as a value.

    Args:
        start, end (`int`): Tokens at first and at the end; `1 <= end <= start`.
        decays (`int`, *optional*, defaults to 3): How often it falls, >= 1.

    Raises:
        ValueError: a value out of its range.

    Example:
    ```python
    >>> [NDecayBudget(256, 87, decays=1).at(step, total_steps=600) for step in (0, 299, 300, 600)]
    [256, 256, 87, 87]
    ```
    """

    start: int
    end: int
    decays: int = 3

    def __post_init__(self) -> None:
        self.at(0, 1)

    def at(self, step: int, total_steps: int) -> int:
        """Return the budget in tokens, as [`ExponentialBudget.at`] does."""
        return n_decay_budget(step, self.start, self.end, self.decays, total_steps)


#: what may stand for a budget beside a number of tokens
Budget = ExponentialBudget | LinearBudget | NDecayBudget


def check_budget(budget: Budget | int) -> Budget:
    """
    Return a budget as one that can be asked for a step; a number of tokens is one that stays.

    Raises:
        ValueError: it is neither.

    Example:
    ```python
    >>> check_budget(64).at(10, 100)
    64
    ```
    """
    if isinstance(budget, int) and not isinstance(budget, bool) and 1 <= budget <= LARGEST_TOKENS:
        return LinearBudget(budget, budget)
    if isinstance(budget, Budget):
        return budget
    raise ValueError(
        f"budget={budget!r} must be a number of tokens of at least 1, or an ExponentialBudget, LinearBudget or "
        "NDecayBudget of hf_effi.functional.rewards."
    )


def _lengths(lengths: Sequence[int] | Tensor) -> Tensor:
    found = torch.as_tensor(lengths).to(torch.float64)
    if bool((found < 0).any()) or bool(found.isnan().any()):
        raise ValueError(f"lengths must be numbers of tokens of at least 0, got {found.min().item()}.")
    return found


def triangular_reward(lengths: Sequence[int] | Tensor, budget: float, largest: float = 1.0) -> Tensor:
    """
    Return a reward that is highest at the budget and falls to 0 on both sides.

    Formula: `R l / L` for `l <= L`, `R (1 - (l - L) / L)` for `L < l <= 2 L`, and 0 beyond. From 2508.08940.

    Args:
        lengths (`Sequence[int]` or `torch.Tensor`): `l`, tokens of each completion, >= 0, of any shape.
        budget (`float`): `L` in tokens, above 0.
        largest (`float`, *optional*, defaults to 1.0): `R`, above 0.

    Returns:
        `torch.Tensor`: Double precision, shaped like `lengths`, in [0, `largest`].

    Raises:
        ValueError: a value out of its range.

    Example:
    ```python
    >>> triangular_reward([0, 50, 100, 150, 200, 300], 100).tolist()
    [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]
    ```
    """
    check_number("budget", budget, 0, open_low=True)
    check_number("largest", largest, 0, open_low=True)
    return largest * (1 - (_lengths(lengths) / budget - 1).abs()).clamp(min=0)


def band_reward(
    lengths: Sequence[int] | Tensor, low: float, high: float, longest: float, largest: float = 1.0
) -> Tensor:
    """
    Return a reward that is the same for all lengths of a band, and falls to 0 on both sides of it.

    Formula: `R l / low` below the band, `R` in `[low, high]`, `R (longest - l) / (longest - high)` above it and 0 from
    `longest` on. `low=0, high=L, longest=2 L` is the flat variant of 2508.08940; other bands are those of
    LongWriter-Zero.

    Args:
        lengths (`Sequence[int]` or `torch.Tensor`): `l`, tokens of each completion, >= 0, of any shape.
        low, high, longest (`float`): In tokens; `0 <= low <= high < longest`.
        largest (`float`, *optional*, defaults to 1.0): `R`, above 0.

    Returns:
        `torch.Tensor`: Double precision, shaped like `lengths`, in [0, `largest`].

    Raises:
        ValueError: a value out of its range.

    Example:
    ```python
    >>> band_reward([0, 50, 100, 150, 200, 300], 0, 100, 200).tolist()
    [1.0, 1.0, 1.0, 0.5, 0.0, 0.0]
    >>> band_reward([0, 25, 50, 100, 150], 50, 100, 200).tolist()
    [0.0, 0.5, 1.0, 1.0, 0.5]
    ```
    """
    check_number("low", low, 0)
    check_number("high", high, low)
    check_number("longest", longest, high, open_low=True)
    check_number("largest", largest, 0, open_low=True)
    found = _lengths(lengths)
    below = found / low if low else torch.ones_like(found)
    above = (longest - found) / (longest - high)
    return largest * torch.minimum(below, above).clamp(0, 1)
