"""How many completions each prompt gets: allocators for `rollout_allocator=`, and what predicts their pass rates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import MismatchError
from ..functional.data import check_count, check_number
from ..functional.kept_arguments import keeps_arguments
from ..functional.rollouts import (
    check_success_at,
    divide_budget,
    gradient_variance,
    knapsack_values,
    relaxed_sizes,
    round_sizes,
    successes_of,
)
from ..functional.rollouts.allocation import ESTIMATORS, check_budget
from .rates import BetaRates

if TYPE_CHECKING:
    from ..protocols import RolloutGroups, SelectionContext

#: how VIP finds whole numbers
SOLVERS = ("exact", "relaxed")


class _Allocator:
    """What the allocators share: bounds, a predictor of pass rates, and a warm-up in which all get the same."""

    def __init__(self, low: int, high: int | None, rates: Any, warmup_passes: float, success_at: float | None) -> None:
        check_count("low", low, 2)
        if high is not None and check_count("high", high, 2) < low:
            raise ValueError(f"high={high} is below low={low}. Raise it, or leave it out for no upper bound.")
        check_number("warmup_passes", warmup_passes, 0)
        check_success_at(success_at)
        self.low, self.high, self.warmup_passes, self.success_at = low, high, warmup_passes, success_at
        self.rates = BetaRates() if rates is None else rates
        for name in ("attach", "predict", "update", "state_dict", "load_state_dict"):
            if not callable(getattr(self.rates, name, None)):
                raise ValueError(
                    f"rates= must have the methods of hf_effi.selection.BetaRates, and {type(self.rates).__name__} "
                    f"has no {name}()."
                )
        self._size: int | None = None
        self._observed = 0
        self._last: list[int] = []

    def attach(self, context: SelectionContext) -> None:
        """
        Learn how many rows the dataset has, and how large groups are on average.

        Raises:
            ValueError: no division has groups within `low` and `high`.
        """
        mean = getattr(context, "group_size", None)
        if mean is not None and not self.low <= mean <= (mean if self.high is None else self.high):
            raise ValueError(
                f"groups of low={self.low} to high={self.high} completions cannot have num_generations={mean} on "
                "average. Change the bounds, or num_generations."
            )
        self._size, self._observed, self._last = context.size, 0, []
        self.rates.attach(context)

    @property
    def passes(self) -> float:
        """Groups observed so far, as passes over the dataset."""
        return self._observed / self._attached()

    def _attached(self) -> int:
        if self._size is None:
            raise ValueError(
                f"{type(self).__name__} does not know the dataset yet. Pass it as rollout_allocator=, or call "
                "attach(context) first."
            )
        return self._size

    def allocate(self, rows: Sequence[int], budget: int) -> list[int]:
        """Return the completions of each row; their sum is `budget`."""
        high = budget if self.high is None else self.high
        check_budget(len(rows), budget, self.low, high)
        if self.passes < self.warmup_passes:
            even, more = divmod(budget, len(rows))
            self._last = [even + (i < more) for i in range(len(rows))]
            return self._last
        high = min(high, budget - self.low * (len(rows) - 1))
        self._last = self._divide(self.rates.predict(list(rows)), budget, high)
        return self._last

    def _divide(self, rates: Tensor, budget: int, high: int) -> list[int]:
        raise NotImplementedError

    def observe(self, rows: list[int], groups: RolloutGroups) -> None:
        """Take the right and wrong completions of each prompt."""
        successes, counts = successes_of(groups, self.success_at)
        self.rates.update(list(rows), successes, counts)
        self._observed += len(rows)

    def metrics(self) -> dict[str, float]:
        """Return the smallest and the largest group of the last generation."""
        if not self._last:
            return {}
        return {"group_size_min": float(min(self._last)), "group_size_max": float(max(self._last))}

    def state_dict(self) -> dict[str, Any]:
        return {
            "size": self._attached(),
            "observed": self._observed,
            "predictor": type(self.rates).__name__,
            "rates": self.rates.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Go on where `state` stopped.

        Raises:
            MismatchError: the state belongs to a dataset of another size, or to another predictor.
        """
        mine = type(self.rates).__name__
        if (theirs := state.get("predictor", mine)) != mine:
            raise MismatchError(
                f"the checkpoint's pass rates are those of {theirs}, this run predicts them by {mine}. Build rates= "
                "as in the run that is resumed, or start a new run from the checkpoint's weights."
            )
        if state["size"] != self._attached():
            raise MismatchError(
                f"the checkpoint's pass rates are of {state['size']} rows, this dataset has {self._size}. Resume with "
                "the same dataset, or start a new run from the checkpoint's weights."
            )
        self._observed = state["observed"]
        self.rates.load_state_dict(state["rates"])


