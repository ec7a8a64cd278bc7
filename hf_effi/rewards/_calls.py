"""Calling other reward functions, with or without waiting, and rewards of which each part is logged."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..errors import RewardError
from ..selection.rewards import SideColumn, name_of, side_column
from .base import Reward, texts_of

Row = dict[str, float | None]


def checked_function(name: str, fn: Any) -> Callable[..., Any]:
    """
    Return `fn`, a reward function.

    Raises:
        TypeError: it cannot be called.
    """
    if not callable(fn):
        raise TypeError(f"{name}={fn!r} must be a reward function: fn(prompts, completions, **columns).")
    return fn  # type: ignore[no-any-return]


def checked_values(who: str, values: Any, number: int) -> list[float | None]:
    """
    Return what a reward function returned, as one number or `None` per completion.

    Raises:
        RewardError: it is something else.
    """
    values = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise RewardError(f"{who} returned {values!r}, not one number per completion.")
    found = list(itertools.islice(values, number + 1))
    if len(found) != number:
        told = f"more than {number}" if found[number:] else str(len(found))
        raise RewardError(f"{who} returned {told} values for {number} completions.")
    return [checked_number(who, value) for value in found]


def checked_number(who: str, value: Any) -> float | None:
    """
    Return a number, or `None` for `None` and NaN.

    Raises:
        RewardError: it is something else, or infinite.
    """
    if value is None:
        return None
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, bool) or isinstance(value, (int, float)) and not math.isinf(value):
        return None if math.isnan(value) else float(value)
    raise RewardError(f"{who} returned {value!r}; a reward is a finite number, or None.")


async def awaited(value: Any) -> Any:
    """Return a value, waiting for it where it has to be waited for."""
    return await value if inspect.isawaitable(value) else value


def rows_of(rows: Sequence[int], number: int, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a reward function for some of the completions only."""
    found = {
        name: [value[row] for row in rows] if isinstance(value, (list, tuple)) and len(value) == number else value
        for name, value in arguments.items()
    }
    if callable(log_extra := arguments.get("log_extra")):

        def shown(column: str, values: Sequence[Any]) -> None:
            whole: list[Any] = [None] * number
            for row, value in zip(rows, values, strict=True):
                whole[row] = value
            log_extra(column, whole)

        found["log_extra"] = shown
    return found


def number_of(completions: Any, who: str) -> int:
    """
    Return the number of completions.

    Raises:
        RewardError: there are none.
    """
    if completions is None:
        raise RewardError(f"{who} needs completions=, a list of texts or of lists of messages.")
    return len(completions)


class PartedReward(Reward):
    """A reward that is the weighted mean of its parts; a part that does not apply, `None`, is left out."""

    #: part -> weight
    weights: Mapping[str, float]

    def __init__(self, name: str | None = None) -> None:
        super().__init__(name)
        self._last: tuple[Any, list[Row]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_last": None}

    def measure(self, text: str, *row: Any) -> Row:
        """Return each part of the reward of one text."""
        raise NotImplementedError

    def measured(self, texts: list[str], *columns: Sequence[Any]) -> list[Row]:
        """Return the parts of each text; those of the last call are remembered, for the columns that log them."""
        key = (texts, [list(column) for column in columns])
        if self._last is None or self._last[0] != key:
            self._last = key, [self.measure(text, *row) for text, *row in zip(texts, *columns, strict=True)]
        return self._last[1]

    def score_batch(self, texts: list[str], *columns: Sequence[Any]) -> list[float | None]:
        return [self._mean(row) for row in self.measured(texts, *columns)]

    def _mean(self, row: Row) -> float | None:
        known = {name: value for name, value in row.items() if value is not None and self.weights.get(name)}
        total = sum(self.weights[name] for name in known)
        return sum(self.weights[name] * value for name, value in known.items()) / total if total else None

    def parts(self) -> list[SideColumn]:
        """
        Return one column per part, to log it: pass them after the reward, in the list of `reward_funcs`.

        They are no rewards, see [`~hf_effi.selection.side_column`]. The parts are measured once.
        """
        return [side_column(_Part(self, name), f"{self.__name__}_{name}") for name in self.weights]


class _Part:
    """One part of a reward, as a function."""

    def __init__(self, reward: PartedReward, name: str) -> None:
        self.reward, self.name = reward, name
        self.__name__ = name

    def __call__(self, prompts: Any = None, completions: Any = None, **columns: Any) -> list[float | None]:
        reward = self.reward
        number = number_of(completions, reward.__name__)
        texts = texts_of(completions, reward.__name__)
        rows = reward.measured(texts, *(reward.column(name, number, columns) for name in reward.needs))
        return [row[self.name] for row in rows]


def checked_weights(given: Any, known: Mapping[str, float], absent: Mapping[str, str]) -> dict[str, float]:
    """
    Return the weight of each part that applies.

    Args:
        given (`Mapping`, *optional*): What the user said; `None` for the defaults of those that apply.
        known (`Mapping`): Defaults of all parts.
        absent (`Mapping`): Part that cannot be measured -> what is missing.

    Raises:
        ValueError: an unknown part, a weight below 0, one for a part that cannot be measured, or no weight at all.
    """
    if given is None:
        return {name: weight for name, weight in known.items() if name not in absent}
    if not isinstance(given, Mapping):
        raise ValueError(f"weights={given!r} must be a mapping, such as {dict(known)}.")
    for name, weight in given.items():
        if name not in known:
            raise ValueError(f"weights: {name!r} is no part of this reward, which are {', '.join(known)}.")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
            raise ValueError(f"weights: {name}={weight!r} must be a number >= 0.")
        if weight and name in absent:
            raise ValueError(f"weights: {name}={weight!r} would weigh nothing, for there is no {absent[name]}.")
    if not sum(given.values()):
        raise ValueError(f"weights={dict(given)} weigh nothing.")
    return {name: float(given[name]) for name in known if name in given and name not in absent}


__all__ = [
    "PartedReward",
    "awaited",
    "checked_function",
    "checked_number",
    "checked_values",
    "checked_weights",
    "name_of",
    "number_of",
    "rows_of",
]
