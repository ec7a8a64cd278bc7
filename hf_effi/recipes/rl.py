"""Settings of RL papers, in the form of rewards and of keyword arguments for a GRPO config."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

from ..errors import RewardError
from ..functional.data import check_number
from ..rewards.presets import RunPreset
from ..selection import MilestoneReward

#: size of the model -> learning rate and beta of Tulu 3
TULU3_SIZES = {"8b": (3e-7, 0.05), "70b": (1e-7, 0.07)}


class VerifiedReward:
    """
    Tulu 3's reward: `scale` for a verified answer, and another number in its place for one that did not end.

    Args:
        reward (`Callable`): As a reward function: 1 for a right answer, 0 for a wrong one, `None` where it does not
            apply.
        scale (`float`, *optional*, defaults to 10.0): What it is multiplied by, > 0.
        end_token_ids (`Collection[int]`, *optional*): Of the policy. With them a completion that ends otherwise gets
            `no_end`, whatever it says.
        no_end (`float`, *optional*, defaults to -10.0): Reward of such a completion.

    Raises:
        ValueError: a number out of range, or a reward that cannot be called.

    Example:
    ```python
    >>> reward = VerifiedReward(lambda completions, **kwargs: [1.0, 0.0, 1.0], end_token_ids=[2])
    >>> reward(completions=["4", "5", "4"], completion_ids=[[7, 2], [8, 2], [7, 7]])
    [10.0, 0.0, -10.0]
    ```
    """

    def __init__(
        self,
        reward: Callable[..., Any],
        scale: float = 10.0,
        end_token_ids: Collection[int] | None = None,
        no_end: float = -10.0,
    ) -> None:
        if not callable(reward):
            raise ValueError(f"reward={reward!r} must be a function of completions and **kwargs.")
        if end_token_ids is not None and not end_token_ids:
            raise ValueError("end_token_ids is empty. Pass the end tokens of the policy, or None to ask for no end.")
        self.reward, self.scale = reward, check_number("scale", scale, 0.0, open_low=True)
        self.ends = None if end_token_ids is None else frozenset(end_token_ids)
        self.no_end = check_number("no_end", no_end, -math.inf)
        self.__name__ = f"verified_{getattr(reward, '__name__', type(reward).__name__)}"

    def __call__(
        self, completions: Sequence[Any], completion_ids: Sequence[Sequence[int]] | None = None, **kwargs: Any
    ) -> list[float | None]:
        """Return the reward of each completion."""
        found = list(self.reward(completions=completions, completion_ids=completion_ids, **kwargs))
        if len(found) != len(completions):
            raise RewardError(f"{self.__name__}: {len(found)} rewards for {len(completions)} completions.")
        values = [None if value is None or math.isnan(value) else self.scale * float(value) for value in found]
        if self.ends is None:
            return values
        if completion_ids is None:
            raise RewardError(f"{self.__name__} looks for the end in completion_ids=, which were not passed.")
        ended = [len(ids) > 0 and ids[-1] in self.ends for ids in completion_ids]
        return [value if end else self.no_end for value, end in zip(values, ended, strict=True)]


def rlvr(
    reward: Callable[..., Any],
    size: str = "8b",
    *,
    scale: float = 10.0,
    end_token_ids: Collection[int] | None = None,
    no_end: float = -10.0,
) -> RunPreset:
    """
    Return the settings of Tulu 3's RL with verifiable rewards, as far as GRPO can express them.

    Learning rate, KL coefficient, clipping at 0.2, 4 passes over each generation, temperature 1, 2048 tokens; the
    reward is 10 for a verified answer, and -10 for one that did not end. From
    [2411.15124](https://huggingface.co/papers/2411.15124) and its code. Tulu 3 trains by PPO, and what only PPO has is
    not here: a value model that begins as the reward model, its loss (coefficient 0.1, clipped at 0.2), advantages
    with `gamma = 1` and `lambda = 0.95`. There the KL term is taken off the reward; TRL's `beta` adds it to the loss.
    Where rewards are divided by the deviation of their group, `scale` changes nothing, but `no_end` does.

    Args:
        reward (`Callable`): The verifier, a reward function that returns 1 or 0.
        size (`str`, *optional*, defaults to `"8b"`): `"8b"` or `"70b"`.
        scale, end_token_ids, no_end: As in [`VerifiedReward`].

    Returns:
        [`~hf_effi.rewards.RunPreset`].

    Raises:
        ValueError: an unknown size, or an argument out of range.

    Example:
    ```python
    >>> preset = rlvr(lambda completions, **kwargs: [1.0 for _ in completions])
    >>> preset.config["learning_rate"], preset.config["beta"], preset.reward_funcs[0](completions=["4"])
    (3e-07, 0.05, [10.0])
    ```
    """
    if size not in TULU3_SIZES:
        raise ValueError(f"size={size!r} is none of {', '.join(map(repr, TULU3_SIZES))}.")
    learning_rate, beta = TULU3_SIZES[size]
    config = {
        "learning_rate": learning_rate,
        "beta": beta,
        "epsilon": 0.2,
        "num_iterations": 4,
        "temperature": 1.0,
        "max_completion_length": 2048,
    }
    return RunPreset(config, {"reward_funcs": [VerifiedReward(reward, scale, end_token_ids, no_end)]})


class _Negated:
    """A score of which less is better."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn
        self.__name__ = getattr(fn, "__name__", type(fn).__name__)

    def __call__(self, **kwargs: Any) -> list[float | None]:
        return [None if value is None else -value for value in self.fn(**kwargs)]


def ml_engineering(
    patterns: Sequence[str],
    final: Callable[..., Any],
    read: Callable[..., Any] | None = None,
    *,
    scale_rewards: str = "group",
    higher_is_better: bool = True,
) -> RunPreset:
    """
    Return the settings of RL for agents that write machine-learning programs: partial credit, and its learning rate.

    The reward is the true score of a valid solution, else a failure plus 0.1 for each milestone that was reached; see
    [`~hf_effi.selection.MilestoneReward`]. The paper's failure of -10 leaves the others of its group nearly equal
    after division by their deviation: with `scale_rewards="group"` it is -1 here, with `"none"` -10. Learning rate
    1e-5, as for its 3B model; its batch has 128 programs. From [2509.01684](https://huggingface.co/papers/2509.01684).
    Not here: half of its prompts ask to improve an earlier solution, which is a matter of the dataset, and its weights
    of durations, which undo a bias of asynchronous rollouts that a GRPO trainer does not have
    ([`~hf_effi.selection.DurationWeights`]).

    Args:
        patterns (`Sequence[str]`): Regular expressions of the milestones. Let another program insert the print
            statements that they look for: a policy learns to print them.
        final (`Callable`): As a reward function: the score of a valid solution, `None` where there is none.
        read (`Callable`, *optional*): As a reward function: what each program printed; the completion by default.
        scale_rewards (`str`, *optional*, defaults to `"group"`): Or `"none"`.
        higher_is_better (`bool`, *optional*, defaults to `True`): With `False` the sign of `final` is turned.

    Returns:
        [`~hf_effi.rewards.RunPreset`].

    Raises:
        ValueError: another `scale_rewards`, or an argument that `MilestoneReward` refuses.

    Example:
    ```python
    >>> preset = ml_engineering(["loaded", "saved"], lambda completions, **kwargs: [None for _ in completions])
    >>> preset.reward_funcs[0](completions=["", "loaded"]), preset.config["scale_rewards"]
    ([-1.0, -0.9], 'group')
    ```
    """
    fails = {"group": -1.0, "none": -10.0}
    if scale_rewards not in fails:
        raise ValueError(f"scale_rewards={scale_rewards!r} must be 'group' or 'none'.")
    if not isinstance(higher_is_better, bool):
        raise ValueError(f"higher_is_better={higher_is_better!r} must be True or False.")
    score = final if higher_is_better or not callable(final) else _Negated(final)
    reward = MilestoneReward(patterns, score, fail=fails[scale_rewards], read=read)
    return RunPreset({"learning_rate": 1e-5, "scale_rewards": scale_rewards}, {"reward_funcs": [reward]})