class VIP(_Allocator):
    """
    Variance-informed allocation: the completions of a generation go where they lower the variance of the gradient
    most.

    `min sum_q Var(n_q, p_q)` with `sum_q n_q` fixed, see [`~hf_effi.functional.rollouts.gradient_variance`]. Paper:
    [2602.01601](https://huggingface.co/papers/2602.01601).

    Args:
        estimator (`str`, *optional*, defaults to `"dr_grpo"`): Whose variance: `"dr_grpo"` or `"rloo"`.
        low (`int`, *optional*, defaults to 2): Fewest completions of a prompt, >= 2.
        high (`int`, *optional*): Most completions of a prompt, >= `low`; no bound without it.
        rates (*optional*): What predicts pass rates: [`BetaRates`] (the default) or [`EmbeddingRates`], the paper's
            Gaussian process.
        solver (`str`, *optional*, defaults to `"exact"`): `"exact"` finds the best whole numbers; `"relaxed"` is the
            paper's relaxation with greedy rounding, which can be slightly worse.
        warmup_passes (`float`, *optional*, defaults to 0): Passes over the dataset in which all prompts get the same.
        success_at (`float`, *optional*): Lowest reward of a right answer. Without it the reward that decides must be
            0 or 1.

    Example:
    ```python
    >>> from types import SimpleNamespace
    >>> vip = VIP(low=2, high=6)
    >>> vip.attach(SimpleNamespace(size=3))
    >>> vip.rates.update([0, 1, 2], torch.tensor([0.0, 8.0, 4.0]), torch.tensor([8.0, 8.0, 8.0]))
    >>> vip.allocate([0, 1, 2], budget=12)
    [4, 2, 6]
    ```
    """

    @keeps_arguments
    def __init__(
        self,
        estimator: str = "dr_grpo",
        low: int = 2,
        high: int | None = None,
        rates: Any = None,
        solver: str = "exact",
        warmup_passes: float = 0.0,
        success_at: float | None = None,
    ) -> None:
        if estimator not in ESTIMATORS:
            raise ValueError(f"estimator must be one of {ESTIMATORS}, got {estimator!r}.")
        if solver not in SOLVERS:
            raise ValueError(f"solver must be one of {SOLVERS}, got {solver!r}.")
        self.estimator, self.solver = estimator, solver
        super().__init__(low, high, rates, warmup_passes, success_at)

    def _divide(self, rates: Tensor, budget: int, high: int) -> list[int]:
        values = -gradient_variance(rates, torch.arange(self.low, high + 1), self.estimator)
        if self.solver == "exact":
            return divide_budget(values, budget, self.low)
        relaxed = relaxed_sizes(rates, budget, self.low, high, self.estimator)
        return round_sizes(relaxed, values, budget, self.low)


class Knapsack(_Allocator):
    """
    Knapsack RL: the completions of a generation go where they are worth most.

    `max sum_q Value(N_q, p_q)` with `sum_q N_q` fixed, see [`~hf_effi.functional.rollouts.knapsack_values`], solved
    exactly. Paper: [2509.25849](https://huggingface.co/papers/2509.25849).

    Args:
        low (`int`, *optional*, defaults to 2): Fewest completions of a prompt, >= 2.
        high (`int`, *optional*, defaults to 128): Most completions of a prompt, >= `low`; `None` is no bound.
        rates (*optional*): What predicts pass rates: [`BetaRates`] (the default) or [`EmbeddingRates`].
        warmup_passes (`float`, *optional*, defaults to 1): Passes over the dataset in which all prompts get the same.
        success_at (`float`, *optional*): Lowest reward of a right answer. Without it the reward that decides must be
            0 or 1.

    Example:
    ```python
    >>> from types import SimpleNamespace
    >>> knapsack = Knapsack(warmup_passes=0)
    >>> knapsack.attach(SimpleNamespace(size=3))
    >>> knapsack.rates.update([0, 1, 2], torch.tensor([0.0, 8.0, 2.0]), torch.tensor([8.0, 8.0, 8.0]))
    >>> knapsack.allocate([0, 1, 2], budget=24)
    [13, 2, 9]
    ```
    """

    @keeps_arguments
    def __init__(
        self,
        low: int = 2,
        high: int | None = 128,
        rates: Any = None,
        warmup_passes: float = 1.0,
        success_at: float | None = None,
    ) -> None:
        super().__init__(low, high, rates, warmup_passes, success_at)

    def _divide(self, rates: Tensor, budget: int, high: int) -> list[int]:
        return divide_budget(knapsack_values(rates, torch.arange(self.low, high + 1)), budget, self.low)
