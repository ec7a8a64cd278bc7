"""Rewards that recipes of a domain are put together from: a class, a length, a judge that is held in check."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import RewardError
from ..functional.data import check_number
from ..functional.kept_arguments import keeps_arguments
from ..functional.rewards import length_band, text_in_tag
from ..selection.rewards import MOST_PATTERNS, is_async
from ._calls import awaited, checked_function, checked_values, number_of, rows_of
from .base import Reward, texts_of

LENGTH_UNITS = ("tokens", "words")


class ClassInTagReward(Reward):
    """
    1 where the one `<tag>` of a completion holds the right class, else 0.

    No tag, two of them, and a class that is not among the labels are 0, whatever else the text says.

    From [TimeMaster](https://huggingface.co/papers/2506.13705).

    Args:
        tag (`str`): `"class"` for `<class>...</class>`.
        labels (`Sequence[str]`): The classes. Compared by folded case, without white space around them.
        column (`str`, *optional*, defaults to `"answer"`): Column of the dataset with the right one, as a text or as
            its number in `labels`; `None` where there is none: the reward is `None`.
        name (`str`, *optional*): See [`Reward`].

    Raises:
        ValueError: no label, two that are equal, or a tag with other characters than letters, digits, `_` and `-`.

    Example:
    ```python
    >>> reward = ClassInTagReward("class", ["up", "down"])
    >>> texts = ["It falls. <class>Down</class>", "down", "<class>up</class>", "<class>down</class>"]
    >>> reward(completions=texts, answer=["down", "down", "down", None])
    [1.0, 0.0, 0.0, None]
    ```
    """

    @keeps_arguments
    def __init__(self, tag: str, labels: Sequence[str], column: str = "answer", *, name: str | None = None) -> None:
        super().__init__(name)
        text_in_tag("", tag)  # a wrong tag raises here
        if isinstance(labels, str) or not labels or not all(isinstance(label, str) for label in labels):
            raise ValueError(f"labels={labels!r} must be a list of texts.")
        if not isinstance(column, str) or not column:
            raise ValueError(f"column={column!r} must be the name of a column.")
        self.labels = tuple(label.strip().casefold() for label in labels)
        if len(set(self.labels)) < len(self.labels):
            raise ValueError(f"labels={list(labels)} has two that are equal but for case and white space.")
        self.tag, self.needs = tag, (column,)

    def score(self, text: str, *row: Any) -> float | None:
        right = row[0]
        if right is None:
            return None
        if isinstance(right, int) and not isinstance(right, bool) and 0 <= right < len(self.labels):
            right = self.labels[right]
        right = right.strip().casefold() if isinstance(right, str) else right
        if right not in self.labels:
            raise RewardError(
                f"{self.__name__}: the right class {row[0]!r} of column {self.needs[0]!r} is none of "
                f"{list(self.labels)}, nor a number of one."
            )
        said = text_in_tag(text, self.tag)
        return float(said is not None and said.casefold() == right)


class LengthBandReward(Reward):
    """
    1 for a completion whose length is in a band, falling to 0 on both sides: see
    [`~hf_effi.functional.rewards.length_band`].

    From [LongWriter-Zero](https://huggingface.co/papers/2506.18841), which has a band for each prompt.

    Args:
        low, high, largest (`float` or `str`): 0 < low <= high < largest. A text is the name of a column of the dataset
            with the value for each row; where one is `None` the reward is `None`.
        unit (`str`, *optional*, defaults to `"tokens"`): `"tokens"` of `completion_ids`, end of text included, or
            `"words"`, what stands between white space.
        name (`str`, *optional*): See [`Reward`].

    Raises:
        ValueError: the limits are not in that order, or the unit is unknown.

    Example:
    ```python
    >>> reward = LengthBandReward(2, "most", 8, unit="words")
    >>> reward(completions=["one", "one two", "one two three four five six"], most=[4, 4, 4])
    [0.5, 1.0, 0.5]
    ```
    """

    @keeps_arguments
    def __init__(
        self,
        low: float | str,
        high: float | str,
        largest: float | str,
        unit: str = "tokens",
        *,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        if unit not in LENGTH_UNITS:
            raise ValueError(f"unit={unit!r} must be one of {LENGTH_UNITS}.")
        self.limits, self.unit = (low, high, largest), unit
        columns = tuple(limit for limit in self.limits if isinstance(limit, str))
        self.needs = (("completion_ids",) if unit == "tokens" else ()) + columns
        fixed = [None if isinstance(limit, str) else limit for limit in self.limits]
        for limit, value in zip(("low", "high", "largest"), fixed, strict=True):
            if value is not None:
                check_number(limit, value, 0.0, open_low=True)
        if not columns:
            length_band(0, low, high, largest)  # type: ignore[arg-type]

    def score(self, text: str, *row: Any) -> float | None:
        ids, given = (row[0], list(row[1:])) if self.unit == "tokens" else (None, list(row))
        limits = [given.pop(0) if isinstance(limit, str) else limit for limit in self.limits]
        if any(limit is None for limit in limits):
            return None
        try:
            return length_band(len(text.split()) if ids is None else len(ids), *limits)
        except ValueError as error:
            raise RewardError(f"{self.__name__}: {error}") from None


class _Around(Reward):
    """A reward around others, which waits for them where they are asynchronous."""

    _inner: tuple[str, ...] = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        given = (*args[: len(cls._inner)], *(kwargs[name] for name in cls._inner if name in kwargs))
        waits = _WAITING.get(cls)
        return object.__new__(waits if waits and any(callable(fn) and is_async(fn) for fn in given) else cls)

    def __call__(
        self, prompts: Sequence[Any] | None = None, completions: Sequence[Any] | None = None, **columns: Any
    ) -> Any:
        """Return one reward per completion; of an asynchronous reward something to wait for."""
        run = self._run({"prompts": prompts, "completions": completions, **columns})
        try:
            run.send(None)
        except StopIteration as done:
            return done.value
        run.close()
        raise RewardError(f"{self.__name__} got something to wait for from a function that is not asynchronous.")

    async def _run(self, arguments: dict[str, Any]) -> list[float | None]:
        raise NotImplementedError


class CappedReward(_Around):
    """
    The score of a judge, at most `cap` where the text has one of some phrases.

    For what a judge likes too much: phrases that fit every answer.

    From [TimeMaster](https://huggingface.co/papers/2506.13705), with `cap=0.4`.

    Args:
        judge (`Callable`): A reward function, also asynchronous.
        patterns (`Sequence[str]`): Regular expressions, searched for in the completion; at most 256. They run on what
            the model writes: no quantifier inside of another one.
        cap (`float`, *optional*, defaults to 0.4): Highest score with a hit.
        name (`str`, *optional*): See [`Reward`].

    Raises:
        TypeError: `judge` cannot be called.
        ValueError: no pattern, one that is no regular expression, or a cap that is no number.

    Example:
    ```python
    >>> reward = CappedReward(lambda completions, **columns: [0.9, 0.9, 0.2], ["further (study|analysis)"])
    >>> reward(completions=["It rose by 3.", "This calls for further study.", "further analysis"])
    [0.9, 0.4, 0.2]
    ```
    """

    _inner = ("judge",)

    def __init__(
        self, judge: Callable[..., Any], patterns: Sequence[str], cap: float = 0.4, *, name: str | None = None
    ) -> None:
        super().__init__("capped_reward" if name is None else name)
        if not isinstance(patterns, (list, tuple)) or not 1 <= len(patterns) <= MOST_PATTERNS:
            raise ValueError(f"patterns must be a list of 1 to {MOST_PATTERNS} regular expressions, got {patterns!r}.")
        try:
            self.patterns = tuple(re.compile(pattern) for pattern in patterns)
        except (re.error, TypeError) as error:
            raise ValueError(f"patterns={patterns!r} has what is no regular expression: {error}.") from None
        self.judge, self.cap = checked_function("judge", judge), check_number("cap", cap, -math.inf)

    async def _run(self, arguments: dict[str, Any]) -> list[float | None]:
        number = number_of(arguments["completions"], self.__name__)
        texts = texts_of(arguments["completions"], self.__name__)
        scores = checked_values(f"judge of {self.__name__}", await awaited(self.judge(**arguments)), number)
        return [
            score if score is None or not any(one.search(text) for one in self.patterns) else min(score, self.cap)
            for score, text in zip(scores, texts, strict=True)
        ]


class GatedReward(_Around):
    """
    A reward that counts only where another one says that the completion is right.

    `reward` where `on >= least`, else 0; `None` where `on` or, for a right one, `reward` is `None`. The second is
    called with the right completions only, and not at all without one: a judge that costs something costs it for
    those.

    From [TimeMaster](https://huggingface.co/papers/2506.13705), whose judge of open-ended parts counts only where the
    class is right.

    Args:
        reward (`Callable`): A reward function, also asynchronous.
        on (`Callable`): Another one, e.g. [`ClassInTagReward`].
        least (`float`, *optional*, defaults to 1.0): Right is what `on` gives at least this.
        name (`str`, *optional*): See [`Reward`].

    Raises:
        TypeError: one of the two cannot be called.
        ValueError: `least` is no number.

    Example:
    ```python
    >>> right = ClassInTagReward("class", ["up", "down"])
    >>> reward = GatedReward(lambda completions, **columns: [0.7 for _ in completions], on=right)
    >>> reward(completions=["<class>up</class>", "<class>down</class>"], answer=["up", "up"])
    [0.7, 0.0]
    ```
    """

    _inner = ("reward", "on")

    def __init__(
        self, reward: Callable[..., Any], on: Callable[..., Any], least: float = 1.0, *, name: str | None = None
    ) -> None:
        super().__init__("gated_reward" if name is None else name)
        self.reward, self.on = checked_function("reward", reward), checked_function("on", on)
        self.least = check_number("least", least, -math.inf)

    async def _run(self, arguments: dict[str, Any]) -> list[float | None]:
        number = number_of(arguments["completions"], self.__name__)
        gates = checked_values(f"on of {self.__name__}", await awaited(self.on(**arguments)), number)
        found: list[float | None] = [None if gate is None else 0.0 for gate in gates]
        rows = [row for row, gate in enumerate(gates) if gate is not None and gate >= self.least]
        if rows:
            values = await awaited(self.reward(**rows_of(rows, number, arguments)))
            for row, value in zip(rows, checked_values(f"reward of {self.__name__}", values, len(rows)), strict=True):
                found[row] = value
        return found


class _AsyncCappedReward(CappedReward):
    """The same around a judge that is awaited: TRL asks the class whether it is one."""

    async def __call__(self, prompts: Any = None, completions: Any = None, **columns: Any) -> Any:
        return await self._run({"prompts": prompts, "completions": completions, **columns})


class _AsyncGatedReward(GatedReward):
    """The same where one of the two is awaited."""

    async def __call__(self, prompts: Any = None, completions: Any = None, **columns: Any) -> Any:
        return await self._run({"prompts": prompts, "completions": completions, **columns})


_WAITING: dict[type, type] = {CappedReward: _AsyncCappedReward, GatedReward: _AsyncGatedReward}
