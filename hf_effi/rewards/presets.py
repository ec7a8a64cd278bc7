"""What papers of a domain rewarded, as arguments of a config and of a trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ._calls import checked_function
from .domain import CappedReward, ClassInTagReward, GatedReward, LengthBandReward
from .structures import JSONReward


class RunPreset(NamedTuple):
    """
    The arguments of a published set-up, for a config and for a trainer.

    Args:
        config (`dict`): Keywords of a `GRPOConfig` or [`EffiGRPOConfig`]. To change one,
            `{**preset.config, "beta": 0.0}`.
        trainer (`dict`): Keywords of the trainer: reward functions, callbacks.

    Example:
    ```python
    config, arguments = train_long_think_short(correct)
    GRPOTrainer(model, args=GRPOConfig("out", **config), train_dataset=rows, **arguments).train()
    ```
    """

    config: dict[str, Any]
    trainer: dict[str, Any]

    @property
    def reward_funcs(self) -> list[Any]:
        """The reward functions among the arguments of the trainer, none where there are none."""
        return list(self.trainer.get("reward_funcs", ()))


def classification(
    labels: Sequence[str],
    format_reward: Callable[..., Any],
    *,
    tag: str = "class",
    column: str = "answer",
    judge: Callable[..., Any] | None = None,
    patterns: Sequence[str] = (),
    cap: float = 0.4,
) -> RunPreset:
    """
    Classification with a reason, as TimeMaster trains it: `0.9 right + 0.1 format`, and a judge where it is right.

    `right` is [`ClassInTagReward`]. The judge of what else the text says counts with a weight of 0.5 and only where
    the class is right ([`GatedReward`]), at most `cap` where a pattern hits ([`CappedReward`]). The config has the
    paper's groups of 5, learning rate 1e-6 and KL weight 0.01; its batch was 64 prompts, after SFT.

    Paper: [TimeMaster](https://huggingface.co/papers/2506.13705).

    Args:
        labels (`Sequence[str]`): The classes.
        format_reward (`Callable`): Reward function of the format, in [0, 1].
        tag, column (`str`, *optional*): See [`ClassInTagReward`].
        judge (`Callable`, *optional*): Reward function in [0, 1], also asynchronous.
        patterns (`Sequence[str]`, *optional*): Phrases that cap the judge.
        cap (`float`, *optional*, defaults to 0.4): For the judge with a hit.

    Returns:
        [`RunPreset`]

    Raises:
        ValueError: a judge without patterns or patterns without a judge, or an argument out of range.

    Example:
    ```python
    >>> def formatted(completions, **columns):
    ...     return [float(text.startswith("<think>") and text.endswith("</class>")) for text in completions]
    >>> preset = classification(["up", "down"], formatted)
    >>> texts = ["<think>...</think><class>up</class>", "<class>up", "<think>...</think><class>down</class>"]
    >>> rewards = [fn(completions=texts, answer=["up"] * 3) for fn in preset.trainer["reward_funcs"]]
    >>> [sum(w * r for w, r in zip(preset.config["reward_weights"], row)) for row in zip(*rewards)]
    [1.0, 0.0, 0.1]
    ```
    """
    right = ClassInTagReward(tag, labels, column)
    functions: list[Any] = [right, checked_function("format_reward", format_reward)]
    weights = [0.9, 0.1]
    if (judge is None) == bool(patterns):
        raise ValueError(f"patterns={patterns!r} and judge={judge!r}: phrases cap a judge, so give both or neither.")
    if judge is None:
        if cap != 0.4:
            raise ValueError(f"cap={cap!r} would not be read: there is no judge.")
    else:
        functions.append(GatedReward(CappedReward(judge, list(patterns), cap), on=right, name="judge_when_right"))
        weights.append(0.5)
    config = {"num_generations": 5, "learning_rate": 1e-6, "beta": 0.01, "reward_weights": weights}
    return RunPreset(config, {"reward_funcs": functions})


def long_form(
    low: float | str,
    high: float | str,
    largest: float | str,
    quality: Callable[..., Any],
    format_reward: Callable[..., Any],
    *,
    unit: str = "words",
) -> RunPreset:
    """
    Long texts, as LongWriter-Zero trains them: length, quality and format, of which the advantages are averaged.

    Each reward is divided by its spread in the group before the three are added, so that none drowns the others:
    `A = (A_length + A_quality + A_format) / 3`. It is TRL's `multi_objective_aggregation="normalize_then_sum"` with
    equal weights, which then divides the sum by its spread in the batch as well.

    Paper: [LongWriter-Zero](https://huggingface.co/papers/2506.18841), with 14,000 tokens and a temperature of 0.8.

    Args:
        low, high, largest (`float` or `str`): See [`LengthBandReward`]; the paper has a band for each prompt.
        quality (`Callable`): Reward function, e.g. a reward model.
        format_reward (`Callable`): Reward function of the format.
        unit (`str`, *optional*, defaults to `"words"`): Of the band, `"words"` or `"tokens"`.

    Returns:
        [`RunPreset`]

    Raises:
        TypeError, ValueError: an argument is out of range or cannot be called.

    Example:
    ```python
    >>> preset = long_form(100, 200, 400, quality=len, format_reward=len)
    >>> preset.config["multi_objective_aggregation"], len(preset.trainer["reward_funcs"])
    ('normalize_then_sum', 3)
    ```
    """
    functions = [
        LengthBandReward(low, high, largest, unit),
        checked_function("quality", quality),
        checked_function("format_reward", format_reward),
    ]
    config = {
        "multi_objective_aggregation": "normalize_then_sum",
        "reward_weights": [1 / 3] * 3,
        "temperature": 0.8,
    }
    return RunPreset(config, {"reward_funcs": functions})


def structured(schema: Mapping[str, Any], column: str | None = None, **options: Any) -> RunPreset:
    """
    JSON by a schema, as RL-Struct rewards it: one reward, and a column in the log for each of its parts.

    The paper's settings of GRPO are not known, so that the config has none of its own. Watch `valid` and `structure`
    first, `content` last: the paper says that they are learned in this order.

    Paper: [RL-Struct](https://huggingface.co/papers/2512.00319).

    Args:
        schema, column: See [`JSONReward`].
        options: Its other arguments.

    Returns:
        [`RunPreset`]

    Raises:
        ValueError: an argument is not understood.

    Example:
    ```python
    >>> preset = structured({"type": "array", "items": {"type": "integer"}})
    >>> preset.config, [fn.__name__ for fn in preset.trainer["reward_funcs"]]
    ({}, ['json_reward', 'json_reward_valid', 'json_reward_structure', 'json_reward_format'])
    ```
    """
    reward = JSONReward(schema, column=column, **options)
    return RunPreset({}, {"reward_funcs": [reward, *reward.parts()]})
