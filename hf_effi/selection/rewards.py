"""Reward functions beyond one number for one completion: side columns, groups as a whole, milestones."""

from __future__ import annotations

import copyreg
import inspect
import itertools
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ..errors import RewardError
from ..functional.data import check_count, check_number
from ..functional.kept_arguments import keeps_arguments

#: most patterns that one `MilestoneReward` looks for
MOST_PATTERNS = 256


def name_of(fn: Any) -> str:
    """Return what TRL calls a reward function: its `__name__`, or that of its class."""
    inner = fn
    while hasattr(inner, "func") and hasattr(inner, "keywords"):  # functools.partial
        inner = inner.func
    return str(getattr(inner, "__name__", type(inner).__name__))


def is_async(fn: Any) -> bool:
    """Return whether a call of `fn` returns a coroutine."""
    inner = fn
    while hasattr(inner, "func") and hasattr(inner, "keywords"):
        inner = inner.func
    return inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(getattr(inner, "__call__", None))  # noqa: B004


class _Wrapped:
    """A callable around a reward function, which pickles where the function does, also as its decorator."""

    fn: Callable[..., Any]
    __name__: str

    def _take(self, fn: Any, name: str | None, who: str) -> None:
        if not callable(fn):
            raise TypeError(f"{who} needs a reward function, got {type(fn).__name__} {fn!r}.")
        if isinstance(fn, nn.Module):
            raise TypeError(
                f"{who} needs a reward function, got the model {type(fn).__name__}, which TRL tokenizes for. Pass a "
                "function that tokenizes and calls it."
            )
        if name is not None and (not isinstance(name, str) or not name):
            raise ValueError(f"name={name!r} must be a text, or None for the name of the function.")
        self.fn = fn
        self.__name__ = name or name_of(fn)
        self.__qualname__ = str(getattr(fn, "__qualname__", self.__name__))
        self.__module__ = str(getattr(fn, "__module__", __name__))
        self.__doc__ = getattr(fn, "__doc__", None)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.__name__})"

    def __reduce__(self) -> Any:
        found: Any = sys.modules.get(self.__module__)
        for part in self.__qualname__.split("."):
            found = getattr(found, part, None)
        if found is self:  # a decorated function: the name leads here
            return self.__qualname__
        return copyreg.__newobj__, (type(self),), dict(vars(self))  # type: ignore[attr-defined]


class SideColumn(_Wrapped):
    """
    What [`side_column`] returns.

    Args:
        fn, name: As there.
    """

    def __init__(self, fn: Callable[..., Any], name: str | None = None) -> None:
        self._take(fn, name, "side_column")

    def __call__(self, *args: Any, **kwargs: Any) -> list[None]:
        """Under a stock trainer: show the numbers in the log, and reward nothing."""
        return self._shown(self.fn(*args, **kwargs), kwargs)

    def _shown(self, values: Any, kwargs: dict[str, Any]) -> list[None]:
        if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
            raise RewardError(f"side column {self.__name__!r} returned {values!r}, not one number per completion.")
        numbers = [math.nan if value is None else float(value) for value in values]
        known = [number for number in numbers if not math.isnan(number)]
        if known and callable(log_metric := kwargs.get("log_metric")):
            log_metric(self.__name__, sum(known) / len(known))
        if callable(log_extra := kwargs.get("log_extra")):
            log_extra(self.__name__, numbers)
        return [None] * len(numbers)


class _AsyncSideColumn(SideColumn):
    """The same for a function that is awaited: TRL asks the class whether it is one."""

    async def __call__(self, *args: Any, **kwargs: Any) -> list[None]:  # type: ignore[override]
        return self._shown(await self.fn(*args, **kwargs), kwargs)


