"""
What plans and logs say about learning rates: schedules made for a longer run, groups that stand still or ignore them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

#: Points at which a plan is looked at, over any stretch of it.
_SAMPLES = 256
#: A schedule has ended where it falls no further than this share of its peak, ...
_STANDS = 1e-6
#: ... and it was still running at 80 % of that length where it was above its end by this share.
_RUNS = 5e-3


def overlong_factor(
    plan: Callable[[int], float], max_steps: int, factors: Sequence[int], limit: float = 0.05
) -> tuple[int, float] | None:
    """
    Return by which of `factors` a plan is longer than the run, and the share of its peak at the end of the run.

    A plan is made for `factor * max_steps` updates where it is still running at 80 % of them, is at its lowest at the
    end and never falls below it afterwards, whatever its floor; and the end of the run lies above that by more than
    `limit`. A plan without an end (constant, inverse square root, exponential, cyclic) is not too long.

    Args:
        plan (`Callable[[int], float]`): Finished updates -> LR, in any unit.
        max_steps (`int`): Updates of the run.
        factors (`Sequence[int]`): Candidates; the smallest one that fits is returned.
        limit (`float`, *optional*, defaults to 0.05): Share of the peak by which the LR must be above its end.

    Example:
    ```python
    >>> overlong_factor(lambda step: max(1 - step / 400, 0.1), 100, (2, 4, 8))
    (4, 0.75)
    >>> overlong_factor(lambda step: (step + 1) ** -0.5, 100, (2, 4, 8)) is None
    True
    ```
    """
    run = {step: plan(step) for step in _sampled(0, max_steps)}
    top = max(run, key=lambda step: run[step])
    peak = max(run[top], 1e-30)
    left = run[max_steps]
    for factor in sorted(set(factors) - {0, 1}):
        length = factor * max_steps
        end = plan(length)
        if left - end <= limit * peak:
            continue
        running = [plan(step) for step in _sampled(top, int(0.8 * length))]
        after = [plan(step) for step in _sampled(length, length + length // 4)]
        if min(running) - end >= _RUNS * peak and min(after) >= end - _STANDS * peak:
            return factor, left / peak
    return None


def _sampled(first: int, last: int) -> list[int]:
    stride = max(1, (last - first) // _SAMPLES)
    return sorted({*range(first, last + 1, stride), last})


def _group_lrs(trace: Sequence[Mapping[str, Any]]) -> dict[int, list[tuple[float, float]]]:
    """Return (scheduler's LR, optimizer's LR) of each parameter group, from the entries that have both."""
    found: dict[int, list[tuple[float, float]]] = {}
    for entry in trace:
        planned = {0: entry.get("learning_rate"), **entry.get("scheduler_lrs", {})}
        used = {0: entry.get("optimizer_lr", entry.get("learning_rate")), **entry.get("optimizer_lrs", {})}
        for group in sorted(planned.keys() & used.keys()):
            if isinstance(planned[group], (int, float)) and isinstance(used[group], (int, float)):
                found.setdefault(group, []).append((planned[group], used[group]))
    return found


def group_at_zero(trace: Sequence[Mapping[str, Any]], logs: int) -> int | None:
    """
    Return the first parameter group whose LR is 0 in the last `logs` entries.

    Args:
        trace (`Sequence[Mapping]`): Log entries with `learning_rate` and `optimizer_lr` (of the first group), or with
            `scheduler_lrs` and `optimizer_lrs`, dicts from the number of a group to its LR.
        logs (`int`): Successive entries.

    Example:
    ```python
    >>> entry = {"scheduler_lrs": {0: 1e-3, 1: 0.0}, "optimizer_lrs": {0: 1e-3, 1: 0.0}}
    >>> group_at_zero([entry] * 3, 3), group_at_zero([entry] * 2, 3)
    (1, None)
    ```
    """
    for group, series in _group_lrs(trace).items():
        if len(series) >= logs and all(0 in pair for pair in series[-logs:]):
            return group
    return None


def group_that_ignores(trace: Sequence[Mapping[str, Any]], logs: int) -> tuple[int, float, float] | None:
    """
    Return the first group whose LR stands still while the scheduler's moves, and both LRs.

    The move must have outlasted one entry: a staircase moves once in many.

    Args:
        trace (`Sequence[Mapping]`): As in [`group_at_zero`].
        logs (`int`): Entries that are compared.

    Example:
    ```python
    >>> staircase = [{"learning_rate": lr, "optimizer_lr": 1.0} for lr in (1.0, 1.0, 1.0, 0.1, 0.1)]
    >>> group_that_ignores(staircase, 5)
    (0, 0.1, 1.0)
    ```
    """
    for group, series in _group_lrs(trace).items():
        planned, used = [pair[0] for pair in series[-logs:]], [pair[1] for pair in series[-logs:]]
        moved = len(set(planned[:-1] if logs > 2 else planned)) > 1
        if len(series) >= logs and moved and len(set(used)) == 1:
            return group, planned[-1], used[-1]
    return None


def of_group(group: int) -> str:
    """Return how a sentence names a parameter group; the first one goes without saying."""
    return f" of parameter group {group}" if group else ""
