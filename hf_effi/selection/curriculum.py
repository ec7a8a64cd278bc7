"""A curriculum over stored pass rates: easy prompts first, harder ones as the run goes on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..functional.data import check_number, competence, seeded
from ..functional.kept_arguments import keeps_arguments
from ..functional.rollouts import draw_uniform, smallest_rows
from ._history import Column, HistorySelector

if TYPE_CHECKING:
    from ..protocols import RolloutGroups

#: draws of a call have a count of at most this in their seed; ties are shuffled by a stream of their own
_TIES = 2**40


class OfflineCurriculum(HistorySelector):
    """
    Draw uniformly from the easiest part of the dataset, which grows with the progress of the run to all of it.

    The part is the easiest `ceil(c(t) * size)` rows, with
    `c(t) = min(1, (t / full_at * (1 - start^root) + start^root)^(1 / root))` of
    [`~hf_effi.functional.data.competence`], `t` the share of the steps done at the last generation. Rows of equal pass
    rate are put in a random order, once.

    This is the curriculum of [SARI](https://huggingface.co/papers/2504.15900): GRPO on prompts from easy to hard by
    the pass rate of the base model.

    Args:
        pass_rate (column): The name of a column of the training dataset, or one number per row.
        size (`int`, *optional*): Rows of the training dataset. By default what the trainer says.
        descending (`bool`, *optional*, defaults to `True`): Great numbers are easy, as pass rates are. `False`: great
            numbers are hard, as difficulties are.
        start (`float`, *optional*, defaults to 0.1): Part of the dataset at the start, in (0, 1].
        root (`float`, *optional*, defaults to 2): Form of the growth, in [1, 100]: 1 is linear, 2 the square root.
        full_at (`float`, *optional*, defaults to 1): Progress at which all rows are in play, in (0, 1].
        explore (`float`, *optional*, defaults to 0.1): Share of the rows that is drawn from the whole dataset.
        seed (`int`, *optional*, defaults to 0): Of all draws.

    Raises:
        ValueError: an argument out of range.

    Example:
    ```python
    >>> selector = OfflineCurriculum([0.1, 0.9, 0.5, 0.7], start=0.5, explore=0.0)
    >>> sorted(selector.select(2))
    [1, 3]
    ```
    """

    _columns = ("pass_rate",)

    @keeps_arguments
    def __init__(
        self,
        pass_rate: Column,
        size: int | None = None,
        *,
        descending: bool = True,
        start: float = 0.1,
        root: float = 2.0,
        full_at: float = 1.0,
        explore: float = 0.1,
        seed: int = 0,
    ) -> None:
        self.pass_rate = pass_rate
        super().__init__(size, explore, seed)
        if not isinstance(descending, bool):
            raise TypeError(f"descending must be True or False, got {descending!r}.")
        check_number("root", root, 1, 100)
        competence(0.0, start, root, full_at)  # checks the others
        self.descending, self.start, self.root, self.full_at = descending, start, root, full_at
        self.progress = 0.0

    @property
    def pool(self) -> int:
        """Rows that are in play now."""
        size = self._ready()
        share = competence(self.progress, self.start, self.root, self.full_at)
        # The subtraction keeps 0.3 * 10 = 3.0000000000000004 from opening a fourth row.
        return max(1, math.ceil(share * size - 1e-9))

    def _begin(self, size: int) -> None:
        self._scores = self._numbers("pass_rate")
        shuffle = torch.randperm(size, generator=seeded(self.seed, _TIES))
        order = shuffle[torch.sort(self._scores[shuffle], descending=self.descending, stable=True).indices]
        self._ranks = torch.empty(size, dtype=torch.int64)
        self._ranks[order] = torch.arange(size)

    def _choose(self, count: int, free: Tensor, generator: torch.Generator) -> Tensor:
        chosen = draw_uniform(free & (self._ranks < self.pool), count, generator)
        if len(chosen) == count:
            return chosen
        free = free.clone()
        free[chosen] = False  # the part has too few rows: the easiest of the others
        return torch.cat([chosen, smallest_rows(self._ranks, free, count - len(chosen))])

    def _learn(self, rows: Tensor, groups: RolloutGroups) -> None:
        self.progress = min(1.0, max(0.0, float(groups.progress)))
        self._metrics["competence"] = competence(self.progress, self.start, self.root, self.full_at)
        self._metrics["pool"] = float(self.pool)
        self._metrics["stored_pass_rate"] = float(self._scores[rows].mean())

    def _own_state(self) -> dict[str, Any]:
        return {"progress": self.progress}

    def _load_own(self, state: Mapping[str, Any]) -> None:
        self.progress = check_number("progress", state["progress"], 0, 1)
