"""From the curves of `bench.grpo_selection` to its figures: when a target is reached, and against what by chance."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bench._schema import headline
from bench._selection_arms import BASELINE, EXACT
from hf_effi.functional import referee

#: what a curve is read against
AXES = ("cpu_seconds", "rollouts", "prompts", "steps", "tokens_forwarded")
#: evaluations whose mean is the accuracy at the end of a run
LAST = 3
#: two-sided 95 % quantiles of Student's t by degrees of freedom
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

Curve = Sequence[Mapping[str, float]]


def rising(values: Sequence[float]) -> list[float]:
    """
    Return the non-decreasing values with the least squared distance to `values` (pool adjacent violators).

    Neighbours that fall are replaced by their mean until none falls, so that a single lucky evaluation does not count
    as progress, and a single unlucky one does not undo it.

    Example:
    ```python
    >>> rising([0.1, 0.5, 0.3, 0.6])
    [0.1, 0.4, 0.4, 0.6]
    ```
    """
    blocks: list[list[float]] = []  # sum, count
    for value in values:
        blocks.append([value, 1])
        while len(blocks) > 1 and blocks[-2][0] * blocks[-1][1] >= blocks[-1][0] * blocks[-2][1]:
            total, count = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += count
    return [total / count for total, count in blocks for _ in range(int(count))]


def time_to_target(places: Sequence[float], values: Sequence[float], target: float) -> float | None:
    """
    Return where a noisy curve reaches `target`: the rule of every arm, the baseline among them.

    The curve is replaced by its least-squares rising fit ([`rising`]), and the first crossing of the fit is read off,
    on a straight line between two evaluations. The first crossing of the raw curve would favour arms with many or
    noisy evaluations; a crossing after which no evaluation falls below the target would favour arms with few. A curve
    that falls again for good pulls its fit down, so that it has not reached what it does not keep.

    Args:
        places (`Sequence[float]`): Seconds, rollouts or steps of the evaluations, ascending, at least one.
        values (`Sequence[float]`): Accuracy there.
        target (`float`): Accuracy wanted.

    Returns:
        `float` or `None`: `None` where the fit never gets there.

    Example:
    ```python
    >>> time_to_target([0, 10, 20, 30], [0.2, 0.4, 0.6, 0.8], 0.5)
    15.0
    ```
    """
    if len(places) != len(values) or not places:
        raise ValueError(f"{len(places)} places and {len(values)} values: there must be as many, and at least one.")
    points = list(zip(map(float, places), rising(values), strict=True))
    return referee.time_to_target(points, target, "higher", interpolate=True)


def resampled(curve: Curve, grid: Sequence[float]) -> list[dict[str, float]]:
    """Return the curve at these CPU seconds: on straight lines between its points, level before and after them."""
    places, out, i = [point["cpu_seconds"] for point in curve], [], 0
    for place in grid:
        while i + 1 < len(places) - 1 and places[i + 1] < place:
            i += 1
        if place >= places[-1] or place <= places[0]:
            out.append({**curve[-1 if place >= places[-1] else 0], "cpu_seconds": place})
            continue
        low, high = curve[i], curve[i + 1]
        share = (place - low["cpu_seconds"]) / (high["cpu_seconds"] - low["cpu_seconds"])
        out.append({name: low[name] + share * (high[name] - low[name]) for name in low})
    return out


def mean_curve(curves: Sequence[Curve], grid: Sequence[float]) -> list[dict[str, float]]:
    """Return the mean of several curves at these CPU seconds."""
    points = zip(*(resampled(curve, grid) for curve in curves), strict=True)
    return [{name: statistics.fmean(one[name] for one in seeds) for name in seeds[0]} for seeds in points]


def final_accuracy(curve: Curve) -> float:
    """Return the mean of the last evaluations."""
    return statistics.fmean(point["accuracy"] for point in curve[-LAST:])


def reached(curve: Curve, axis: str, target: float) -> float | None:
    """Return where on an axis a curve reaches the target, see [`time_to_target`]."""
    return time_to_target([point[axis] for point in curve], [point["accuracy"] for point in curve], target)


def verdict(differences: Sequence[float]) -> str:
    """
    Return what paired differences say: whether the 95 % interval of their mean leaves out 0, or all have one sign.

    Example:
    ```python
    >>> verdict([0.02, 0.021, 0.019]), verdict([0.001, 0.05, 0.01]), verdict([-0.01, 0.02, 0.03])
    ('better (interval)', 'better (all seeds)', 'not shown')
    ```
    """
    if len(differences) < 2:
        return "not shown"
    mean = statistics.fmean(differences)
    half = _T[min(len(differences) - 2, len(_T) - 1)] * statistics.stdev(differences) / math.sqrt(len(differences))
    for sign, word in ((1, "better"), (-1, "worse")):
        if sign * mean - half > 0:
            return f"{word} (interval)"
        if all(sign * one > 0 for one in differences):
            return f"{word} (all seeds)"
    return "not shown"


def _ratio(value: float | None, base: float | None) -> float | None:
    return None if value is None or not base else round(value / base, 4)


def _compared(mine: Mapping[int, Mapping[str, Any]], theirs: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the paired differences over the seeds that both have, at equal CPU seconds."""
    seeds = sorted(set(mine) & set(theirs))
    area = [mine[seed]["mean_accuracy"] - theirs[seed]["mean_accuracy"] for seed in seeds]
    final = [mine[seed]["final_accuracy"] - theirs[seed]["final_accuracy"] for seed in seeds]
    return {
        "mean_accuracy_difference": [round(value, 4) for value in area],
        "final_accuracy_difference": [round(value, 4) for value in final],
        "verdict": verdict(area),
    }


