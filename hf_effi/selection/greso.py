"""GRESO: skip prompts that were all right or all wrong the last times."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..functional.data import check_count, check_number
from ..functional.kept_arguments import keeps_arguments
from ..functional.rollouts import (
    ShuffledPrompts,
    adjusted_base,
    check_success_at,
    smallest_rows,
    streaks_after,
    successes_of,
    visit_probability,
)
from ._history import HistorySelector, StepTotals, saved

if TYPE_CHECKING:
    from ..protocols import RolloutGroups


class GRESO(HistorySelector):
    """
    Walk through a shuffled dataset and skip, with a probability that adjusts itself, prompts whose groups were dead.

    A prompt whose last `z` groups in a row were all right (`p >= easy_at`) or all wrong (`p <= hard_at`) is skipped
    with probability `1 - max(p_base^z, least)`, with a base of its own for each kind. After each step a base goes down
    by `change` if the share of generated prompts that were dead of its kind was at least its target, else up.

    Paper: [GRESO](https://huggingface.co/papers/2506.02177). It needs a pass through the dataset before it can skip
    anything: in a run of one epoch it is a shuffled stream.

    Args:
        size (`int`, *optional*): Rows of the training dataset. By default what the trainer says.
        target_dead (`float`, *optional*, defaults to 0.25): Share of dead prompts aimed at, in (0, 1): a third of it
            all right, two thirds all wrong.
        p_easy, p_hard (`float`, *optional*, default to 0.5): Bases at the start, in `[p_low, p_high]`.
        change (`float`, *optional*, defaults to 0.01): Step of a base, in [0, 1]; 0 leaves the bases as they are.
        p_low, p_high (`float`, *optional*, default to 0.05 and 0.95): Ends of the bases, `0 < p_low <= p_high <= 1`.
        least (`float`, *optional*, defaults to 0.01): Least probability of a visit, in (0, 1].
        hard_at, easy_at (`float`, *optional*, default to 0 and 1): Pass rates up to which, and from which on, a group
            is dead, `0 <= hard_at < easy_at <= 1`.
        success_at (`float`, *optional*): Lowest reward of a right answer. Without it the reward that decides must be 0
            or 1.
        explore (`float`, *optional*, defaults to 0.1): Share of the rows that is drawn uniformly, skipping nothing.
        seed (`int`, *optional*, defaults to 0): Of all draws.

    Raises:
        ValueError: an argument out of range.

    Example:
    ```python
    >>> selector = GRESO(size=8, explore=0.0)
    >>> sorted(selector.select(8)), selector.passes
    ([0, 1, 2, 3, 4, 5, 6, 7], 1.0)
    ```
    """

    @keeps_arguments
    def __init__(
        self,
        size: int | None = None,
        *,
        target_dead: float = 0.25,
        p_easy: float = 0.5,
        p_hard: float = 0.5,
        change: float = 0.01,
        p_low: float = 0.05,
        p_high: float = 0.95,
        least: float = 0.01,
        hard_at: float = 0.0,
        easy_at: float = 1.0,
        success_at: float | None = None,
        explore: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__(size, explore, seed)
        check_number("target_dead", target_dead, 0, 1, open_low=True, open_high=True)
        check_number("p_high", p_high, 0, 1, open_low=True)
        check_number("p_low", p_low, 0, p_high, open_low=True)
        check_number("p_easy", p_easy, p_low, p_high)
        check_number("p_hard", p_hard, p_low, p_high)
        check_number("change", change, 0, 1)
        check_number("least", least, 0, 1, open_low=True)
        check_number("easy_at", easy_at, 0, 1, open_low=True)
        check_number("hard_at", hard_at, 0, easy_at, open_high=True)
        check_success_at(success_at)
        self.target_dead, self.change, self.least = target_dead, change, least
        self.p_low, self.p_high, self.hard_at, self.easy_at = p_low, p_high, hard_at, easy_at
        self.success_at = success_at
        #: bases as they are now: [all right, all wrong]
        self.bases = [float(p_easy), float(p_hard)]
        self._steps = StepTotals(3)
        #: rows of the walk with a streak of each kind, and how many of them were skipped, since the last `observe`
        self._met, self._skipped = [0, 0], [0, 0]

    @property
    def passes(self) -> float:
        """How often the walk has gone through the dataset, with the rows that it skipped."""
        self._ready()
        return self._stream.passes

    def _begin(self, size: int) -> None:
        self.streaks = torch.zeros(size, dtype=torch.int32)
        self._stream = ShuffledPrompts(size, self.seed)

    def _choose(self, count: int, free: Tensor, generator: torch.Generator) -> Tensor:
        free = free.clone()
        chosen = torch.zeros(0, dtype=torch.int64)
        walked, size = 0, len(free)
        while len(chosen) < count and walked < 2 * size:
            into = self._stream.cursor % size
            ahead = min(max(256, 4 * count), size - into)  # never over the end of a pass, which has each row once
            rows = torch.tensor(self._stream.select(ahead))
            streaks = self.streaks[rows]
            visit = visit_probability(streaks, self.bases[0], self.bases[1], self.least)
            drawn = torch.rand(ahead, generator=generator, dtype=torch.float64) < visit
            taken = (drawn & free[rows]).nonzero().flatten()[: count - len(chosen)]
            if len(chosen) + len(taken) == count:
                used = int(taken[-1]) + 1
                self._stream.cursor -= ahead - used
                rows, streaks, drawn = rows[:used], streaks[:used], drawn[:used]
            self._count(streaks, drawn, free[rows])
            walked += len(rows)
            chosen = torch.cat([chosen, rows[taken]])
            free[chosen] = False
        if len(chosen) < count:  # nearly everything is skipped: those with the shortest streaks
            chosen = torch.cat([chosen, smallest_rows(self.streaks.abs(), free, count - len(chosen))])
        return chosen

    def _count(self, streaks: Tensor, drawn: Tensor, free: Tensor) -> None:
        for kind, of_kind in enumerate((streaks > 0, streaks < 0)):
            self._met[kind] += int((of_kind & free).sum())
            self._skipped[kind] += int((of_kind & free & ~drawn).sum())

    def _learn(self, rows: Tensor, groups: RolloutGroups) -> None:
        successes, counts = successes_of(groups, self.success_at)
        rates = successes / counts
        for row, rate in zip(rows.tolist(), rates.unsqueeze(1), strict=True):  # a row can come twice
            place = self.streaks[row : row + 1]
            place.copy_(streaks_after(place, rate, self.hard_at, self.easy_at))
        dead = [float((rates >= self.easy_at).sum()), float((rates <= self.hard_at).sum())]
        before, totals = self._steps.add(groups.step, [*dead, float((counts > 0).sum())], self.bases)
        shares = [total / max(1.0, totals[2]) for total in totals[:2]]
        if self.passes >= 1 and totals[2]:
            targets = (self.target_dead / 3, 2 * self.target_dead / 3)
            self.bases = [
                adjusted_base(base, share, target, self.change, self.p_low, self.p_high)
                for base, share, target in zip(before, shares, targets, strict=True)
            ]
        for kind, name in enumerate(("easy", "hard")):
            self._metrics[f"p_{name}"] = self.bases[kind]
            self._metrics[f"dead_{name}"] = shares[kind]
            if self._met[kind]:
                self._metrics[f"skip_rate_{name}"] = self._skipped[kind] / self._met[kind]
        self._metrics["passes"] = self.passes
        self._met, self._skipped = [0, 0], [0, 0]

    def _own_state(self) -> dict[str, Any]:
        return {
            "streaks": self.streaks.clone(),
            "bases": list(self.bases),
            "cursor": self._stream.cursor,
            "steps": self._steps.state_dict(),
        }

    def _load_own(self, state: Mapping[str, Any]) -> None:
        self.streaks = saved(state, "streaks", self.streaks)
        self.bases = [float(base) for base in state["bases"]]
        self._steps.load_state_dict(state["steps"])
        self._stream = ShuffledPrompts(len(self.streaks), self.seed)
        self._stream.cursor = check_count("cursor", state["cursor"], 0)
