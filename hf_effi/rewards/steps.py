"""A reward of the steps of a completion, made of what a scorer says of each."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..errors import RewardError
from ..functional.rollouts import STEP_AGGREGATIONS, aggregate_steps
from ..selection.rewards import is_async
from ._calls import checked_function, checked_number, checked_values, number_of
from .base import Reward, texts_of


class StepReward(Reward):
    r"""
    One number out of the scores of the steps of a completion, see [`~hf_effi.functional.rollouts.aggregate_steps`].

    The scorer gets all completions at once, so that a reward model runs in batches. `None` where a completion has no
    step (under `"decayed"` its outcome then), or a step has no score.

    `"min"` is raised by making fewer steps and `"prod"` falls with every step; `"log_mean"`, the geometric mean, does
    neither. From [GroundedPRM](https://huggingface.co/papers/2510.14942), whose backup is `"decayed"`.

    Args:
        scorer (`Callable`): `scorer(steps)` with one list of texts per completion; returns one list of numbers per
            completion, as long, `None` or NaN for a step that it cannot score.
        split (`str` or `Callable`, *optional*, defaults to `"\n\n"`): A regular expression between steps, or a
            function of the text that returns a list of steps. Steps of white space only are left out.
        how (`str`, *optional*, defaults to `"min"`): `"min"`, `"prod"`, `"log_mean"`, `"mean"`, `"last"`, `"decayed"`.
        outcome (`Callable`, *optional*): For `"decayed"`, and only there: a reward function, the outcome `f` of the
            completion, on the scale of the steps (the paper: 1 or -1).
        name (`str`, *optional*): See [`Reward`].

    Raises:
        TypeError, ValueError: an argument is out of range, asynchronous, or would not be read.

    Example:
    ```python
    >>> def scorer(steps):
    ...     return [[1.0 if "=" in step else 0.5 for step in one] for one in steps]
    >>> StepReward(scorer, how="mean")(completions=["1+1=2\n\nso it is 2", "2+2=4", ""])
    [0.75, 1.0, None]
    ```
    """

    def __init__(
        self,
        scorer: Callable[[list[list[str]]], Any],
        split: str | Callable[[str], list[str]] = r"\n\n",
        how: str = "min",
        outcome: Callable[..., Any] | None = None,
        *,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        if how not in STEP_AGGREGATIONS:
            raise ValueError(f"how must be one of {STEP_AGGREGATIONS}, got {how!r}.")
        if (outcome is not None) != (how == "decayed"):
            raise ValueError(f"outcome is what how='decayed' adds, and only that; how is {how!r}.")
        for key, fn in (("scorer", scorer), ("outcome", outcome)):
            if fn is not None and is_async(checked_function(key, fn)):
                raise ValueError(f"{key}={fn!r} is asynchronous; it must return its values.")
        try:
            self.split = re.compile(split) if isinstance(split, str) else checked_function("split", split)
        except re.error as error:
            raise ValueError(f"split={split!r} is no regular expression: {error}.") from None
        self.scorer, self.how, self.outcome = scorer, how, outcome

    def __call__(
        self, prompts: Sequence[Any] | None = None, completions: Sequence[Any] | None = None, **columns: Any
    ) -> list[float | None]:
        """Return one reward per completion, as TRL calls it."""
        number = number_of(completions, self.__name__)
        steps = [self._steps(text) for text in texts_of(completions or (), self.__name__)]
        scores = self._scores(steps)
        outcome = None
        if self.outcome is not None:
            values = self.outcome(prompts=prompts, completions=completions, **columns)
            known = checked_values(f"outcome of {self.__name__}", values, number)
            outcome = torch.tensor([math.nan if one is None else one for one in known], dtype=torch.double)
        longest = max(map(len, scores), default=0)
        table = torch.tensor([one + [0.0] * (longest - len(one)) for one in scores], dtype=torch.double).view(
            number, longest
        )
        there = torch.tensor([[place < len(one) for place in range(longest)] for one in scores], dtype=torch.bool)
        found = aggregate_steps(table, there.view(number, longest), self.how, outcome)
        unknown = [any(map(math.isnan, one)) for one in scores]
        return [None if math.isnan(one) or unknown[row] else one for row, one in enumerate(found.tolist())]

    def _steps(self, text: str) -> list[str]:
        parts: Any = self.split.split(text) if isinstance(self.split, re.Pattern) else self.split(text)
        if not isinstance(parts, (list, tuple)) or not all(part is None or isinstance(part, str) for part in parts):
            raise RewardError(f"split of {self.__name__} returned {parts!r}, not a list of texts.")
        return [part for part in parts if part and part.strip()]

    def _scores(self, steps: list[list[str]]) -> list[list[float]]:
        who = f"scorer of {self.__name__}"
        given = self.scorer(steps)
        if isinstance(given, (str, bytes)) or not hasattr(given, "__len__") or len(given) != len(steps):
            raise RewardError(
                f"{who} returned {given!r}, not one list of numbers for each of {len(steps)} completions."
            )
        found = []
        for row, (one, wanted) in enumerate(zip(given, steps, strict=True)):
            numbers = one.tolist() if hasattr(one, "tolist") else list(one)
            if len(numbers) != len(wanted):
                raise RewardError(f"{who} returned {len(numbers)} scores for {len(wanted)} steps of completion {row}.")
            values = [checked_number(who, number) for number in numbers]
            found.append([math.nan if value is None else value for value in values])
        return found
