"""Rewards of an answer that is compared with a column of the dataset: a number, a letter, a text."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from ..functional.data import check_number
from ..functional.kept_arguments import keeps_arguments
from ..functional.rewards.answers import (
    MARKS,
    boxed_answers,
    choice_of,
    marked_answers,
    marked_choices,
    text_after,
    text_within,
)
from ..functional.rewards.matching import normal_tokens, token_f1
from ..functional.rewards.numbers import numbers_in, parse_number
from .base import Reward

#: characters of the longest text that is looked at for one number
_LONGEST = 1000


def check_name(what: str, value: Any, optional: bool = True) -> None:
    """Raise unless `value` is a name of a column or tag, or `None` where that is allowed."""
    if value is None and optional:
        return
    if not isinstance(value, str) or not value or set(value) & set("<>/ \n"):
        raise ValueError(f"{what}={value!r} must be a name without brackets and spaces.")


def check_flags(**flags: Any) -> None:
    """Raise unless each is `True` or `False`."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name}={value!r} must be True or False.")


class AnswerReward(Reward):
    """
    What rewards of answers share: which part of a completion is the answer, and what it is compared with.

    A subclass says in [`~AnswerReward.compare`] what an answer is worth beside one gold answer, or `None` where that
    is none. A row whose column is `None`, or holds no answer that can be read, has no reward; of a list of gold
    answers the best counts. A completion without the part that was asked for has 0.

    Args:
        column (`str`): Column of the dataset with the gold answer, or with a list of them.
        after_tag (`str`, *optional*): Only what follows the last `</after_tag>` counts: `"think"` for a model that
            reasons. A completion that never gets there has 0.
        within_tag (`str`, *optional*): Only the content of the last closed `<within_tag>` counts.
        name (`str`, *optional*): What the trainer logs it as.

    Raises:
        ValueError: a name that is none.
    """

    def __init__(
        self, column: str, after_tag: str | None = None, within_tag: str | None = None, name: str | None = None
    ) -> None:
        super().__init__(name)
        check_name("column", column, optional=False)
        check_name("after_tag", after_tag)
        check_name("within_tag", within_tag)
        self.column_name, self.after_tag, self.within_tag = column, after_tag, within_tag
        self.needs = (column,)

    def score(self, text: str, *row: Any) -> float | None:
        """Return the reward of one text beside the value of its column."""
        golds = list(row[0]) if isinstance(row[0], (list, tuple, set)) else [row[0]]
        part: str | None = text
        if self.after_tag is not None:
            part = text_after(text, f"</{self.after_tag}>")
        if part is not None and self.within_tag is not None:
            part = text_within(part, self.within_tag)
        found = [self.compare(part or "", gold) for gold in golds if gold is not None]
        known = [value for value in found if value is not None]
        if not known:
            return None
        return max(known) if part is not None else 0.0

    def compare(self, text: str, gold: Any) -> float | None:
        """Return what a text is worth beside one gold answer, `None` where that cannot be read."""
        raise NotImplementedError(f"{type(self).__name__} does not define compare.")


