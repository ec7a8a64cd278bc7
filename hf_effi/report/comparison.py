"""From the recorded curves to the comparisons: at equal prompts, steps and time, and time to the same accuracy."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from ..functional.referee import time_to_target

#: Key of the arm that the others are compared with.
BASELINE = "stock"
#: Axis of a curve -> how tables name it.
CLOCKS = {"cpu_seconds": "CPU time", "wall_seconds": "wall-clock"}


def smoothed(curve: Sequence[dict[str, float]], measure: str = "sampled") -> list[float]:
    """
    Return the centred mean over three evaluations; the first is left as it is, the last is a mean of two.

    One evaluation has a standard error of about 0.015, as large as the differences that matter here.

    Example:
    ```python
    >>> smoothed([{"sampled": value} for value in (0.0, 3.0, 6.0, 8.0)])
    [0.0, 3.0, 5.666666666666667, 7.0]
    ```
    """
    values = [point[measure] for point in curve]
    inner = [statistics.fmean(values[max(0, i - 1) : i + 2]) for i in range(1, len(values))]
    return values[:1] + inner


def value_at(curve: Sequence[dict[str, float]], axis: str, position: float, measure: str = "sampled") -> float:
    """Return the smoothed accuracy where `axis` has the value `position`; straight lines between evaluations."""
    places, values = [point[axis] for point in curve], smoothed(curve, measure)
    if position >= places[-1]:
        return values[-1]
    for i in range(1, len(places)):
        if position <= places[i]:
            share = (position - places[i - 1]) / (places[i] - places[i - 1])
            return values[i - 1] + share * (values[i] - values[i - 1])
    return values[0]


def first_reached(
    curve: Sequence[dict[str, float]], axis: str, target: float, measure: str = "sampled"
) -> float | None:
    """
    Return where on `axis` the smoothed accuracy first reaches `target`, or `None` if it never does.

    Example:
    ```python
    >>> curve = [{"step": s, "sampled": v} for s, v in ((0, 0.25), (2, 0.25), (4, 0.25), (6, 0.25))]
    >>> first_reached(curve, "step", 0.25), first_reached(curve, "step", 0.3)
    (0.0, None)
    ```
    """
    places = [float(point[axis]) for point in curve]
    points = list(zip(places, smoothed(curve, measure), strict=True))
    return time_to_target(points, target, "higher", interpolate=True)


def compare(arm: dict[str, Any], baseline: dict[str, Any]) -> dict[str, float | None]:
    """
    Compare one arm's record with the baseline's of the same seed.

    The two are compared at the largest common number of prompts, steps and seconds, so that neither is read past its
    end. Both times to the target, the baseline's smoothed accuracy after the compared steps, are read off by the
    same rule: the baseline's is where its own curve first reaches it.

    Returns:
        `dict`: `accuracy_gain_equal_{prompts,steps,cpu_seconds,wall_seconds}` in fractions of 1;
        `{cpu_seconds,wall_seconds,rows_generated}_to_target_ratio` (arm / baseline, below 1 is better), `None` where
        the arm never gets there; `step_speedup` (baseline / arm, CPU seconds of the equal steps).
    """
    ours, theirs, out = arm["curve"], baseline["curve"], {}
    end = next(point for point in theirs if point["step"] == baseline["steps"])
    axes = {"prompts": "rows_generated", "steps": "step", "cpu_seconds": "cpu_seconds", "wall_seconds": "wall_seconds"}
    for name, axis in axes.items():
        common = min(ours[-1][axis], end[axis])
        out[f"accuracy_gain_equal_{name}"] = value_at(ours, axis, common) - value_at(theirs, axis, common)
    target = value_at(theirs, "step", end["step"])
    for axis in (*CLOCKS, "rows_generated"):
        needed, base = first_reached(ours, axis, target), first_reached(theirs, axis, target)
        out[f"{axis}_to_target_ratio"] = None if needed is None or not base else needed / base
    seconds = [sum(record["cpu_seconds"].values()) / record["steps"] for record in (baseline, arm)]
    out["step_speedup"] = seconds[0] / seconds[1]
    return out


def compare_all(records: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, float | None]]]:
    """Return, for each arm, its comparisons with the baseline of the same seed."""
    baselines = {record["seed"]: record for record in records if record["arm"] == BASELINE}
    out: dict[str, list[dict[str, float | None]]] = {}
    for record in records:
        out.setdefault(record["arm"], []).append(compare(record, baselines[record["seed"]]))
    return out


def mean_curve(records: Sequence[dict[str, Any]], arm: str) -> list[dict[str, float]]:
    """Return the arm's curve averaged over seeds, point by point."""
    curves = [record["curve"] for record in records if record["arm"] == arm]
    return [
        {key: statistics.fmean(p[key] for p in points) for key in points[0]} for points in zip(*curves, strict=True)
    ]


def summarize(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """
    Return one row per arm: its comparison, each figure the median over seeds, with lowest and highest.

    `None` where at least half of the seeds never reached the target.
    """
    rows: dict[str, dict[str, Any]] = {}
    for arm, comparisons in compare_all(records).items():
        own = [record for record in records if record["arm"] == arm]
        row: dict[str, Any] = {"arm": arm, "title": own[0]["title"], "control": own[0]["control"], "seeds": len(own)}
        for name in comparisons[0]:
            # A seed that never gets there counts as infinitely slow, so that the median stays honest.
            values = sorted(float("inf") if c[name] is None else c[name] for c in comparisons)
            middle = statistics.median(values)
            row[name] = None if middle == float("inf") else middle
            row[f"{name}_range"] = [None if value == float("inf") else value for value in (values[0], values[-1])]
        curve = [point for point in mean_curve(records, arm) if point["step"] <= own[0]["steps"]]
        last = curve[-1]
        row |= {name: last[name] for name in ("greedy", "greedy_ci", "sampled", "sampled_ci", "step")}
        for clock in CLOCKS:
            row[clock] = {phase: statistics.fmean(record[clock][phase] for record in own) for phase in own[0][clock]}
        row["rows"] = {
            "generated": statistics.fmean(r["rows"]["generated"] for r in own),
            "trained": statistics.fmean(r["rows"]["trained"] for r in own),
            "dropped": _mean_counts([r["rows"]["dropped"] for r in own]),
        }
        tokens = {name: sum(r["tokens"][name] for r in own) for name in own[0]["tokens"]}
        row["tokens_forwarded_per_real_token"] = tokens["forwarded"] / max(1, tokens["real"])
        row["tokens_forwarded_per_generated_token"] = tokens["forwarded"] / max(1, tokens["generated"])
        rows[arm] = row
    return rows


def _mean_counts(counts: Sequence[dict[str, int]]) -> dict[str, float]:
    names = sorted({name for count in counts for name in count})
    return {name: statistics.fmean(count.get(name, 0) for count in counts) for name in names}
