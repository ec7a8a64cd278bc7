"""AdaRFT: prompts of the difficulty that fits the policy, by what it was rewarded for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..functional.data import check_number
from ..functional.kept_arguments import keeps_arguments
from ..functional.rollouts import check_success_at, moved_target, smallest_rows, successes_of
from ._history import Column, HistorySelector, StepTotals, saved

if TYPE_CHECKING:
    from ..protocols import RolloutGroups


class AdaRFT(HistorySelector):
    """
    Aim at a difficulty, move it up while the policy does well and down while it does not, and take the nearest rows.

    After each step, with `R` the share of right completions in it and `d` the stored difficulties,
    `T <- clip(T + step_fraction * (max d - min d) * tanh(sensitivity * (R - target_reward)), min d, max d)`. A call
    returns the rows with the smallest `|d - T|`; among equal ones those that were generated for least often, then the
    lower row number.

    Paper: [AdaRFT](https://huggingface.co/papers/2504.05520).

    Args:
        difficulty (column): Greater is harder: the name of a column of the training dataset, or one number per row.
            [`~hf_effi.functional.data.pass_rate_difficulty`] makes it from recorded answers.
        size (`int`, *optional*): Rows of the training dataset. By default what the trainer says.
        target_reward (`float`, *optional*, defaults to 0.5): Share of right completions aimed at, in (0, 1).
        step_fraction (`float`, *optional*, defaults to 0.1): Largest step, as a share of the range of difficulties, in
            (0, 1].
        sensitivity (`float`, *optional*, defaults to 2): Of the step to the reward, > 0.
        start_fraction (`float`, *optional*, defaults to 0): Where in the range `T` begins, in [0, 1]; 0 is easiest.
        success_at (`float`, *optional*): Lowest reward of a right answer. Without it the reward that decides must be 0
            or 1.
        explore (`float`, *optional*, defaults to 0.1): Share of the rows that is drawn uniformly.
        seed (`int`, *optional*, defaults to 0): Of those draws.

    Raises:
        ValueError: an argument out of range.

    Example:
    ```python
    >>> selector = AdaRFT([0.9, 0.1, 0.5, 0.3], explore=0.0, start_fraction=0.5)
    >>> selector.target, selector.select(2)
    (0.5, [2, 3])
    ```
    """

    _columns = ("difficulty",)

    @keeps_arguments
    def __init__(
        self,
        difficulty: Column,
        size: int | None = None,
        *,
        target_reward: float = 0.5,
        step_fraction: float = 0.1,
        sensitivity: float = 2.0,
        start_fraction: float = 0.0,
        success_at: float | None = None,
        explore: float = 0.1,
        seed: int = 0,
    ) -> None:
        self.difficulty = difficulty
        super().__init__(size, explore, seed)
        self.target_reward = check_number("target_reward", target_reward, 0, 1, open_low=True, open_high=True)
        self.step_fraction = check_number("step_fraction", step_fraction, 0, 1, open_low=True)
        self.sensitivity = check_number("sensitivity", sensitivity, 0, open_low=True)
        self.start_fraction = check_number("start_fraction", start_fraction, 0, 1)
        check_success_at(success_at)
        self.success_at = success_at
        self._steps = StepTotals(2)

    @property
    def target(self) -> float:
        """The difficulty that is aimed at."""
        self._ready()
        return self._target

    def _begin(self, size: int) -> None:
        self._difficulty = self._numbers("difficulty")
        self._low, self._high = float(self._difficulty.min()), float(self._difficulty.max())
        self._target = self._low + self.start_fraction * (self._high - self._low)
        self._visits = torch.zeros(size, dtype=torch.int32)

    def _choose(self, count: int, free: Tensor, generator: torch.Generator) -> Tensor:
        return smallest_rows((self._difficulty - self._target).abs(), free, count, then=self._visits)

    def _learn(self, rows: Tensor, groups: RolloutGroups) -> None:
        successes, counts = successes_of(groups, self.success_at)
        self._visits.index_add_(0, rows, torch.ones(len(rows), dtype=torch.int32))
        sums = (float(successes.sum()), float(counts.sum()))
        (before,), (right, scorable) = self._steps.add(groups.step, sums, [self._target])
        if scorable:
            self._target = moved_target(
                before,
                right / scorable,
                self._low,
                self._high,
                rate=self.step_fraction,
                sensitivity=self.sensitivity,
                wanted=self.target_reward,
            )
            self._metrics["pass_rate"] = right / scorable
        self._metrics["target_difficulty"] = self._target
        self._metrics["difficulty"] = float(self._difficulty[rows].mean())
        self._metrics["difficulty_error"] = float((self._difficulty[rows] - before).abs().mean())

    def _own_state(self) -> dict[str, Any]:
        return {"target": self._target, "visits": self._visits.clone(), "steps": self._steps.state_dict()}

    def _load_own(self, state: Mapping[str, Any]) -> None:
        self._target = float(state["target"])
        self._visits = saved(state, "visits", self._visits)
        self._steps.load_state_dict(state["steps"])