def side_column(fn: Callable[..., Any], name: str | None = None) -> SideColumn:
    """
    A reward function whose numbers travel with the completions and are no reward.

    Pass it in the list of `reward_funcs`. [`EffiGRPOTrainer`] calls it after the reward functions, gathers its numbers
    and shows them to filters, pruners, selectors and advantage transforms as `groups.side[name]`, and to callbacks.
    Rewards, advantages and weights are to the bit what they are without it, for any `reward_weights`: its own weight
    is read by nobody. It logs `rewards/<name>/mean`, over the completions for which it has a number.

    With a stock `GRPOTrainer` it is no reward either; it logs its mean as `<name>` and shows its numbers in the table
    of completions. (TRL logs `rewards/<name>/mean` as NaN then.)

    Args:
        fn (`Callable`): As a reward function of TRL, also asynchronous: returns one number for each completion, `None`
            or NaN where it has none.
        name (`str`, *optional*): Defaults to the function's.

    Raises:
        TypeError, ValueError: `fn` cannot be called, or `name` is no text.

    Example:
    ```python
    >>> def seconds(completions, **kwargs):
    ...     return [0.5 for _ in completions]
    >>> column = side_column(seconds)
    >>> column.__name__, column(completions=["4", "5"])
    ('seconds', [None, None])
    ```
    """
    return (_AsyncSideColumn if callable(fn) and is_async(fn) else SideColumn)(fn, name)


class GroupReward(_Wrapped):
    """
    What [`group_reward`] returns.

    Args:
        fn, group_size, name: As there.
    """

    def __init__(self, fn: Callable[..., Any], group_size: int | None = None, name: str | None = None) -> None:
        self._take(fn, name, "group_reward")
        if is_async(fn):
            raise TypeError(
                f"group_reward: {self.__name__} is asynchronous, and ranks must communicate in one order. Pass a "
                "function that returns its rewards, e.g. by asyncio.run inside of it."
            )
        self.group_size = None if group_size is None else check_count("group_size", group_size)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **kwargs: Any) -> list[Any]:
        return self.of_groups(self.group_size, prompts, completions, **kwargs)

    def of_groups(
        self, group_size: int | None, prompts: Sequence[Any], completions: Sequence[Any], **kwargs: Any
    ) -> list[Any]:
        """
        Return the rewards of this rank's completions. Every rank must call it.

        Args:
            group_size (`int`, *optional*): Completions of a prompt, which stand one after the other.
            prompts, completions, kwargs: Of this rank, as TRL passes them.
        """
        from accelerate import PartialState
        from accelerate.utils import gather_object

        world = PartialState()
        columns = {
            key: list(value)
            for key, value in kwargs.items()
            if isinstance(value, (list, tuple)) and len(value) == len(prompts) and key != "environments"
        }
        mine = {"prompts": list(prompts), "completions": list(completions), **columns}
        everybodys: list[dict[str, list[Any]]] = gather_object([mine])
        start = sum(len(part["prompts"]) for part in everybodys[: world.process_index])
        place = slice(start, start + len(prompts))
        names = dict.fromkeys(name for part in everybodys for name in part)
        whole = {
            name: [v for part in everybodys for v in part.get(name, [None] * len(part["prompts"]))] for name in names
        }
        rest = {name: value for name, value in kwargs.items() if name not in columns}
        if callable(log_extra := rest.get("log_extra")):
            rest["log_extra"] = lambda column, values: log_extra(column, list(values)[place])
        values, error = None, None
        try:
            self._check(group_size, whole, rest, world.num_processes)
            values = self._values(self.fn(**whole, **rest, group_size=group_size), len(whole["prompts"]))
        except Exception as problem:
            if world.num_processes == 1:
                raise
            error = problem
        if world.num_processes > 1:  # nobody goes on alone
            told = gather_object([None if error is None else f"{type(error).__name__}: {error}"])
            failed = [(rank, text) for rank, text in enumerate(told) if text is not None]
            if failed:
                rank, text = failed[0]
                raise RewardError(f"group reward {self.__name__!r} failed on rank {rank}: {text}") from error
        found: list[Any] = values[place]  # type: ignore[index]
        return found

    def _check(self, group_size: int | None, whole: dict[str, list[Any]], rest: dict[str, Any], ranks: int) -> None:
        who, rows = f"group reward {self.__name__!r}", len(whole["prompts"])
        if group_size is None:
            raise ValueError(
                f"{who}: the size of a group is not known. EffiGRPOTrainer tells it; for a stock trainer, or a call "
                "by hand, give it: group_reward(fn, group_size=8)."
            )
        if "group_size" in {**whole, **rest}:
            raise ValueError(f"{who}: the dataset has a column 'group_size', which is what the function is told.")
        if ranks > 1 and rest.get("environments") is not None:
            raise ValueError(f"{who}: environments stay on their rank. Use one process, or a reward for each row.")
        if rows % group_size:
            raise ValueError(f"{who}: {rows} completions are no whole groups of group_size={group_size}.")
        for first in range(0, rows, group_size):
            prompts = whole["prompts"][first : first + group_size]
            if any(prompt != prompts[0] for prompt in prompts[1:]):
                raise ValueError(
                    f"{who}: completions {first} to {first + group_size - 1} are of several prompts, so that "
                    f"group_size={group_size} is not what the trainer generates. It is num_generations, in "
                    "evaluation num_generations_eval."
                )

    def _values(self, values: Any, expected: int) -> list[Any]:
        if hasattr(values, "tolist"):
            column = getattr(values, "ndim", None) == 2 and values.shape[1] == 1
            values = (values.reshape(-1) if column else values).tolist()
        if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
            raise RewardError(f"group reward {self.__name__!r} returned {values!r}, not one number per completion.")
        found = list(itertools.islice(values, expected + 1))  # a generator need not end
        if len(found) != expected:
            told = f"more than {expected}" if found[expected:] else str(len(found))
            raise RewardError(
                f"group reward {self.__name__!r} returned {told} rewards for {expected} completions: the "
                "function gets the groups of all processes and returns a number for each of their completions."
            )
        return found