class LastNumberReward(AnswerReward):
    """
    1 where the last number of a completion is the gold number, else 0. The rule for GSM8K.

    Numbers are exact: 3/4 is 0.75, `1,000` is 1000, and `1,00` is none. A gold text may end like those of GSM8K, in
    `#### 72`.

    The last number can be hacked: a policy learns to end in a list of guesses, or to name the likeliest number last.
    With `strict=True` only a marked answer counts, in `\\boxed{}` or after a mark, and only if all marked answers of
    the completion are one number; a mark with two numbers behind it is wrong.

    Args:
        column (`str`, *optional*, defaults to `"answer"`): Column with the gold number, as a number or a text.
        strict (`bool`, *optional*, defaults to `False`): Only marked answers count.
        marks (`Sequence[str]`, *optional*): With `strict`, what an answer stands behind, in any case. Defaults to
            `####`, `answer is` and `answer:`.
        percent (`bool`, *optional*, defaults to `False`): Read `50%` as 0.5 rather than as 50.
        tolerance (`float`, *optional*, defaults to 0.0): Relative error that is still right, in [0, 1).
        after_tag, within_tag, name: See [`AnswerReward`].

    Raises:
        ValueError: an option out of range, or `marks` without `strict`.

    Example:
    ```python
    >>> reward = LastNumberReward()
    >>> reward(completions=["6 * 12 = 72", "So $72.00.", "70, 71, 72", "71", ""], answer=["#### 72"] * 5)
    [1.0, 1.0, 1.0, 0.0, 0.0]
    >>> LastNumberReward(strict=True)(completions=["#### 72", "70, 71, 72", "#### 71\\n#### 72"], answer=[72] * 3)
    [1.0, 0.0, 0.0]
    ```
    """

    @keeps_arguments
    def __init__(
        self,
        column: str = "answer",
        strict: bool = False,
        marks: Sequence[str] | None = None,
        percent: bool = False,
        tolerance: float = 0.0,
        after_tag: str | None = None,
        within_tag: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(column, after_tag, within_tag, name)
        check_flags(strict=strict, percent=percent)
        if marks is not None and not strict:
            raise ValueError(f"marks={marks!r} count with strict=True only.")
        if marks is not None and (
            isinstance(marks, str) or not marks or not all(isinstance(mark, str) and mark.strip() for mark in marks)
        ):
            raise ValueError(f"marks={marks!r} must be a list of texts such as 'answer is'.")
        self.strict, self.percent = strict, percent
        self.marks = MARKS if marks is None else tuple(marks)
        self.tolerance = check_number("tolerance", tolerance, 0.0, 1.0, open_high=True)

    def compare(self, text: str, gold: Any) -> float | None:
        """Return 1 or 0, or `None` where the gold answer is no number."""
        wanted = self._gold(gold)
        if wanted is None:
            return None
        found = self._marked(text) if self.strict else next(iter(numbers_in(text, self.percent, last=1)), None)
        return float(found is not None and abs(found - wanted) <= Fraction(self.tolerance) * abs(wanted))

    def _gold(self, gold: Any) -> Fraction | None:
        if isinstance(gold, str) and "####" in gold:
            gold = gold.rpartition("####")[2]
        number = parse_number(gold, self.percent)
        if number is None and isinstance(gold, str):
            numbers = numbers_in(gold, self.percent) if len(gold) <= _LONGEST else []
            number = numbers[0] if len(numbers) == 1 else None
        return number

    def _marked(self, text: str) -> Fraction | None:
        parts = [*marked_answers(text, self.marks), *(part or "" for part in boxed_answers(text))]
        found: set[Fraction] = set()
        for place, part in enumerate(parts):
            numbers = set(numbers_in(part, self.percent)) if len(part) <= _LONGEST else set()
            if len(numbers) > 1 or not numbers and place == len(parts) - 1:
                return None
            found |= numbers
        return found.pop() if len(found) == 1 else None


class ChoiceReward(AnswerReward):
    r"""
    1 where a completion chooses the gold letter, A to J, else 0.

    `(B)`, `B.`, `**B**`, "The answer is B", `\boxed{B}` and `\boxed{\text{(B)}}` are read; "B or C" is no choice. The
    last mark or box counts, and without one the last line, or the last letter in brackets.

    Args:
        column (`str`, *optional*, defaults to `"answer"`): Column with the gold letter, or with its number from 0 as
            an integer, as MMLU has it.
        strict (`bool`, *optional*, defaults to `False`): Only a letter after a mark or in a box counts, and all marked
            letters of the completion must be the same.
        after_tag, within_tag, name: See [`AnswerReward`].

    Raises:
        ValueError: an option out of range.

    Example:
    ```python
    >>> reward = ChoiceReward()
    >>> reward(completions=["The answer is (B).", "B", "B or C", "A. no\nB. yes"], answer=["B", 1, "B", "B"])
    [1.0, 1.0, 0.0, 1.0]
    >>> ChoiceReward(strict=True)(completions=["B", "Answer: A. No, answer: B"], answer=["B", "B"])
    [0.0, 0.0]
    ```
    """

    @keeps_arguments
    def __init__(
        self,
        column: str = "answer",
        strict: bool = False,
        after_tag: str | None = None,
        within_tag: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(column, after_tag, within_tag, name)
        check_flags(strict=strict)
        self.strict = strict

    def compare(self, text: str, gold: Any) -> float | None:
        """Return 1 or 0, or `None` where the gold answer is no letter."""
        if isinstance(gold, int) and not isinstance(gold, bool):
            wanted = "ABCDEFGHIJ"[gold] if 0 <= gold < 10 else None
        else:
            wanted = choice_of(gold) if isinstance(gold, str) else None
        if wanted is None:
            return None
        if not self.strict:
            return float(choice_of(text) == wanted)
        return float(set(marked_choices(text)) == {wanted})


class ExactMatchReward(AnswerReward):
    """
    1 where a completion is the gold text, character by character but for white space around it, else 0.

    Args:
        column (`str`, *optional*, defaults to `"answer"`): Column with the gold text, or with a list of them.
        after_tag, within_tag, name: See [`AnswerReward`].

    Raises:
        ValueError: an option out of range.

    Example:
    ```python
    >>> ExactMatchReward()(completions=["Paris\\n", "paris", ""], answer=["Paris", "Paris", None])
    [1.0, 0.0, None]
    ```
    """

    @keeps_arguments
    def __init__(
        self,
        column: str = "answer",
        after_tag: str | None = None,
        within_tag: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(column, after_tag, within_tag, name)

    def compare(self, text: str, gold: Any) -> float | None:
        """Return 1 or 0, or `None` where there is no gold text."""
        wanted = _plain(gold)
        return None if wanted is None else float(text.strip() == wanted)


def _plain(gold: Any) -> str | None:
    if isinstance(gold, bool) or not isinstance(gold, (str, int, float)):
        return None
    return str(gold).strip() or None


class _TokensReward(AnswerReward):
    """The options of [`normal_tokens`], for two rewards."""

    @keeps_arguments
    def __init__(
        self,
        column: str = "answer",
        case: bool = False,
        punctuation: bool = False,
        articles: bool = False,
        units: bool = True,
        after_tag: str | None = None,
        within_tag: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(column, after_tag, within_tag, name)
        check_flags(case=case, punctuation=punctuation, articles=articles, units=units)
        self.case, self.punctuation, self.articles, self.units = case, punctuation, articles, units

    def tokens(self, text: str) -> list[str]:
        """Return the normalised tokens of a text; of one that is nothing but punctuation, itself."""
        found = normal_tokens(text, self.case, self.punctuation, self.articles, self.units)
        return found or text.split()


class NormalizedMatchReward(_TokensReward):
    """
    1 where a completion says the gold text up to case, punctuation, articles and notation, else 0.

    See [`normal_tokens`] for what is the same: full-width forms, minus signs, quotes, thousands commas, `1.50` and
    `1.5`, a fence of Markdown around the text.

    Args:
        column (`str`, *optional*, defaults to `"answer"`): Column with the gold text, or with a list of them.
        case, punctuation, articles (`bool`, *optional*, default to `False`): Whether they count.
        units (`bool`, *optional*, defaults to `True`): Whether units, percent signs and currencies count.
        after_tag, within_tag, name: See [`AnswerReward`].

    Raises:
        ValueError: an option out of range.

    Example:
    ```python
    >>> reward = NormalizedMatchReward()
    >>> reward(completions=["The Eiffel tower.", "−1,000", "5 km", "tower"], answer=["eiffel tower", -1000, "5", "x"])
    [1.0, 1.0, 0.0, 0.0]
    >>> NormalizedMatchReward(units=False)(completions=["5 km"], answer=["5"])
    [1.0]
    ```
    """

    def compare(self, text: str, gold: Any) -> float | None:
        """Return 1 or 0, or `None` where there is no gold text."""
        wanted = _plain(gold)
        return None if wanted is None else float(self.tokens(text) == self.tokens(wanted))


class TokenF1Reward(_TokensReward):
    """
    The F1 score of the words of a completion and of the gold text, in [0, 1], as in SQuAD.

    Words are those of [`normal_tokens`], formula and paper at [`token_f1`]. A long completion that has all words of
    the answer has a low precision: ask for a short answer, or look into a tag by `within_tag`.

    Args:
        column (`str`, *optional*, defaults to `"answer"`): Column with the gold text, or with a list of them.
        case, punctuation, articles (`bool`, *optional*, default to `False`): Whether they count.
        units (`bool`, *optional*, defaults to `True`): Whether units, percent signs and currencies count.
        after_tag, within_tag, name: See [`AnswerReward`].

    Raises:
        ValueError: an option out of range.

    Example:
    ```python
    >>> TokenF1Reward()(completions=["in Paris", "Rome", ""], answer=["Paris", ["Milan", "in Rome"], "Oslo"])
    [0.6666666666666666, 0.6666666666666666, 0.0]
    ```
    """

    def compare(self, text: str, gold: Any) -> float | None:
        """Return the F1 score, or `None` where there is no gold text."""
        wanted = _plain(gold)
        return None if wanted is None else token_f1(self.tokens(text), self.tokens(wanted))


#: [`LastNumberReward`] of the column `answer`, for a YAML
last_number_reward = LastNumberReward()
#: [`LastNumberReward`] of the column `answer`, only of marked answers, for a YAML
strict_number_reward = LastNumberReward(strict=True, name="strict_number_reward")
#: [`ChoiceReward`] of the column `answer`, for a YAML
choice_reward = ChoiceReward()
#: [`ExactMatchReward`] of the column `answer`, for a YAML
exact_match_reward = ExactMatchReward()
#: [`NormalizedMatchReward`] of the column `answer`, for a YAML
normalized_match_reward = NormalizedMatchReward()
#: [`TokenF1Reward`] of the column `answer`, for a YAML
token_f1_reward = TokenF1Reward()
