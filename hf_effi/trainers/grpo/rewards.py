"""Reward calls that fail with one clear sentence, on every rank at once, and lose nothing that was trained."""

from __future__ import annotations

import functools
import itertools
import logging
import math
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from ...errors import RefusedError, RewardError
from ...selection.rewards import GroupReward, SideColumn, is_async
from .host import Host

logger = logging.getLogger(__name__)
#: the largest reward: TRL stores rewards as float32
LARGEST = torch.finfo(torch.float32).max


def check_rewards(values: Any, expected: int, name: str, warn: bool = True) -> list[float | None]:
    """
    Turn what a reward function returned into a list of floats, or say what is wrong with it.

    Args:
        values (`Any`): Anything that gives one value per completion when it is iterated over: a list, a generator, a
            tensor or array of shape `(N,)` or `(N, 1)`. A value is whatever `float` takes and is no text; `None` and
            NaN mean "not applicable to this completion": the other functions alone decide on it, and where none
            applies its advantage is 0 and it is left out of the group's mean. A function that gives NaN for every
            completion is warned of,
            once: mostly it divides by 0.
        expected (`int`): Completions that were passed in, `N`.
        name (`str`): The function's name, for the message.
        warn (`bool`, *optional*, defaults to `True`): Whether to warn of that.

    Raises:
        RewardError: `values` cannot be iterated over, has another length, or holds something that is no number, or not
            finite in float32, which rewards are stored in.

    Example:
    ```python
    >>> check_rewards((value for value in (1, None, True)), expected=3, name="accuracy")
    [1.0, None, 1.0]
    ```
    """
    if values is None:
        raise RewardError(
            f"reward function '{name}' returned None. It must return one number per completion ({expected} here); a "
            "single completion may get None. Is a `return` missing?"
        )
    if hasattr(values, "tolist"):
        column = getattr(values, "ndim", None) == 2 and values.shape[1] == 1
        values = (values.reshape(-1) if column else values).tolist()
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise RewardError(
            f"reward function '{name}' returned {type(values).__name__} {values!r}. It must return a list with one "
            f"number per completion ({expected} here)."
        )
    found = list(itertools.islice(values, expected + 1))  # a generator need not end
    if len(found) != expected:
        count = (
            len(values) if isinstance(values, Sized) else f"more than {expected}" if found[expected:] else len(found)
        )
        raise RewardError(
            f"The reward function '{name}' returned {count} rewards, but {expected} were expected (one per "
            "prompt-completion pair)."
        )
    rewards = [_as_reward(value, index, name) for index, value in enumerate(found)]
    nothing = bool(rewards) and not any(reward is not None for reward in rewards)
    if warn and nothing and any(value is not None for value in found):
        _warn_of_nothing_but_nan(name, len(rewards))
    return rewards


@functools.cache
def _warn_of_nothing_but_nan(name: str, number: int) -> None:
    logger.warning(
        "reward function '%s' returned NaN for all %d completions of a generation. NaN counts as None: the function "
        "has no "
        "say in them, and without another one nothing is learned from them. Is it 0/0, or the logarithm of 0? Return "
        "0.0 for a completion that is worth nothing.",
        name,
        number,
    )


def _as_reward(value: Any, index: int, name: str) -> float | None:
    if value is None:
        return None
    try:
        if isinstance(value, (str, bytes, bytearray)):
            raise TypeError
        number = float(value.item() if hasattr(value, "item") else value)  # of a tensor or array with one value
    except OverflowError:  # an integer of more than 308 digits
        number = math.inf
    except (TypeError, ValueError, RuntimeError):
        number = None
    if number is not None and math.isnan(number):
        return None
    if number is None or abs(number) > LARGEST:
        raise RewardError(
            f"reward function '{name}' returned {reprlib.repr(value)} for completion {index}. A reward must be a "
            f"finite number in float32 (at most {LARGEST:.4g} in size), or None where the function does not apply."
        )
    return number


