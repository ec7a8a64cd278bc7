"""BLEU as a reward, on the token ids of the completions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..errors import RewardError
from ..functional.kept_arguments import keeps_arguments
from ..functional.rewards import sentence_bleu
from .base import Reward

_PAD = -1


class BLEUReward(Reward):
    """
    BLEU of each completion with the references of its row, on token ids and for the batch at once.

    See [`~hf_effi.functional.rewards.sentence_bleu`]. It depends on the tokenizer: a reward, and no figure to report.
    Ids of the end of a text and of padding do not count.

    From [TensorBLEU](https://huggingface.co/papers/2510.05485).

    Args:
        tokenizer (*optional*): Makes ids of references that are texts; that of the policy. Without one the column has
            ids.
        column (`str`, *optional*, defaults to `"reference"`): Column of the dataset: a text, or a list of texts for
            several references; without a tokenizer a list of ids, or a list of lists. `None` where there is none: the
            reward is `None`.
        max_n, weights, smoothing, smoothing_value (*optional*): As there. The default `"exp"` keeps a completion that
            has a word, but no four in a row, in common with its reference above 0.
        ignore_ids (`Sequence[int]`, *optional*): Ids that are left out of completions and references. Defaults to the
            special ones of the tokenizer.
        name (`str`, *optional*): See [`Reward`].

    Raises:
        ValueError: an argument is out of range.

    Example:
    ```python
    >>> reward = BLEUReward(max_n=2)
    >>> ids, references = [[5, 6, 7], [5, 9, 9]], [[5, 6, 7], [[1, 2], [5, 6, 7]]]
    >>> [round(r, 4) for r in reward(completions=["a b c", "a d d"], completion_ids=ids, reference=references)]
    [1.0, 0.2887]
    ```
    """

    @keeps_arguments
    def __init__(
        self,
        tokenizer: Any = None,
        column: str = "reference",
        max_n: int = 4,
        weights: Sequence[float] | None = None,
        smoothing: str = "exp",
        smoothing_value: float | None = None,
        *,
        ignore_ids: Sequence[int] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        if tokenizer is not None and not callable(tokenizer):
            raise ValueError(f"tokenizer={tokenizer!r} must be a tokenizer, or None for references that are ids.")
        if not isinstance(column, str) or not column:
            raise ValueError(f"column={column!r} must be the name of a column.")
        self.tokenizer, self.needs = tokenizer, ("completion_ids", column)
        self.settings: dict[str, Any] = {
            "max_n": max_n,
            "weights": None if weights is None else list(weights),
            "smoothing": smoothing,
            "smoothing_value": smoothing_value,
        }
        row = torch.zeros(1, 1, dtype=torch.long)  # a wrong argument raises here, not in the first step
        sentence_bleu(row, row, _PAD, **self.settings)
        ignored = getattr(tokenizer, "all_special_ids", ()) if ignore_ids is None else ignore_ids
        self.ignored = frozenset(int(one) for one in ignored)

    def score_batch(self, texts: list[str], *columns: Sequence[Any]) -> list[float | None]:
        if not texts:
            return []
        candidates = [self._ids(ids) for ids in columns[0]]
        references = [self._references(value) for value in columns[1]]
        number = max(1, *map(len, references)) if references else 1
        longest = max((len(one) for row in references for one in row), default=0)
        table = torch.tensor(
            [[_padded(one, longest) for one in row + [[]] * (number - len(row))] for row in references]
        ).view(len(texts), number, longest)
        width = max(map(len, candidates))
        ids = torch.tensor([_padded(one, width) for one in candidates]).view(len(texts), width)
        scores = sentence_bleu(ids.long(), table.long(), _PAD, **self.settings).tolist()
        return [None if math.isnan(score) else score for score in scores]

    def _ids(self, ids: Any) -> list[int]:
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        if not isinstance(ids, (list, tuple)) or not all(isinstance(one, int) and one >= 0 for one in ids):
            raise RewardError(f"{self.__name__} needs token ids >= 0, got {str(ids)[:200]}.")
        return [one for one in ids if one not in self.ignored]

    def _references(self, value: Any) -> list[list[int]]:
        if value is None:
            return []
        tokenizer = self.tokenizer
        several = isinstance(value, (list, tuple)) and all(isinstance(one, (str, list, tuple)) for one in value)
        found = []
        for one in value if several else [value]:
            if isinstance(one, str):
                if tokenizer is None:
                    raise RewardError(
                        f"{self.__name__}: the reference {one[:200]!r} is a text. Pass tokenizer=, that of the policy."
                    )
                one = tokenizer(one, add_special_tokens=False)["input_ids"]
            found.append(self._ids(one))
        return found


def _padded(ids: list[int], length: int) -> list[int]:
    return ids + [_PAD] * (length - len(ids))
