"""What the log of a run says of its checkpoints: their losses, their metrics, and whether the LR was decayed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .._untrusted import is_number

Log = Sequence[Mapping[str, Any]]


def smoothed_losses(log: Log, steps: Sequence[int], saved: Sequence[int]) -> list[float]:
    """
    Return the mean of the training losses that were logged since the checkpoint before, for each checkpoint.

    One logged loss is that of a few batches; the mean over the interval tells checkpoints apart, not batches. Where
    the checkpoint before is gone, the interval is as long as the next one.

    Args:
        log (`Sequence[Mapping]`): `log_history` of a `trainer_state.json`.
        steps (`Sequence[int]`): Updates of the checkpoints, ascending.
        saved (`Sequence[int]`): Updates of all checkpoints that the run still has.

    Raises:
        ValueError: an interval without a logged loss; the message names it.
    """
    losses = [(entry["step"], entry["loss"]) for entry in log if _has(entry, "step") and _has(entry, "loss")]
    every = sorted({*saved, *steps})
    found = []
    for step in steps:
        place = every.index(step)
        later = every[place + 1] - step if place + 1 < len(every) else step
        begin = every[place - 1] if place else max(0, step - later)
        inside = [loss for at, loss in losses if begin < at <= step]
        if not inside:
            raise ValueError(
                f"No training loss was logged after update {begin} and up to {step}, which the weight of that "
                'checkpoint needs. Train with logging_steps <= save_steps, or choose kind="step" or "uniform".'
            )
        found.append(sum(inside) / len(inside))
    return found


def metric_at(log: Log, steps: Sequence[int], metric: str) -> list[float]:
    """
    Return a logged metric of each checkpoint, as it was logged at that very update.

    Raises:
        ValueError: a checkpoint without it; the message names the metrics that there are.
    """
    found = {entry["step"]: entry[metric] for entry in log if _has(entry, "step") and _has(entry, metric)}
    if missing := [step for step in steps if step not in found]:
        known = sorted({name for entry in log for name in entry if name not in ("step", "epoch")})
        raise ValueError(
            f"No {metric!r} was logged at the updates {missing}. Evaluate at each save (eval_steps = save_steps), or "
            f"choose a metric of the log: {', '.join(known) or 'it has none'}."
        )
    return [found[step] for step in steps]


def final_lr_ratio(log: Log, step: int) -> float | None:
    """
    Return the last logged learning rate up to an update as a share of the largest; `None` where fewer than two were
    logged.
    """
    rates = [
        (entry["step"], entry["learning_rate"])
        for entry in log
        if _has(entry, "step") and _has(entry, "learning_rate") and entry["step"] <= step
    ]
    peak = max((rate for _, rate in rates), default=0.0)
    return max(rates)[1] / peak if len(rates) >= 2 and peak > 0 else None


def _has(entry: Mapping[str, Any], name: str) -> bool:
    return is_number(entry.get(name))