def group_reward(fn: Callable[..., Any], group_size: int | None = None, name: str | None = None) -> GroupReward:
    """
    A reward function that sees whole groups, wherever their completions lie.

    TRL calls a reward function on each process with the completions of that process, and a group can lie on two. `fn`
    is called on every process with the completions of all of them, in the order of generation, so that each prompt has
    its `group_size` completions one after the other; each process takes its own share of what `fn` returns. `fn` must
    return the same on every process. An error on one process is raised on all.

    Args:
        fn (`Callable`): `fn(prompts, completions, group_size=..., **kwargs)` with TRL's other arguments; columns of
            the dataset, which have one entry for each completion, are gathered too. Returns one number for each
            completion, or `None`.
        group_size (`int`, *optional*): For a stock `GRPOTrainer` only, which cannot tell it: then all calls have
            groups of this size, so that `num_generations_eval` must be the same. [`EffiGRPOTrainer`] tells it itself
            (`num_generations`, in evaluation `num_generations_eval`), and refuses another one.
        name (`str`, *optional*): Defaults to the function's.

    Returns:
        `GroupReward`: The reward function, which pickles where `fn` does. Two collectives for each call with several
        processes.

    Raises:
        TypeError, ValueError: `fn` cannot be called or is asynchronous, or `group_size` is no count.

    Example:
    ```python
    >>> def rarest(prompts, completions, group_size, **kwargs):
    ...     groups = [completions[i : i + group_size] for i in range(0, len(completions), group_size)]
    ...     return [1.0 / group.count(text) for group in groups for text in group]
    >>> group_reward(rarest, group_size=2)(["1+1="] * 2 + ["2+2="] * 2, ["2", "2", "4", "5"])
    [0.5, 0.5, 1.0, 1.0]
    ```
    """
    return GroupReward(fn, group_size, name)


def _all_text_of(completion: Any) -> str:
    """Return the text of all messages, also of those of tools: a milestone may be printed by one."""
    if isinstance(completion, str):
        return completion
    return "\n".join(_content(message.get("content")) for message in completion)


def _content(content: Any) -> str:
    if isinstance(content, (list, tuple)):  # parts of a message, of which some are texts
        return "".join(str(part.get("text") or "") for part in content)
    return str(content or "")


