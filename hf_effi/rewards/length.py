"""A reward for completions that are as long as a budget, which falls during the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..errors import RewardError
from ..functional import metrics
from ..functional.data import check_number
from ..functional.kept_arguments import keeps_arguments
from ..functional.rewards import band_reward, check_budget, triangular_reward
from ..functional.rewards.length import Budget, ExponentialBudget
from ..selection.rewards import is_async, name_of
from .base import Reward
from .presets import RunPreset

#: how a reward falls beside the budget
SHAPES = ("triangular", "band")
#: of Train Long, Think Short
PAPER_BUDGET = ExponentialBudget()


class LengthBudgetReward(Reward):
    """
    Pay for completions by their length beside a budget, which is a function of the finished updates.

    The length of a completion is its number of tokens, `completion_ids`, and the update is
    `trainer_state.global_step`: there is no clock of its own, so that a resumed run goes on with the same budget. Logs
    `effi/length/budget`, `effi/length/mean` and `effi/length/over_twice`, the share of completions of more than twice
    the budget, which earn nothing.

    Without `gate_on_correct` a wrong answer of the right length is paid, and in a group of wrong answers it is all
    that is: the policy then learns the length alone.

    Args:
        budget (`int` or a budget of `hf_effi.functional.rewards`, *optional*): Tokens, or a budget that falls.
            Defaults to `ExponentialBudget()`, the paper's: 256, 179, 125 and 87 tokens.
        shape (`str`, *optional*, defaults to `"triangular"`): `"triangular"` pays most for exactly the budget, see
            [`~hf_effi.functional.rewards.triangular_reward`]; `"band"` pays the same for all that is no longer, see
            [`~hf_effi.functional.rewards.band_reward`].
        gate_on_correct (`Callable` or `str`, *optional*): A reward function, also an asynchronous one, or the name of
            a column of the dataset with one number for each row. Completions for which it is not above 0 earn 0, and
            those for which it is `None` have no reward.
        largest (`float`, *optional*, defaults to 1.0): The highest reward, above 0.
        name (`str`, *optional*): As in [`Reward`].

    Raises:
        ValueError: a value out of its range, or a gate that cannot be called.
        RewardError: when called: without `completion_ids` or `trainer_state`, as TRL passes them.

    Example:
    ```python
    >>> from types import SimpleNamespace
    >>> reward = LengthBudgetReward(budget=4, gate_on_correct=lambda completions, **kw: [1.0, 0.0, 1.0])
    >>> now = SimpleNamespace(global_step=0, max_steps=10)
    >>> reward(completions=["", "", ""], completion_ids=[[1] * 4, [1] * 4, [1] * 6], trainer_state=now)
    [1.0, 0.0, 0.5]
    ```
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> LengthBudgetReward:
        # TRL asks the class whether its calls are awaited.
        gate = kwargs.get("gate_on_correct", args[2] if len(args) > 2 else None)
        awaited = cls is LengthBudgetReward and callable(gate) and is_async(gate)
        return super().__new__(_AwaitedLengthBudgetReward if awaited else cls)

    @keeps_arguments
    def __init__(
        self,
        budget: Budget | int = PAPER_BUDGET,
        shape: str = "triangular",
        gate_on_correct: Callable[..., Any] | str | None = None,
        largest: float = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(name or "length_budget_reward")
        self.budget = check_budget(budget)
        if shape not in SHAPES:
            raise ValueError(f"shape must be one of {', '.join(map(repr, SHAPES))}, got {shape!r}.")
        self.shape = shape
        if not (gate_on_correct is None or callable(gate_on_correct) or isinstance(gate_on_correct, str)):
            raise ValueError(
                f"gate_on_correct={gate_on_correct!r} must be a reward function, the name of a column of the dataset, "
                "or None."
            )
        self.gate_on_correct = gate_on_correct
        self.largest = check_number("largest", largest, 0, open_low=True)

    def of_lengths(self, lengths: Sequence[int], budget: int) -> Tensor:
        """Return the reward of each length under a budget, before the gate."""
        if self.shape == "band":
            return band_reward(lengths, 0, budget, 2 * budget, self.largest)
        return triangular_reward(lengths, budget, self.largest)

    def __call__(
        self, prompts: Sequence[Any] | None = None, completions: Sequence[Any] | None = None, **columns: Any
    ) -> list[float | None]:
        """Return one reward per completion, as TRL calls it."""
        lengths, budget = self._measured(completions, columns)
        gate: Any = self.gate_on_correct
        if isinstance(gate, str):
            gate = self.column(gate, len(lengths), columns)
        elif gate is not None:
            gate = gate(prompts=prompts, completions=completions, **columns)
        return self._gated(lengths, budget, gate)

    def _measured(self, completions: Any, columns: dict[str, Any]) -> tuple[list[int], int]:
        ids, state = columns.get("completion_ids"), columns.get("trainer_state")
        if completions is None or ids is None or state is None or len(ids) != len(completions):
            raise RewardError(
                f"{self.__name__} needs completions, completion_ids and trainer_state, one list of token ids per "
                "completion: TRL's GRPOTrainer passes them."
            )
        lengths = [len(tokens) for tokens in ids]
        budget = self.budget.at(state.global_step, max(1, state.max_steps))
        if lengths and callable(log := columns.get("log_metric")):
            log(metrics.LENGTH_BUDGET, float(budget))
            log(metrics.LENGTH_MEAN, sum(lengths) / len(lengths))
            log(metrics.LENGTH_OVER_TWICE, sum(length > 2 * budget for length in lengths) / len(lengths))
        return lengths, budget

    def _gated(self, lengths: list[int], budget: int, correct: Any) -> list[float | None]:
        rewards: list[float] = self.of_lengths(lengths, budget).tolist()
        if correct is None:
            return list(rewards)
        if not hasattr(correct, "__len__") or isinstance(correct, str) or len(correct) != len(lengths):
            told = f"{len(correct)} values" if hasattr(correct, "__len__") else type(correct).__name__
            raise RewardError(
                f"{self.__name__}: gate_on_correct={self._gate_name!r} gave {told} for {len(lengths)} completions."
            )
        return [self._passed(reward, value) for reward, value in zip(rewards, correct, strict=True)]

    def _passed(self, reward: float, correct: Any) -> float | None:
        if correct is None:
            return None
        if isinstance(correct, (str, bytes)):
            raise RewardError(
                f"{self.__name__}: gate_on_correct={self._gate_name!r} gave the text {correct!r}. It must be a "
                "number, above 0 where the answer is right, or None."
            )
        value = float(correct)
        return None if value != value else reward * float(value > 0)

    @property
    def _gate_name(self) -> str:
        gate = self.gate_on_correct
        return gate if isinstance(gate, str) else name_of(gate)


class _AwaitedLengthBudgetReward(LengthBudgetReward):
    """The same with a gate that is awaited."""

    async def __call__(  # type: ignore[override]
        self, prompts: Sequence[Any] | None = None, completions: Sequence[Any] | None = None, **columns: Any
    ) -> list[float | None]:
        """Return one reward per completion, as TRL awaits it."""
        lengths, budget = self._measured(completions, columns)
        gate: Any = self.gate_on_correct
        return self._gated(lengths, budget, await gate(prompts=prompts, completions=completions, **columns))


def train_long_think_short(
    correct: Callable[..., Any],
    well_formed: Callable[..., Any] | None = None,
    *,
    budget: Budget | int = PAPER_BUDGET,
    emphasis: str = "correctness",
    gated: bool = False,
) -> RunPreset:
    """
    Return the weighted rewards of Train Long, Think Short (2508.08940).

    Formula: `r = 0.6 r_correct + 0.3 r_length + 0.1 r_form`, or `0.3, 0.6, 0.1` with `emphasis="length"`. The paper
    names the first two pairs; 0.1 is what they leave.

    Args:
        correct (`Callable`): A reward function: 1 for a right answer, 0 for a wrong one.
        well_formed (`Callable`, *optional*): A reward function for the form, as `trl.rewards.think_format_reward`.
        budget (`int` or a budget of `hf_effi.functional.rewards`, *optional*): As in [`LengthBudgetReward`].
        emphasis (`str`, *optional*, defaults to `"correctness"`): `"correctness"` or `"length"`.
        gated (`bool`, *optional*, defaults to `False`): Pay for the length of right answers alone. The paper does not.

    Returns:
        [`RunPreset`]: `reward_weights` for the config, `reward_funcs` for the trainer.

    Raises:
        ValueError: another `emphasis`, or rewards that cannot be called.

    Example:
    ```python
    >>> preset = train_long_think_short(lambda completions, **kwargs: [1.0] * len(completions))
    >>> preset.config, len(preset.trainer["reward_funcs"])
    ({'reward_weights': [0.6, 0.3]}, 2)
    ```
    """
    weights = {"correctness": [0.6, 0.3], "length": [0.3, 0.6]}
    if emphasis not in weights:
        raise ValueError(f"emphasis must be 'correctness' or 'length', got {emphasis!r}.")
    for name, given in (("correct", correct), ("well_formed", well_formed)):
        if not callable(given) and not (name == "well_formed" and given is None):
            raise ValueError(f"{name}={given!r} must be a reward function.")
    length = LengthBudgetReward(budget, gate_on_correct=correct if gated else None)
    rewards: list[Any] = [correct, length]
    chosen = list(weights[emphasis])
    if well_formed is not None:
        rewards.append(well_formed)
        chosen.append(0.1)
    return RunPreset({"reward_weights": chosen}, {"reward_funcs": rewards})
