"""Rewards of the form of a completion: tags, constraints that a program can check, lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ..errors import RewardError
from ..functional.data import check_count
from ..functional.kept_arguments import keeps_arguments
from ..functional.rewards.formats import soft_overlong, tag_conditions
from ..functional.rewards.instructions import check_instruction, loose_forms
from .answers import check_flags, check_name
from .base import Reward


class TagFormatReward(Reward):
    """
    1 where a completion has each tag once, closed, not empty, and in order, else 0; or the share of what it keeps.

    The conditions are those of [`tag_conditions`].

    Args:
        tags (`Sequence[str]`, *optional*, defaults to `("think", "answer")`): Names of the tags, without brackets.
        order (`bool`, *optional*, defaults to `True`): They come in this order.
        only (`bool`, *optional*, defaults to `False`): Nothing but white space stands outside of them.
        opened (`bool`, *optional*, defaults to `False`): The prompt ends with the first opening tag, as the chat
            templates of reasoning models do.
        empty (`bool`, *optional*, defaults to `False`): A tag may be empty.
        partial (`bool`, *optional*, defaults to `False`): The reward is the share of the conditions that hold. A
            policy can then live of empty forms: give it a small weight.
        name (`str`, *optional*): What the trainer logs it as.

    Raises:
        ValueError: no tags, two of a name, or an option out of range.

    Example:
    ```python
    >>> reward = TagFormatReward()
    >>> reward(completions=["<think>2</think><answer>4</answer>", "<answer>4</answer><think>2</think>", "4"])
    [1.0, 0.0, 0.0]
    >>> TagFormatReward(partial=True)(completions=["<think>2</think><answer>4"])
    [0.25]
    ```
    """

    @keeps_arguments
    def __init__(
        self,
        tags: Sequence[str] = ("think", "answer"),
        order: bool = True,
        only: bool = False,
        opened: bool = False,
        empty: bool = False,
        partial: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        if isinstance(tags, str) or not tags or len(set(tags)) < len(tags):
            raise ValueError(f"tags={tags!r} must be a list of names, each once.")
        for tag in tags:
            check_name("a tag", tag, optional=False)
        check_flags(order=order, only=only, opened=opened, empty=empty, partial=partial)
        self.tags, self.order, self.only = tuple(tags), order, only
        self.opened, self.empty, self.partial = opened, empty, partial

    def score(self, text: str, *row: Any) -> float:
        """Return the reward of one text."""
        kept = tag_conditions(text, self.tags, self.order, self.only, self.opened, self.empty).values()
        return sum(kept) / len(kept) if self.partial else float(all(kept))


class InstructionReward(Reward):
    """
    1 where a completion keeps all constraints of its row, or the share that it keeps: the data format of IFEval.

    A row without constraints has no reward. `INSTRUCTIONS` of `hf_effi.functional.rewards` has the ids.

    Args:
        column (`str`, *optional*, defaults to `"instruction_id_list"`): Column with a list of ids.
        kwargs_column (`str`, *optional*, defaults to `"kwargs"`): Column with a list of their arguments, each a
            mapping.
        loose (`bool`, *optional*, defaults to `False`): IFEval's loose rule: a constraint is kept if one of
            [`loose_forms`] keeps it. It forgives an introduction and bold type.
        fraction (`bool`, *optional*, defaults to `False`): The share of the constraints that are kept.
        name (`str`, *optional*): What the trainer logs it as.

    Raises:
        ValueError: an option out of range.

    Example:
    ```python
    >>> reward = InstructionReward(fraction=True)
    >>> ids = ["punctuation:no_comma", "length_constraints:number_words"]
    >>> arguments = [{}, {"num_words": 3, "relation": "at least"}]
    >>> reward(completions=["one two three", "one, two"], instruction_id_list=[ids] * 2, kwargs=[arguments] * 2)
    [1.0, 0.0]
    ```
    """

    @keeps_arguments
    def __init__(
        self,
        column: str = "instruction_id_list",
        kwargs_column: str = "kwargs",
        loose: bool = False,
        fraction: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        check_name("column", column, optional=False)
        check_name("kwargs_column", kwargs_column, optional=False)
        check_flags(loose=loose, fraction=fraction)
        self.column_name, self.kwargs_column, self.loose, self.fraction = column, kwargs_column, loose, fraction
        self.needs = (column, kwargs_column)

    def score(self, text: str, *row: Any) -> float | None:
        """Return the reward of one text, given its ids and their arguments."""
        ids, arguments = row
        if ids is None or not isinstance(ids, str) and not len(ids):
            return None
        if isinstance(ids, str) or any(not isinstance(one, str) for one in ids):
            raise RewardError(f"{self.__name__}: the column {self.column_name!r} must hold lists of ids, got {ids!r}.")
        given = [None] * len(ids) if arguments is None else arguments
        fits = isinstance(given, Sequence) and not isinstance(given, str) and len(given) == len(ids)
        if not fits or any(one is not None and not isinstance(one, Mapping) for one in given):
            raise RewardError(
                f"{self.__name__}: the column {self.kwargs_column!r} must hold a list of {len(ids)} mappings, one for "
                f"each id of the row, got {given!r}."
            )
        forms = loose_forms(text) if self.loose else [text]
        try:
            kept = [any(check_instruction(form, *pair) for form in forms) for pair in zip(ids, given, strict=True)]
        except ValueError as error:
            raise RewardError(f"{self.__name__}: {error}") from None
        return sum(kept) / len(kept) if self.fraction else float(all(kept))


class SoftOverlongReward(Reward):
    """
    0 for a completion that is short enough, down to -1 at the longest one that is allowed: DAPO's soft punishment.

    Formula and paper at [`soft_overlong`]. The numbers are those of TRL's `get_soft_overlong_punishment`, which
    pickles too; this one refuses lengths that make no sense, has a name for the log, and can be written into a
    model card.

    Args:
        max_tokens (`int`): Tokens from which on the reward is -1: `max_completion_length`.
        cache_tokens (`int`): The last tokens before that, over which it falls.
        name (`str`, *optional*): What the trainer logs it as.

    Raises:
        ValueError: no such numbers of tokens.

    Example:
    ```python
    >>> reward = SoftOverlongReward(100, 20)
    >>> reward(completions=["", "", ""], completion_ids=[[1] * 80, [1] * 90, [1] * 100])
    [0.0, -0.5, -1.0]
    ```
    """

    needs = ("completion_ids",)

    @keeps_arguments
    def __init__(self, max_tokens: int, cache_tokens: int, name: str | None = None) -> None:
        super().__init__(name)
        soft_overlong(0, max_tokens, cache_tokens)
        self.max_tokens, self.cache_tokens = max_tokens, cache_tokens

    def score(self, text: str, *row: Any) -> float:
        """Return the reward of one completion, given its token ids."""
        return soft_overlong(len(row[0]), self.max_tokens, self.cache_tokens)


class LengthMatchReward(Reward):
    """
    1 for a completion of as many tokens as its row asks for, and less by one for each `scale` tokens beside that.

    `max(0, 1 - |L - L_row| / scale)`; with `over_only` a shorter completion has 1 too. The verifiers `max_length` and
    `up_to_max_length` of Tülu 3's code.

    Args:
        column (`str`, *optional*, defaults to `"answer"`): Column with a number of tokens.
        over_only (`bool`, *optional*, defaults to `False`): Only a longer completion loses.
        scale (`int`, *optional*, defaults to 8192): Tokens at which nothing is left.
        name (`str`, *optional*): What the trainer logs it as.

    Raises:
        ValueError: an option out of range.

    Example:
    ```python
    >>> reward = LengthMatchReward(scale=10)
    >>> reward(completions=["", ""], completion_ids=[[1] * 5, [1] * 8], answer=[5, 10])
    [1.0, 0.8]
    ```
    """

    @keeps_arguments
    def __init__(
        self, column: str = "answer", over_only: bool = False, scale: int = 8192, name: str | None = None
    ) -> None:
        super().__init__(name)
        check_name("column", column, optional=False)
        check_flags(over_only=over_only)
        self.column_name, self.over_only, self.scale = column, over_only, check_count("scale", scale)
        self.needs = ("completion_ids", column)

    def score(self, text: str, *row: Any) -> float | None:
        """Return the reward of one completion, given its token ids and the number that was asked for."""
        try:
            wanted = float(row[1])
        except (TypeError, ValueError, OverflowError):
            return None
        if not 0 <= wanted < float("inf"):
            return None
        beside = len(row[0]) - wanted
        return max(0.0, 1.0 - (max(beside, 0.0) if self.over_only else abs(beside)) / self.scale)


#: how several rewards of a row become one
How = Literal["sum", "mean", "last"]
#: [`TagFormatReward`] of `<think>` and `<answer>`, for a YAML
think_answer_format_reward = TagFormatReward(name="think_answer_format_reward")
#: [`InstructionReward`] of IFEval's columns, for a YAML
instruction_reward = InstructionReward()