def check_sums(rewards: Tensor, weights: Tensor, group_size: int, names: Sequence[str]) -> None:
    """
    Refuse rewards, each of which is finite, whose sum over the functions or over a group is not.

    Args:
        rewards (`torch.Tensor`): Shape `(rows, num_functions)`, of all ranks; NaN is left out.
        weights (`torch.Tensor`): Shape `(num_functions,)`.
        group_size (`int`): Completions of a prompt.
        names (`Sequence[str]`): Of the functions.

    Raises:
        RewardError: the mean of a group would be infinite in float32, and every advantage of it NaN.
    """
    weighted = torch.where(rewards.isnan(), 0.0, rewards * weights.to(rewards.device))
    table = torch.cat([weighted, weighted.sum(1, keepdim=True)], 1)
    if bool(table.view(-1, group_size, table.size(1)).sum(1).isfinite().all()):
        return
    row, column = divmod(int(weighted.abs().argmax()), weighted.size(1))
    raise RewardError(
        f"the rewards of a group add up to more than float32 holds ({LARGEST:.4g}): reward function '{names[column]}' "
        f"returned {float(rewards[row, column]):.4g}. Divide its rewards by a constant; advantages stay the same."
    )


class SideColumns:
    """
    The side columns among the reward functions of a trainer, which TRL never takes for rewards.

    Args:
        columns (`Sequence[SideColumn]`, *optional*): What [`~hf_effi.selection.side_column`] returned.
        given (`Sequence[Callable]`, *optional*): All functions as the user gave them, in their order.
    """

    def __init__(self, columns: Sequence[SideColumn] = (), given: Sequence[Any] = ()) -> None:
        self.columns, self.given = tuple(columns), tuple(given)
        self.names = tuple(column.__name__ for column in self.columns)

    @classmethod
    def taken_from(cls, host: Host, reader: Any = None) -> SideColumns:
        """
        Take the side columns out of a trainer's reward functions, with their names, weights and processing classes.

        TRL has checked all of these against each other when it built the trainer.

        Args:
            reader (*optional*): An advantage transform; an attribute `side_columns` of it names those that it reads.

        Raises:
            ValueError: a name is there twice; nothing but side columns is there, so that nothing is rewarded; or
                `reader` reads one that is not there.
        """
        given = list(host.reward_funcs)
        places = [i for i, function in enumerate(given) if isinstance(function, SideColumn)]
        there = [given[i].__name__ for i in places]
        if lost := [name for name in getattr(reader, "side_columns", ()) if name not in there]:
            raise ValueError(
                f"{type(reader).__name__} reads the side column {lost[0]!r}; there are: {', '.join(there) or 'none'}. "
                f"Pass side_column(fn, name={lost[0]!r}) among the reward functions."
            )
        if not places:
            return cls((), given)
        rest = [i for i in range(len(given)) if i not in places]
        found = cls([given[i] for i in places], given)
        rewards = [host.reward_func_names[i] for i in rest]
        if not rest:
            raise ValueError(
                f"all reward functions are side columns ({', '.join(found.names)}), so that nothing is rewarded. Pass "
                "a reward function beside them."
            )
        for name in found.names:
            if (*rewards, *found.names).count(name) > 1:
                raise ValueError(
                    f"the side column {name!r} has the name of another function. Name it: side_column(fn, name=...)."
                )
        host.reward_funcs = [given[i] for i in rest]
        host.reward_processing_classes = [host.reward_processing_classes[i] for i in rest]
        host.reward_weights = host.reward_weights[rest]
        host.reward_func_names = rewards
        return found


