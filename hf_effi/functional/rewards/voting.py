"""A vote among the answers of a group, in the place of a label."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from ..data import check_number


@dataclass(frozen=True)
class Vote:
    """
    How a group voted.

    Args:
        label: The answer that won, as the first completion that gave it wrote it; `None` where the vote abstains.
        ratio (`float`): Votes of the largest class over all answers, those that could not be read included, in [0, 1].
        agrees (`tuple[bool, ...]`): Whether each answer is in the largest class; all `False` without a readable one.
        classes (`int`): Different answers.
    """

    label: Any
    ratio: float
    agrees: tuple[bool, ...]
    classes: int

    @property
    def decided(self) -> bool:
        """Whether there is a label."""
        return self.label is not None


def is_answer(value: Any) -> bool:
    """
    Return whether a value can be an answer: not `None`, no text of nothing but spaces, no empty list, no NaN.

    Example:
    ```python
    >>> [is_answer(value) for value in ("7", 0, "", "  ", None, [], float("nan"))]
    [True, True, False, False, False, False, False]
    ```
    """
    if value is None or (isinstance(value, float) and value != value):
        return False
    if isinstance(value, str):
        return bool(value.strip())
    return not (isinstance(value, Collection) and len(value) == 0)


def answer_classes(answers: Sequence[Any], same: Callable[[Any, Any], bool] | None = None) -> list[int | None]:
    """
    Return the class of each answer, numbered in the order in which classes are first seen; `None` for no answer.

    An answer belongs to the first class whose first member it is the same as, so that `same` need not be transitive.

    Args:
        answers (`Sequence`): Of one group. What [`is_answer`] refuses is in no class.
        same (`Callable`, *optional*): `same(first, answer)`, whether a verifier takes the two for one. `==` without.

    Example:
    ```python
    >>> answer_classes(["0.5", ".50", "", "2"], same=lambda a, b: float(a) == float(b))
    [0, 0, None, 1]
    ```
    """
    firsts: list[Any] = []
    found: list[int | None] = []
    for answer in answers:
        if not is_answer(answer):
            found.append(None)
            continue
        number = next((n for n, first in enumerate(firsts) if _same(first, answer, same)), len(firsts))
        if number == len(firsts):
            firsts.append(answer)
        found.append(number)
    return found


def majority_vote(
    answers: Sequence[Any], same: Callable[[Any, Any], bool] | None = None, min_ratio: float = 0.0
) -> Vote:
    """
    Let the answers of a group vote on their label.

    The largest class of [`answer_classes`] wins, of two equally large ones the one that was seen first. The vote
    abstains where no answer can be read, and where `votes / len(answers) < min_ratio`. TTRL, Sec. 3,
    [2504.16084](https://huggingface.co/papers/2504.16084); its code counts texts as they are, and lets an empty one
    win.

    Args:
        answers (`Sequence`): Of one group, `None` for one that cannot be read.
        same (`Callable`, *optional*): As in [`answer_classes`].
        min_ratio (`float`, *optional*, defaults to 0): Smallest share of the votes with which an answer wins, in
            [0, 1].

    Returns:
        [`Vote`]

    Raises:
        ValueError: `min_ratio` is out of range.

    Example:
    ```python
    >>> majority_vote(["a", "a", "b", "c"])
    Vote(label='a', ratio=0.5, agrees=(True, True, False, False), classes=3)
    >>> majority_vote(["", "", "", "7"]).label, majority_vote(["a", "b"], min_ratio=0.6).label
    ('7', None)
    ```
    """
    check_number("min_ratio", min_ratio, 0, 1)
    classes = answer_classes(answers, same)
    number = 1 + max((c for c in classes if c is not None), default=-1)
    if not number:
        return Vote(None, 0.0, (False,) * len(answers), 0)
    votes = [classes.count(c) for c in range(number)]
    winner = votes.index(max(votes))
    ratio = votes[winner] / len(answers)
    # 0.1 * 3 is above 0.3: a ratio that is just reached must win.
    label = answers[classes.index(winner)] if ratio >= min_ratio - 1e-9 else None
    return Vote(label, ratio, tuple(c == winner for c in classes), number)


def _same(first: Any, answer: Any, same: Callable[[Any, Any], bool] | None) -> bool:
    return bool(first == answer if same is None else same(first, answer))


def generator_rewards(hits: Sequence[int], tries: int) -> list[float]:
    """
    Reward those who choose what is masked: `1 - hits / tries`, and 0 where nobody got it.

    A span that is never found is noise, not a hard question. [PretrainZero](https://huggingface.co/papers/2512.03442)
    trains its generator of masks with it.

    Args:
        hits (`Sequence[int]`): Right predictions of each span, in [0, tries].
        tries (`int`): Predictions of a span, at least 1.

    Raises:
        ValueError: a number out of range.

    Example:
    ```python
    >>> generator_rewards([0, 1, 4, 8], tries=8)
    [0.0, 0.875, 0.5, 0.0]
    ```
    """
    if not isinstance(tries, int) or isinstance(tries, bool) or tries < 1:
        raise ValueError(f"tries={tries!r} must be an integer of at least 1.")
    for place, count in enumerate(hits):
        if not 0 <= count <= tries:
            raise ValueError(
                f"hits[{place}]={count!r} is outside [0, {tries}]: nobody is right more often than tried."
            )
    return [1 - count / tries if count else 0.0 for count in hits]
