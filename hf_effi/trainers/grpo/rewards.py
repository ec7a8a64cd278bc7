"""Reward calls that fail with one clear sentence, on every rank at once, and lose nothing that was trained."""

from __future__ import annotations

import functools
import itertools
import logging
import math
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from trl.trainer.utils import is_async_callable

logger = logging.getLogger(__name__)
#: the largest reward: TRL stores rewards as float32
LARGEST = torch.finfo(torch.float32).max


class RewardError(ValueError):
    """A reward function returned something that is not one number (or `None`) per completion."""


def check_rewards(values: Any, expected: int, name: str) -> list[float | None]:
    """
    Turn what a reward function returned into a list of floats, or say what is wrong with it.

    Args:
        values (`Any`): Anything that gives one value per completion when it is iterated over: a list, a generator, a tensor
            or array of shape `(N,)` or `(N, 1)`. A value is whatever `float` takes and is no text; `None` and NaN mean "not
            applicable to this completion": the other functions alone decide on it, and where none applies its advantage is
            0 and it is left out of the group's mean. A function that gives NaN for every completion is warned of, once:
            mostly it divides by 0.
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
            len(values) if hasattr(values, "__len__") else f"more than {expected}" if found[expected:] else len(found)
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
        "reward function '%s' returned NaN for all %d completions of a generation. NaN counts as None: the function has no "
        "say in them, and without another one nothing is learned from them. Is it 0/0, or the logarithm of 0? Return 0.0 "
        "for a completion that is worth nothing.",
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
            f"reward function '{name}' returned {reprlib.repr(value)} for completion {index}. A reward must be a finite "
            f"number in float32 (at most {LARGEST:.4g} in size), or None where the function does not apply."
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


class CheckedRewardsMixin:
    """Wraps the reward functions for the time of `GRPOTrainer._calculate_rewards`."""

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        problems: list[str] = []
        originals = self.reward_funcs
        self.reward_funcs = [
            func if isinstance(func, nn.Module) else _checked(func, name, len(prompts), problems)
            for func, name in zip(originals, self.reward_func_names, strict=True)
        ]
        try:
            with self._timed("reward"):
                rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        finally:
            self.reward_funcs = originals
        # All ranks raise together: one that stopped alone would leave the others waiting in a collective.
        everyone = [problem for rank in gather_object([problems]) for problem in rank]
        if everyone:
            raise RewardError(everyone[0])
        if self._in_training:
            check_sums(rewards, self.reward_weights, self.num_generations, self.reward_func_names)
            self._last_rewards = rewards
        return rewards

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        try:
            return super().training_step(*args, **kwargs)
        except RewardError as error:
            self._save_before_stopping(error)
            raise

    def _save_before_stopping(self, error: RewardError) -> None:
        """Weights are those of the last finished optimizer step: keep them."""
        if self.state.global_step == 0 or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return
        # The checkpoint must say that the last finished optimizer step is where to go on.
        self._step, self._buffered_inputs = self._step_after_update, None
        self.control.should_save = True  # as in a regular save, so that callbacks add what they store
        self._save_checkpoint(self.model, trial=self._trial)
        self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        error.add_note(
            f"The {self.state.global_step} finished steps were saved to {self._get_output_dir(self._trial)}/checkpoint-"
            f"{self.state.global_step}; fix the reward function and resume from there."
        )


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