class RewardCheck:
    """
    One call of `GRPOTrainer._calculate_rewards` whose reward functions are looked at.

    A problem of one rank is told to all, and all raise together: one that stopped alone would leave the others waiting
    in a collective.

    Args:
        host ([`Host`]): Whose reward functions are wrapped, for the time of the call.
        side ([`SideColumns`], *optional*): Those of the trainer.

    Attributes:
        problems (`list[str]`): What the functions of this rank returned that is no reward.
        side (`dict[str, torch.Tensor]`): The side columns of all ranks, float64 on the CPU, shape `(rows,)`.
    """

    def __init__(self, host: Host, side: SideColumns | None = None) -> None:
        self.host = host
        self.problems: list[str] = []
        self.side: dict[str, Tensor] = {}
        self._columns = SideColumns() if side is None else side
        self._found: dict[str, list[float | None]] = {}

    def calculate(
        self, stock: Callable[..., Tensor], inputs: Any, prompts: Any, completions: Any, completion_ids: Any
    ) -> Tensor:
        """
        Return what `stock` does, the gathered rewards of shape `(rows, num_functions)`.

        Args:
            stock (`Callable`): The next `_calculate_rewards`, called with the other arguments.

        Raises:
            RewardError: a function of any rank returned what is no reward; on every rank.
        """
        host = self.host
        before = (host.reward_funcs, host.reward_func_names, getattr(host, "reward_processing_classes", None))
        functions, names, classes = before
        wrapped = self._wrapped(functions, names, len(prompts))
        # TRL calls them as it calls rewards, and gets no number.
        wrapped += [self._noted(column, len(prompts)) for column in self._columns.columns]
        host.reward_funcs = wrapped  # only now: what refuses a function must not leave others wrapped
        if self._columns.columns:
            host.reward_func_names = [*names, *self._columns.names]
            host.reward_processing_classes = [*(classes or ()), *(None for _ in self._columns.columns)]
        try:
            rewards = stock(inputs, prompts, completions, completion_ids)
        finally:
            host.reward_funcs, host.reward_func_names = functions, names
            if self._columns.columns:
                host.reward_processing_classes = classes or []
        ranks = gather_object([(self.problems, self._found)])
        if everyone := [problem for problems, _ in ranks for problem in problems]:
            raise RewardError(everyone[0])
        if self._columns.columns:
            rewards = rewards[:, : len(functions)].contiguous()
            self.side = {name: _column([found[name] for _, found in ranks]) for name in self._columns.names}
            self._log()
        return rewards

    def _wrapped(self, functions: Sequence[Any], names: Sequence[str], expected: int) -> list[Any]:
        return [
            function
            if isinstance(function, nn.Module)
            else _checked(self._in_groups(function), name, expected, self.problems)
            for function, name in zip(functions, names, strict=True)
        ]

    def _noted(self, column: SideColumn, expected: int) -> Callable[..., Any]:
        """Keep the numbers of a side column, and hand TRL a column without one."""
        return _checked(self._in_groups(column.fn), column.__name__, expected, self.problems, self._found)

    def _in_groups(self, function: Any) -> Any:
        """Tell a function of groups how large they are."""
        if not isinstance(function, GroupReward):
            return function
        training = bool(self.host.model.training)
        size = self.host.num_generations if training else self.host.num_generations_eval
        if training and size == 1:
            raise RefusedError(
                f"group reward {function.__name__!r} needs all completions of a prompt at once, and `screening=` and "
                "`rollout_allocator=` generate them in parts. Drop them, or use a reward for each completion."
            )
        if training and function.group_size not in (None, size):
            raise ValueError(
                f"group reward {function.__name__!r} was made with group_size={function.group_size}, and "
                f"num_generations is {size}. Leave group_size out: this trainer tells it."
            )
        return functools.partial(function.of_groups, size)

    def _log(self) -> None:
        log = self.host._metrics["train" if self.host.model.training else "eval"]
        tables = getattr(self.host, "_logs", None)
        for name, values in self.side.items():
            if tables is not None:
                tables["rewards"][name].extend(values.tolist())
            if bool((~values.isnan()).any()):
                log[f"rewards/{name}/mean"].append(float(torch.nanmean(values)))


def _column(parts: Sequence[Sequence[float | None]]) -> Tensor:
    values = [math.nan if value is None else value for part in parts for value in part]
    return torch.tensor(values, dtype=torch.float64)


def _checked(
    func: Callable[..., Any],
    name: str,
    expected: int,
    problems: list[str],
    noted: dict[str, list[float | None]] | None = None,
) -> Callable[..., Any]:
    """
    Record a problem and hand TRL unscorable rewards, so that this rank still reaches the gather.

    Args:
        noted (`dict`, *optional*): Takes the values of a side column, of which TRL gets none.
    """

    def accept(values: Any) -> list[float | None]:
        try:
            found = check_rewards(values, expected, name, warn=noted is None)
        except RewardError as error:
            problems.append(str(error))
            found = [None] * expected
        if noted is None:
            return found
        noted[name] = found
        return [None] * expected

    if is_async(func):

        @functools.wraps(func, updated=())
        async def call_async(*args: Any, **kwargs: Any) -> list[float | None]:
            return accept(await func(*args, **kwargs))

        return call_async

    def call(*args: Any, **kwargs: Any) -> list[float | None]:
        return accept(func(*args, **kwargs))

    return call
