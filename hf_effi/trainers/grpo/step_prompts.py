"""Which prompts a step already has, so that no selector and no refill serves one of them again."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, cast

from ...functional.rollouts import ShuffledPrompts, draw_fresh, prompt_key
from ...protocols import PromptSelector

#: Keys of rows that are remembered, about 100 bytes each: enough that a small dataset is read once.
_MOST_KEYS = 500_000


class _Excluding(Protocol):
    """A [`PromptSelector`] that can be told which rows the step has."""

    def select(self, count: int, *, exclude: frozenset[int]) -> list[int]: ...


class StepPrompts:
    """
    Draws dataset rows whose prompts the optimizer step does not have yet, while there are others.

    Prompts are told apart by content: the loader serves rows without their numbers, and two rows with the same prompt
    are the same prompt. Every rank holds the same sets, so that all of them draw the same rows.

    Args:
        dataset: Map-style training dataset with a `prompt` column.
    """

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self._keys: dict[int, int] = {}
        self._step: int | None = None
        self._of_this_rank: set[int] = set()
        self._served: set[int] = set()
        self._rows: set[int] = set()

    def begin(self, step: int) -> None:
        """Forget the prompts of another step; several generations can belong to one."""
        if step != self._step:
            self._step = step
            for known in (self._of_this_rank, self._served, self._rows):
                known.clear()

    def note(self, inputs: Iterable[Mapping[str, Any]]) -> None:
        """Remember what the loader served to this rank."""
        self._of_this_rank |= {prompt_key(row.get("prompt")) for row in inputs}

    def draw(
        self, selector: PromptSelector, count: int, gather: Callable[[list[list[int]]], Sequence[list[int]]]
    ) -> list[int]:
        """
        Return `count` rows of `selector`.

        Args:
            gather (`Callable`): Joins lists over the ranks; called once.
        """
        for keys in gather([sorted(self._of_this_rank)]):
            self._served |= set(keys)
        self._of_this_rank.clear()
        size = len(self._dataset)
        most = 2 * size  # two passes hold every row, wherever the stream stands
        if not isinstance(selector, ShuffledPrompts):
            most = min(most, 32 * (len(self._served) + count))  # an own rule may never offer the others
        return draw_fresh(self._checked(selector), count, self._is_fresh, most)

    def _is_fresh(self, row: int) -> bool:
        key = self._keys.get(row)
        if key is None:
            if len(self._keys) >= _MOST_KEYS:
                self._keys.clear()
            key = self._keys[row] = prompt_key(self._dataset[row].get("prompt"))
        fresh = key not in self._served
        self._served.add(key)
        self._rows.add(row)
        return fresh

    def _checked(self, selector: PromptSelector) -> Callable[[int], list[int]]:
        """Wrap `select`, so that a wrong answer is named where it is given."""
        name, size = type(selector).__name__, len(self._dataset)
        excluding = cast(_Excluding, selector) if takes_keyword(selector.select, "exclude") else None

        def select(count: int) -> list[int]:
            if excluding is None:
                rows = selector.select(count)
            else:
                rows = excluding.select(count, exclude=frozenset(self._rows))
            try:
                rows = [operator.index(row) for row in rows]
            except TypeError:
                raise TypeError(f"{name}.select({count}) must return a list of row numbers, got {rows!r}.") from None
            if len(rows) != count:
                raise ValueError(f"{name}.select({count}) returned {len(rows)} rows. It must return {count}.")
            if wrong := [row for row in rows if not 0 <= row < size]:
                raise ValueError(
                    f"{name}.select({count}) returned row {wrong[0]}; the training dataset has rows 0 to {size - 1}."
                )
            return rows

        return select


def check_selector(selector: Any) -> None:
    """
    Say before any training what a selector lacks.

    Raises:
        TypeError: a method is missing, or `observe` is of the time when it was given a list of pass rates.
    """
    name = type(selector).__name__
    check_methods(
        "prompt_selector", selector, "PromptSelector", ("select", "observe", "state_dict", "load_state_dict")
    )
    if any(parameter.name == "pass_rates" for parameter in parameters_of(selector.observe)):
        raise TypeError(
            f"{name}.observe(rows, pass_rates) is the old form. It is now observe(rows, groups) with the "
            "hf_effi.protocols.RolloutGroups of those rows: rename the argument and read groups.pass_rates.tolist(), "
            "which is NaN where the reward is not 0 or 1."
        )


def check_methods(argument: str, value: Any, protocol: str, methods: Sequence[str]) -> None:
    """
    Say before any training which methods an object lacks. `None` lacks none.

    Raises:
        TypeError: naming the argument, the object, and the protocol that lists what it must offer.
    """
    check_no_class(argument, value)
    missing = [method for method in methods if not callable(getattr(value, method, None))]
    if value is not None and missing:
        raise TypeError(
            f"{argument}={type(value).__name__} has no {', '.join(missing)}. It must offer what "
            f"hf_effi.protocols.{protocol} lists."
        )


def check_no_class(argument: str, value: Any) -> None:
    """Raise `TypeError` for a class in the place of an object: its methods are callable, too."""
    if isinstance(value, type):
        raise TypeError(f"{argument} is the class {value.__name__}. Pass an object: {value.__name__}(...).")


def takes_keyword(method: Callable[..., Any], name: str) -> bool:
    """Return whether a method of an object of the user's can be given this argument by name."""
    return any(
        parameter.name == name or parameter.kind is parameter.VAR_KEYWORD for parameter in parameters_of(method)
    )


def parameters_of(method: Callable[..., Any]) -> Sequence[inspect.Parameter]:
    """Return the parameters of a method of an object of the user's; none where they cannot be known."""
    try:
        return list(inspect.signature(method).parameters.values())
    except (TypeError, ValueError):  # compiled code need not have a signature
        return []
