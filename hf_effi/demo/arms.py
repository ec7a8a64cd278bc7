"""The arms of the demo: one table. To compare another setting, add a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..report.comparison import BASELINE


@dataclass(frozen=True)
class Arm:
    """
    One way to train, beside the others.

    Args:
        key (`str`): Short name, as given to `hf-effi demo --arms`.
        title (`str`): What tables and figures call it.
        options (`Mapping[str, Any]` or `None`): Own fields of `EffiGRPOConfig`; `None` means TRL's `GRPOTrainer`.
        control (`bool`): A control is shown, but never taken for the result.
        goes_on (`bool`): Runs `DemoSettings.extra_steps` further after the comparison at equal steps, only to see when
            it reaches the baseline's accuracy.
    """

    key: str
    title: str
    options: Mapping[str, Any] | None = field(default_factory=dict)
    control: bool = False
    goes_on: bool = False


#: Groups that are all right or all wrong are dropped, and a quarter of the completions of the others is kept.
_SELECTION = {
    "exact_savings": "auto",
    "difficulty_range": (0.0, 1.0),
    "difficulty_max_rounds": 1,
    "difficulty_underfill": "shrink",
    "prune_rate": 0.75,
    "prune_scope": "rank",
    "prune_allocation": False,
}

ARMS: tuple[Arm, ...] = (
    Arm(BASELINE, "TRL GRPOTrainer", None),
    Arm("exact", "exact savings", {"exact_savings": "auto"}),
    Arm("everything", "filter + CPPO + exact savings", {**_SELECTION, "prune_metric": "smallest"}, goes_on=True),
    Arm("random", "control: random rows", {**_SELECTION, "prune_metric": "random"}, control=True, goes_on=True),
)


def choose_arms(keys: Sequence[str] | None = None) -> tuple[Arm, ...]:
    """
    Return the arms with these keys in the order of the table, always with the baseline; all of them for `None`.

    Raises:
        ValueError: an unknown key; the message lists the known ones.
    """
    if keys is None:
        return ARMS
    known = {arm.key for arm in ARMS}
    for key in keys:
        if key not in known:
            raise ValueError(f"unknown arm {key!r}. Known: {', '.join(arm.key for arm in ARMS)}.")
    return tuple(arm for arm in ARMS if arm.key in {BASELINE, *keys})