class MilestoneReward:
    r"""
    Partial credit for programs that do not reach the end: a true score, or what they got to.

    `r = final` where there is a score of a valid solution, else `fail + each * hits` with the number of patterns that
    match. A pattern counts once.

    From [2509.01684](https://huggingface.co/papers/2509.01684), where a frozen copy of the model inserts the print
    statements that the patterns look for, with `each=0.1` and `fail=-10`. The policy must not print them itself: it
    learns to.

    Args:
        patterns (`Sequence[str]`): Regular expressions, searched in what a completion printed; at most 256.
        final (`Callable`): As a reward function: the score of a valid solution, higher is better, `None` or NaN where
            there is none.
        each (`float`, *optional*, defaults to 0.1): Credit for one pattern, >= 0.
        fail (`float`, *optional*, defaults to -10.0): Reward of a completion without a hit. Beside scores in [-1, 1] a
            reward of -10 leaves the others of its group nearly equal after division by their standard deviation: with
            `scale_rewards="group"` use -1.
        read (`Callable`, *optional*): As a reward function: returns what each completion printed. Defaults to the text
            of the completion.

    Raises:
        ValueError: no pattern, one that is no regular expression, or a number out of range.

    Example:
    ```python
    >>> def score(completions, **kwargs):
    ...     return [0.62 if "score" in text else None for text in completions]
    >>> reward = MilestoneReward(["loaded", "trained", "saved"], score)
    >>> [round(value, 2) for value in reward(completions=["", "loaded trained saved", "loaded score"])]
    [-10.0, -9.7, 0.62]
    ```
    """

    @keeps_arguments
    def __init__(
        self,
        patterns: Sequence[str],
        final: Callable[..., Any],
        each: float = 0.1,
        fail: float = -10.0,
        read: Callable[..., Any] | None = None,
    ) -> None:
        if not isinstance(patterns, (list, tuple)) or not 1 <= len(patterns) <= MOST_PATTERNS:
            raise ValueError(f"patterns must be a list of 1 to {MOST_PATTERNS} regular expressions, got {patterns!r}.")
        for name, value, optional in (("final", final, False), ("read", read, True)):
            if not callable(value) and not (optional and value is None):
                raise ValueError(f"{name}={value!r} must be a function of completions and **kwargs.")
            if value is not None and is_async(value):
                raise ValueError(f"{name}={value!r} is asynchronous; it must return its values.")
        self.patterns = tuple(_compiled(pattern) for pattern in patterns)
        self.final, self.read = final, read
        self.each, self.fail = check_number("each", each, 0.0), check_number("fail", fail, -math.inf)
        self.__name__ = "milestone_reward"

    def __call__(self, completions: Sequence[Any], **kwargs: Any) -> list[float]:
        """Return the reward of each completion."""
        scores = self._called("final", self.final, completions, kwargs)
        read = self.read
        printed = (
            [_all_text_of(c) for c in completions] if read is None else self._called("read", read, completions, kwargs)
        )
        return [self._reward(score, text) for score, text in zip(scores, printed, strict=True)]

    def _called(self, name: str, fn: Any, completions: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
        values = fn(completions=completions, **kwargs)
        if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
            raise RewardError(f"{name} returned {values!r}. It must return a list with one value per completion.")
        found = list(itertools.islice(values, len(completions) + 1))
        if len(found) != len(completions):
            told = f"more than {len(completions)}" if found[len(completions) :] else str(len(found))
            raise RewardError(f"{name} returned {told} values for {len(completions)} completions.")
        return found

    def _reward(self, score: Any, printed: Any) -> float:
        if isinstance(score, (str, bytes)):
            raise RewardError(f"final returned the text {score!r}. A score must be a number, or None for none.")
        if score is not None and not math.isnan(float(score)):
            return float(score)
        if printed is not None and not isinstance(printed, str):
            raise RewardError(f"read returned {printed!r}. It must return a text for each completion, or None.")
        hits = sum(pattern.search(printed or "") is not None for pattern in self.patterns)
        return self.fail + self.each * hits


def _compiled(pattern: Any) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"patterns: {pattern!r} is no regular expression: {error}.") from None