def summarize(
    records: Sequence[Mapping[str, Any]], arms: Sequence[Any], grid: Sequence[float]
) -> list[dict[str, Any]]:
    """
    Return one row per arm: means over its seeds, and beside the baseline and its control.

    The target is the baseline's final accuracy, the mean over its seeds. Where it is reached is read off the mean of
    an arm's curves; the range is that of the single seeds, with `None` for one that does not get there.
    """
    by_arm: dict[str, dict[int, dict[str, Any]]] = {}
    for record in records:
        curve = resampled(record["curve"], grid)
        extra = {
            "grid_curve": curve,
            "final_accuracy": final_accuracy(curve),
            "mean_accuracy": statistics.fmean(point["accuracy"] for point in curve[1:]),
        }
        by_arm.setdefault(record["arm"], {})[record["seed"]] = {**record, **extra}
    means = {key: mean_curve([run["curve"] for run in runs.values()], grid) for key, runs in by_arm.items()}
    target = final_accuracy(means[BASELINE])
    base = {axis: reached(means[BASELINE], axis, target) for axis in AXES}
    rows = []
    for arm in arms:
        if arm.key not in by_arm:
            rows.append({"part": "arm", "arm": arm.key, "title": arm.title, "missing": arm.missing() or ["no run"]})
            continue
        runs, curve = by_arm[arm.key], means[arm.key]
        rows.append(
            {
                "part": "arm",
                "arm": arm.key,
                "title": arm.title,
                "combination": arm.combination,
                "control": arm.control,
                "seeds": sorted(runs),
                "final_accuracy": round(final_accuracy(curve), 4),
                "final_accuracy_range": _ends(run["final_accuracy"] for run in runs.values()),
                "mean_accuracy": round(statistics.fmean(run["mean_accuracy"] for run in runs.values()), 4),
                "to_target": {axis: _rounded(reached(curve, axis, target)) for axis in AXES},
                "ratio_to_baseline": {axis: _ratio(reached(curve, axis, target), base[axis]) for axis in AXES},
                "cpu_seconds_ratio_seeds": [
                    _ratio(reached(run["grid_curve"], "cpu_seconds", target), base["cpu_seconds"])
                    for run in runs.values()
                ],
                "cpu_seconds": _mean_of([run["cpu_seconds"] for run in runs.values()]),
                "counts": _mean_of([run["counts"] for run in runs.values()]),
                "groups_kept": round(statistics.fmean(run["groups_kept"] for run in runs.values()), 4),
                "against_control": (
                    _compared(runs, by_arm[arm.control]) if arm.control in by_arm else None  # a control has none
                ),
                "curve": [round(point["accuracy"], 4) for point in curve],
            }
        )
    return rows


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _ends(values: Any) -> list[float]:
    found = sorted(values)
    return [round(found[0], 4), round(found[-1], 4)]


def _mean_of(counts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: round(statistics.fmean(one[name] for one in counts), 2) for name in counts[0]}


def figures(rows: Sequence[Mapping[str, Any]], goal: str | None) -> list[dict[str, Any]]:
    """
    Return the headlines of a task: of the combination that is fastest in CPU seconds, and of single arms.

    Args:
        goal (`str`, *optional*): Of the ratio of CPU seconds; a smoke test has none.
    """
    ran = {row["arm"]: row for row in rows if "ratio_to_baseline" in row}
    together = [row for row in ran.values() if row["combination"]]
    reaching = [row for row in together if row["ratio_to_baseline"]["cpu_seconds"] is not None]
    best = min(reaching, key=lambda row: row["ratio_to_baseline"]["cpu_seconds"], default=None)

    def of(row: Mapping[str, Any] | None, axis: str) -> float | None:
        return None if row is None else row["ratio_to_baseline"][axis]

    found = [
        headline("cpu_seconds_ratio_to_baseline_accuracy", of(best, "cpu_seconds"), goal),
        headline("rollouts_ratio_to_baseline_accuracy", of(best, "rollouts")),
        headline("baseline_accuracy", ran[BASELINE]["final_accuracy"]),
        headline("start_accuracy", ran[BASELINE]["curve"][0]),
    ]
    for key in (EXACT, *(row["arm"] for row in together)):
        if key in ran:
            found.append(headline(f"cpu_seconds_ratio: {key}", of(ran[key], "cpu_seconds")))
            found.append(headline(f"rollouts_ratio: {key}", of(ran[key], "rollouts")))
    judged = [row["against_control"]["verdict"] for row in ran.values() if row["against_control"]]
    found.append(headline("arms_with_a_control", len(judged)))
    found.append(headline("arms_better_than_their_control", sum(one.startswith("better") for one in judged)))
    found.append(headline("arms_worse_than_their_control", sum(one.startswith("worse") for one in judged)))
    return found
