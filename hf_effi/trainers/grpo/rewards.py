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
from trl.trainer.utils import is_async_callable

from ...errors import RewardError
from .host import Host

logger = logging.getLogger(__name__)
#: the largest reward: TRL stores rewards as float32
LARGEST = torch.finfo(torch.float32).max


def check_rewards(values: Any, expected: int, name: str) -> list[float | None]:
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
    if rewards and not any(reward is not None for reward in rewards) and any(value is not None for value in found):
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


class RewardCheck:
    """
    One call of `GRPOTrainer._calculate_rewards` whose reward functions are looked at.

    A problem of one rank is told to all, and all raise together: one that stopped alone would leave the others waiting
    in a collective.

    Args:
        host ([`Host`]): Whose reward functions are wrapped, for the time of the call.

    Attributes:
        problems (`list[str]`): What the functions of this rank returned that is no reward.
    """

    def __init__(self, host: Host) -> None:
        self.host = host
        self.problems: list[str] = []

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
        originals = self.host.reward_funcs
        self.host.reward_funcs = self._wrapped(originals, len(prompts))
        try:
            rewards = stock(inputs, prompts, completions, completion_ids)
        finally:
            self.host.reward_funcs = originals
        everyone = [problem for rank in gather_object([self.problems]) for problem in rank]
        if everyone:
            raise RewardError(everyone[0])
        return rewards

    def _wrapped(self, functions: Sequence[Any], expected: int) -> list[Any]:
        return [
            function if isinstance(function, nn.Module) else _checked(function, name, expected, self.problems)
            for function, name in zip(functions, self.host.reward_func_names, strict=True)
        ]


def _checked(func: Callable[..., Any], name: str, expected: int, problems: list[str]) -> Callable[..., Any]:
    """Record a problem and hand TRL unscorable rewards, so that this rank still reaches the gather."""

    def accept(values: Any) -> list[float | None]:
        try:
            return check_rewards(values, expected, name)
        except RewardError as error:
            problems.append(str(error))
            return [None] * expected

    if is_async_callable(func):

        @functools.wraps(func, updated=())
        async def call_async(*args: Any, **kwargs: Any) -> list[float | None]:
            return accept(await func(*args, **kwargs))

        return call_async

    def call(*args: Any, **kwargs: Any) -> list[float | None]:
        return accept(func(*args, **kwargs))

    return call
