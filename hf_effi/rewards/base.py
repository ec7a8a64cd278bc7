"""What all rewards share: the text of a completion, the columns of the dataset, one number per completion."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import RewardError
from ..functional.rewards.texts import texts_of as texts_of


class Reward:
    """
    A reward function that is an object: batched, picklable, with a name for the log.

    A subclass says in [`~Reward.score`] what one completion is worth, and in `needs` which columns of the dataset it
    reads. A reward is a number, or `None` where it does not apply: TRL leaves `None` out.

    Args:
        name (`str`, *optional*): What the trainer logs it as, `rewards/<name>/mean`. Defaults to the name of the class
            in lower case, `last_number_reward` for `LastNumberReward`. Two of one class in a trainer need two names.

    Raises:
        ValueError: `name` is no text.

    Example:
    ```python
    >>> class Polite(Reward):
    ...     def score(self, text):
    ...         return float("please" in text)
    >>> Polite()(completions=["please", "now"]), Polite().__name__
    ([1.0, 0.0], 'polite')
    ```
    """

    #: columns of the dataset that `score` gets, in this order, after the text
    needs: tuple[str, ...] = ()

    def __init__(self, name: str | None = None) -> None:
        if name is not None and (not isinstance(name, str) or not name):
            raise ValueError(f"name={name!r} must be a text, or None for the name of the class.")
        self.name = name
        self.__name__ = (
            name or re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", type(self).__name__).lower()
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.__name__!r})"

    def __call__(
        self, prompts: Sequence[Any] | None = None, completions: Sequence[Any] | None = None, **columns: Any
    ) -> list[float | None]:
        """
        Return one reward per completion, as TRL calls it.

        Raises:
            RewardError: no completions, or a column that is needed is not there or has another length.
        """
        if completions is None:
            raise RewardError(f"{self.__name__} needs completions=, a list of texts or of lists of messages.")
        texts = texts_of(completions, self.__name__)
        return self.score_batch(texts, *(self.column(name, len(texts), columns) for name in self.needs))

    def column(self, name: str, number: int, columns: Mapping[str, Any]) -> Sequence[Any]:
        """
        Return a column of the dataset, one value per completion.

        Raises:
            RewardError: it is not there, or has another length.
        """
        if name not in columns:
            known = ", ".join(sorted(key for key in columns if key not in _NOT_COLUMNS)) or "none"
            raise RewardError(
                f"{self.__name__} reads the column {name!r} of the dataset, which has: {known}. Rename yours, or say "
                "which one to read when you make the reward."
            )
        values = columns[name]
        if isinstance(values, str) or not isinstance(values, Sequence) and not hasattr(values, "__len__"):
            raise RewardError(
                f"{self.__name__}: the column {name!r} must be a list with one value per completion, got "
                f"{type(values).__name__}."
            )
        if len(values) != number:
            raise RewardError(
                f"{self.__name__}: the column {name!r} has {len(values)} values for {number} completions."
            )
        return values

    def score_batch(self, texts: list[str], *columns: Sequence[Any]) -> list[float | None]:
        """Return one reward per text; a subclass that computes on all of them at once overrides this."""
        return [self.score(text, *row) for text, *row in zip(texts, *columns, strict=True)]

    def score(self, text: str, *row: Any) -> float | None:
        """Return the reward of one text, given its values of the columns in `needs`."""
        raise NotImplementedError(f"{type(self).__name__} defines neither score nor score_batch.")


#: what TRL passes beside the columns of the dataset
_NOT_COLUMNS = frozenset(
    ("trainer_state", "log_extra", "log_metric", "completion_ids", "prompt_ids", "environments", "trainer", "prompts")
)
