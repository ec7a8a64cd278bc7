"""Rewards that need no label: a vote among the completions of a prompt, and a span of the text itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import RewardError
from ..functional import metrics
from ..functional.data import check_number, plain_span
from ..functional.kept_arguments import keeps_arguments
from ..functional.rewards import Vote, is_answer, majority_vote
from ..selection.rewards import GroupReward, is_async
from .base import Reward, texts_of


class _Votes:
    """The function inside of [`MajorityVoteReward`]: it is given whole groups, and pickles where its parts do."""

    def __init__(
        self,
        extract: Callable[[str], Any],
        same: Callable[[Any, Any], bool] | None,
        min_ratio: float,
        column: str | None,
        name: str,
    ) -> None:
        self.extract, self.same, self.min_ratio, self.column, self.name = extract, same, min_ratio, column, name

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], group_size: int, **kwargs: Any
    ) -> list[float | None]:
        truths = self._truths(len(completions), kwargs)
        answers = [self.extract(text) for text in texts_of(completions, self.name)]
        starts = range(0, len(answers), group_size)
        votes = [majority_vote(answers[i : i + group_size], self.same, self.min_ratio) for i in starts]
        self._log(votes, [truths[i] for i in starts], kwargs.get("log_metric"))
        return [float(agrees) if vote.decided else None for vote in votes for agrees in vote.agrees]

    def _truths(self, number: int, kwargs: Mapping[str, Any]) -> Sequence[Any]:
        if self.column is None:
            return [None] * number
        if self.column not in kwargs:
            raise RewardError(
                f"{self.name}: the dataset has no column {self.column!r}, with which the votes shall be compared. "
                "Name another one, or leave out column=: the reward does not need it."
            )
        return kwargs[self.column]  # type: ignore[no-any-return]

    def _log(self, votes: Sequence[Vote], truths: Sequence[Any], log_metric: Any) -> None:
        if not callable(log_metric) or not votes:
            return
        log_metric(metrics.LABEL + "majority_ratio", sum(vote.ratio for vote in votes) / len(votes))
        log_metric(metrics.LABEL + "abstained", sum(not vote.decided for vote in votes) / len(votes))
        log_metric(metrics.LABEL + "distinct_answers", sum(vote.classes for vote in votes) / len(votes))
        pairs = [(v.label, t) for v, t in zip(votes, truths, strict=True) if v.decided and is_answer(t)]
        if pairs:
            right = [bool(label == truth if self.same is None else self.same(truth, label)) for label, truth in pairs]
            log_metric(metrics.LABEL + "accuracy", sum(right) / len(right))


class MajorityVoteReward(GroupReward):
    """
    TTRL: the answer that most completions of a prompt give is taken for the right one. No label is read.

    `r_i = 1` if completion `i` is in the largest class of answers, else 0, see
    [`~hf_effi.functional.rewards.majority_vote`]. Completions without an answer do not vote, can never win, and get 0
    where others decide. All completions of a prompt get `None`, so that nothing is learned from it, where none has an
    answer, or where fewer than `min_ratio` of them agree. Of two equally large classes the first seen wins, as in the
    paper's code.

    A vote makes a policy surer of what it says already. Where most of its answers are wrong it gets surer of wrong
    ones, and the reward rises all the same: look at `effi/label/majority_ratio` (near 1 from some step on: nothing is
    left to learn), `effi/label/distinct_answers`, `effi/label/abstained`, and with `column` at
    `effi/label/accuracy`, the share of the votes that are right.

    To vote with 64 completions and train on the first 32 of them, as the paper does, add
    `rollout_pruner=FirstRowsPruner(32)`. Paper: [2504.16084](https://huggingface.co/papers/2504.16084).

    Args:
        extract (`Callable`): `extract(text)` returns the answer in a completion; `None`, or an empty text or list,
            where there is none.
        same (`Callable`, *optional*): `same(one, other)`, whether two answers mean the same, such as a verifier says.
            `==` without.
        min_ratio (`float`, *optional*, defaults to 0): Smallest share of the completions that must agree, in [0, 1].
        column (`str`, *optional*): Column of the dataset with true answers, of the kind that `extract` returns, to log
            how often the vote is right. It never enters the reward.
        group_size (`int`, *optional*): Completions of a prompt, for a stock `GRPOTrainer` only, see
            [`~hf_effi.selection.group_reward`].
        name (`str`, *optional*): What the trainer logs it as. Defaults to `majority_vote_reward`.

    Raises:
        TypeError: `extract` or `same` cannot be called or is asynchronous.
        ValueError: an argument out of range.

    Example:
    ```python
    >>> reward = MajorityVoteReward(lambda text: text.rpartition("=")[2], group_size=4)
    >>> reward(["1+1="] * 4, ["2", "1+1=2", "3", ""])
    [1.0, 1.0, 0.0, 0.0]
    ```
    """

    @keeps_arguments
    def __init__(
        self,
        extract: Callable[[str], Any],
        same: Callable[[Any, Any], bool] | None = None,
        min_ratio: float = 0.0,
        column: str | None = None,
        group_size: int | None = None,
        name: str | None = None,
    ) -> None:
        for key, value in (("extract", extract), ("same", same)):
            if value is None and key == "same":
                continue
            if not callable(value) or is_async(value):
                raise TypeError(f"{key}={value!r} must be a function that returns its result; it is not awaited.")
        check_number("min_ratio", min_ratio, 0, 1)
        if column is not None and (not isinstance(column, str) or not column):
            raise ValueError(f"column={column!r} must be the name of a column of the dataset, or None.")
        name = "majority_vote_reward" if name is None else name
        super().__init__(_Votes(extract, same, min_ratio, column, name), group_size, name)
        self.min_ratio, self.column = min_ratio, column


_BOXED = "\\boxed{"


def last_boxed(text: str) -> str:
    r"""
    Return what stands in the last `\boxed{...}` of a text, braces balanced; an empty text where it does not end.

    Example:
    ```python
    >>> last_boxed(r"\boxed{1} then \boxed{\frac{1}{2}}."), last_boxed("none"), last_boxed(r"\boxed{1")
    ('\\frac{1}{2}', '', '')
    ```
    """
    start = text.rfind(_BOXED)
    if start < 0:
        return ""
    start, depth = start + len(_BOXED), 1
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if not depth:
            return text[start:place]
    return ""


class ExactSpanReward(Reward):
    r"""
    1.0 where a completion names the masked span, else 0.0; `None` where the span is nothing but punctuation.

    The last `\boxed{...}` of the completion is read, and both are compared as
    [`~hf_effi.functional.data.plain_span`] makes them. A completion without one, or with an empty one, gets 0.

    For rows of [`~hf_effi.data.MaskedSpanPrompts`]. From
    [PretrainZero](https://huggingface.co/papers/2512.03442), which rewards exact matches.

    Args:
        column (`str`, *optional*, defaults to `"answer"`): Column of the dataset with the span.
        boxed (`bool`, *optional*, defaults to `True`): Whether the answer stands in `\boxed{}`. `False`: the whole
            completion is the answer, for models too small to keep a format.
        name (`str`, *optional*): See [`Reward`].

    Raises:
        ValueError: an argument of another kind.

    Example:
    ```python
    >>> reward = ExactSpanReward()
    >>> reward(completions=["I think \\boxed{Moon.}", "moon", "\\boxed{}"], answer=["the moon", "moon", "moon"])
    [0.0, 0.0, 0.0]
    >>> reward(completions=["so \\boxed{The Moon.}"], answer=["the moon"])
    [1.0]
    ```
    """

    @keeps_arguments
    def __init__(self, column: str = "answer", boxed: bool = True, name: str | None = None) -> None:
        super().__init__(name)
        if not isinstance(column, str) or not column:
            raise ValueError(f"column={column!r} must be the name of a column of the dataset.")
        if not isinstance(boxed, bool):
            raise ValueError(f"boxed={boxed!r} must be True or False.")
        self.needs = (column,)
        self.boxed = boxed

    def score(self, text: str, *row: Any) -> float | None:
        """Return the reward of one completion, given the span."""
        (span,) = row
        if not isinstance(span, str):
            raise RewardError(f"{self.__name__}: the column {self.needs[0]!r} has {span!r}, which is no text.")
        wanted = plain_span(span)
        if not wanted:
            return None
        return float(plain_span(last_boxed(text) if self.boxed else text) == wanted)
