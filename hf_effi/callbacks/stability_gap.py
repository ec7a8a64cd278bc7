"""`StabilityGapCallback`: how deep an old and a new set dip after the data changes, and for how long."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from ..functional import metrics
from ..functional.data import StabilityGap, measure_gap
from ..functional.findings import Finding
from ._turns import WRITE, TurnCallback, in_turn
from .observer import describe, only_observes
from .owners import Role
from .probing import in_probe

logger = logging.getLogger(__name__)


class StabilityGapCallback(TurnCallback):
    """
    Read the evaluations of an old and a new set and report the stability gap of each: depth and length of the dip.

    Give the Trainer `eval_dataset={"old": ..., "new": ...}`, `eval_on_start=True`, and an evaluation every few
    updates. Each evaluation's log gets `effi/stability_gap/<set>/depth`, `/behind` and `/duration_updates`
    ([`~hf_effi.functional.data.measure_gap`]), so that trackers and the run record have them. When training ends, what
    has dipped and has not recovered is said once. It only observes: weights are those of the run without it, and if it
    fails, it says so and the run goes on. Paper: 2406.14833.

    Args:
        old (`str`, *optional*, defaults to `"eval_old_loss"`): The metric of the old set, as it is logged; `None` for
            none.
        new (`str`, *optional*, defaults to `"eval_new_loss"`): The metric of the new set; `None` for none.
        greater_is_better (`bool`, *optional*, defaults to `False`): `True` for an accuracy.
        tolerance (`float`, *optional*, defaults to 0.0): Falls up to this one are noise, in units of the metric.
        say (`Callable[[str], None]`, *optional*): Takes each sentence; warnings in the log by default. Only the first
            process speaks.

    Attributes:
        gaps (`dict[str, StabilityGap]`): `"old"` and `"new"`, as of the last evaluation.
        findings (`list[Finding]`): What was said.

    Raises:
        ValueError: no metric at all, one name for both, or a tolerance below 0.

    Example:
    ```python
    gap = StabilityGapCallback()
    args = TrainingArguments("out", eval_on_start=True, eval_strategy="steps", eval_steps=20)
    sets = {"old": old_rows, "new": new_rows}
    Trainer(model, args, train_dataset=rows, eval_dataset=sets, callbacks=[gap]).train()
    print(gap.gaps["old"].depth, gap.gaps["old"].duration)
    ```
    """

    role = Role("stability gap", "Two callbacks report one dip", "Keep one.")
    in_recipe = False

    def __init__(
        self,
        old: str | None = "eval_old_loss",
        new: str | None = "eval_new_loss",
        *,
        greater_is_better: bool = False,
        tolerance: float = 0.0,
        say: Callable[[str], None] | None = None,
    ) -> None:
        if old == new:
            raise ValueError(f"old={old!r} and new={new!r} must be two metrics, or one of them None.")
        measure_gap([0], [0.0], tolerance=tolerance)  # checks the range
        self.names = {name: metric for name, metric in (("old", old), ("new", new)) if metric is not None}
        self.greater_is_better, self.tolerance = greater_is_better, tolerance
        self.say = logger.warning if say is None else say
        self.gaps: dict[str, StabilityGap] = {}
        self.findings: list[Finding] = []
        self._series: dict[str, dict[int, float]] = {}
        self._watches = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.gaps, self.findings, self._series, self._watches = {}, [], {name: {} for name in self.names}, True
        self._read_history(state)

    @only_observes
    def _read_history(self, state: TrainerState) -> None:
        for entry in state.log_history if state.global_step else []:  # of the run that is resumed
            self._note(entry, int(entry["step"]))

    @in_turn(WRITE)
    @only_observes
    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self._watches or in_probe(state):
            return
        for name in self._note(kwargs["logs"], state.global_step):
            gap = self.gaps[name]
            values = dict(zip(metrics.DIP_VALUES, (gap.depth, gap.behind, float(gap.duration)), strict=True))
            found = {f"{metrics.STABILITY_GAP}{name}/{key}": value for key, value in values.items()}
            kwargs["logs"].update(found)
            state.log_history[-1].update(found)

    @only_observes
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._watches:
            return
        self._watches = False
        for name, metric in self.names.items():
            problem, advice = self._sentence(name, metric)
            if problem:
                finding = Finding("stability_gap", state.global_step, problem, advice)
                self.findings.append(finding)
                if args.process_index == 0:
                    self.say(str(finding))

    def stop_observing(self, error: Exception) -> None:
        """Say why nothing more is measured: what only observes ends no run."""
        self._watches = False
        logger.warning(f"StabilityGapCallback measures nothing more, and the run goes on: {describe(error)}")

    def _note(self, entry: dict[str, Any], step: int) -> list[str]:
        """Add what a log entry has, and return the sets that it has something of."""
        found = []
        for name, metric in self.names.items():
            value = entry.get(metric)
            if isinstance(value, (int, float)) and math.isfinite(value):
                series = self._series[name]
                series[step] = float(value)
                self.gaps[name] = measure_gap(
                    list(series), list(series.values()), self.greater_is_better, self.tolerance
                )
                found.append(name)
        return found

    def _sentence(self, name: str, metric: str) -> tuple[str, str]:
        series, gap = self._series[name], self.gaps.get(name)
        if gap is None:
            return (
                f"{metric} was never logged, so the dip of the {name} set is not known",
                'pass eval_dataset={"old": ..., "new": ...} and eval_strategy="steps"',
            )
        if next(iter(series)) != 0:
            return (
                f"the first {metric} is of update {next(iter(series))}, so the dip before it is not known",
                "set eval_on_start=True",
            )
        if gap.began is None or gap.recovered is not None:
            return "", ""
        advice = {
            "old": "mix old rows into the batches (ReplaySampler, ReplayStream), or lower the learning rate",
            "new": "train several epochs on the best part of the new rows (hf_effi.recipes.stability_gap)",
        }
        return (
            f"{metric} fell behind its start at update {gap.began}, by {gap.depth:.4g} at worst (update "
            f"{gap.lowest}), and has not come back in {gap.duration} updates",
            advice[name],
        )
