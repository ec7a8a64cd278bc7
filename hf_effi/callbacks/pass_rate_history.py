"""`PassRateHistoryCallback`: how the accuracy of each prompt moved over a GRPO run."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerControl, TrainerState, TrainingArguments

from .._files import load_state
from ..functional.data import check_count
from ..functional.rollouts import check_success_at, count_successes, stacked_history
from ._side_file import SideFileCallback
from .observer import describe
from .owners import OwningCallback, Role

logger = logging.getLogger(__name__)


class PassRateHistoryCallback(SideFileCallback, OwningCallback):
    """
    Collects the pass rate of each prompt each time it is generated for, for one-shot RLVR and for your own plots.

    It reads the groups of [`EffiGRPOTrainer`] before any filter, equal on every rank, and changes nothing. Its history
    is in `effi_pass_rates.pt` of each checkpoint, 8 bytes for each group, and goes on from there.

    Args:
        success_at (`float`, *optional*): Lowest reward of a right completion. Without it the reward that decides must
            be 0 or 1; where it is not, a warning says so, once, and nothing is collected.
        max_visits (`int`, *optional*, defaults to 1024): Pass rates kept of one row, at least 2; the oldest go first.

    Attributes:
        visits (`dict[int, list[float]]`): Row number -> pass rates, oldest first.

    Raises:
        ValueError: an argument out of range.

    Example:
    ```python
    history = PassRateHistoryCallback()
    EffiGRPOTrainer(model, reward, args, prompts, callbacks=[history]).train()
    best = high_variance_rows(history.table(len(prompts)), k=1)
    ```
    """

    role = Role("pass rate history", "Two callbacks collect pass rates in one file", "Keep one.")
    in_recipe = False
    side_file = "effi_pass_rates.pt"

    def __init__(self, success_at: float | None = None, max_visits: int = 1024) -> None:
        check_success_at(success_at)
        self.success_at, self.max_visits = success_at, check_count("max_visits", max_visits, 2)
        self.visits: dict[int, list[float]] = {}
        self._told = False

    def table(self, num_rows: int) -> Tensor:
        """Return the history as [`~hf_effi.functional.rollouts.high_variance_rows`] takes it."""
        return stacked_history(self.visits, num_rows)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.visits, self._told = {}, False
        path = self.side_path(args, state)
        if state.global_step > 0:
            try:
                self.visits = _visits_of(load_state(path))
            except Exception as error:  # whatever is in the file: it only observes
                logger.warning(f"PassRateHistoryCallback begins anew, without a history in {path}: {describe(error)}")

    def on_rollouts(self, args: Any, state: Any, control: Any, rows: list[int], groups: Any, **kwargs: Any) -> None:
        """Take the pass rates of the groups that were generated for these rows."""
        try:
            self._take(rows, groups)
        except Exception as error:  # it only observes
            if not self._told:
                logger.warning(f"PassRateHistoryCallback collects nothing: {describe(error)}")
            self._told = True

    def _take(self, rows: list[int], groups: Any) -> None:
        successes, counts = count_successes(groups.rewards, self.success_at)
        for row, right, scored in zip(rows, successes.tolist(), counts.tolist(), strict=True):
            if row >= 0 and scored:
                kept = self.visits.setdefault(row, [])
                kept.append(right / scored)
                del kept[: -self.max_visits]

    def side_state(self, args: TrainingArguments, state: TrainerState) -> dict[str, Tensor] | None:
        if not args.should_save or not self.visits:
            return None
        return {
            "rows": torch.tensor(list(self.visits)),
            "counts": torch.tensor([len(rates) for rates in self.visits.values()]),
            "rates": torch.tensor([rate for rates in self.visits.values() for rate in rates], dtype=torch.float64),
        }

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_end(args, state, control, **kwargs)
        if not self.visits and not self._told:
            logger.warning(
                "PassRateHistoryCallback has seen no group: rollouts are told by EffiGRPOTrainer alone, and row "
                "numbers are not known of a stream."
            )


def _visits_of(stored: dict[str, Tensor]) -> dict[int, list[float]]:
    """Return the history of a checkpoint; an error of Python's where it is something else."""
    parts = stored["rates"].split(stored["counts"].tolist())
    return {row: part.tolist() for row, part in zip(stored["rows"].tolist(), parts, strict=True)}
