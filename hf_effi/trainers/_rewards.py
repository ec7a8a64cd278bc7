"""Reward calls that fail with one clear sentence, on every rank at once, and lose nothing that was trained."""

from __future__ import annotations

import functools
import logging
import math
import numbers
from collections.abc import Callable
from typing import Any

from accelerate.utils import gather_object
from torch import Tensor, nn
from trl.trainer.utils import is_async_callable

logger = logging.getLogger(__name__)


class RewardError(ValueError):
    """A reward function returned something that is not one number (or `None`) per completion."""


def check_rewards(values: Any, expected: int, name: str) -> list[float | None]:
    """
    Turn what a reward function returned into a list of floats, or say what is wrong with it.

    Args:
        values (`Any`): A list, tuple, 1-D tensor or array; `None` and NaN mean "not applicable to this completion": the
            other functions alone decide on it, and where none applies its advantage is 0 and it is left out of the group's
            mean. A function that gives NaN for every completion is warned of, once: mostly it divides by 0.
        expected (`int`): Completions that were passed in.
        name (`str`): The function's name, for the message.

    Raises:
        RewardError: `values` is not a sequence, has another length, or holds something that is no finite number.

    Example:
    ```python
    >>> check_rewards([1, None, True], expected=3, name="accuracy")
    [1.0, None, 1.0]
    ```
    """
    if values is None:
        raise RewardError(
            f"reward function '{name}' returned None. It must return one number per completion ({expected} here); a "
            "single completion may get None. Is a `return` missing?"
        )
    if isinstance(values, Tensor) or hasattr(values, "tolist"):
        values = values.tolist()
    if isinstance(values, (str, bytes)) or not hasattr(values, "__len__"):
        raise RewardError(
            f"reward function '{name}' returned {type(values).__name__} {values!r}. It must return a list with one "
            f"number per completion ({expected} here)."
        )
    if len(values) != expected:
        raise RewardError(
            f"The reward function '{name}' returned {len(values)} rewards, but {expected} were expected (one per "
            "prompt-completion pair)."
        )
    rewards = [_as_reward(value, index, name) for index, value in enumerate(values)]
    if rewards and not any(reward is not None for reward in rewards) and any(value is not None for value in values):
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
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if value is None or (isinstance(value, numbers.Real) and math.isnan(value)):
        return None
    if not isinstance(value, numbers.Real) or math.isinf(value):
        raise RewardError(
            f"reward function '{name}' returned {value!r} for completion {index}. A reward must be a finite number, "
            "or None where the function does not apply."
        )
    return float(value)


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
        if self.model.training:
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
        self._save_checkpoint(self.model, trial=None)
        self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        error.add_note(
            f"The {self.state.global_step} finished steps were saved to {self.args.output_dir}/checkpoint-"
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
