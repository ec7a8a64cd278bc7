"""Runs on disk as series and totals: from the record, or from the Trainer's own state where there is none."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .._record_check import check_state
from .._run_record import FOLDER, SUMMARY, has_record, read_run
from .._untrusted import is_number, load_json
from ..errors import BrokenFileError
from ..functional import metrics
from ..functional.probes import without_probes

STATE = "trainer_state.json"
#: two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom; the normal one beyond
_T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)

Point = tuple[float, float, float]


def load_run(folder: str | Path) -> dict[str, Any]:
    """
    Return the run in a folder: its record, or the log history of a stock `trainer_state.json` (newest checkpoint).

    Raises:
        BrokenFileError: neither is there, or it is damaged.
    """
    folder = Path(folder)
    try:
        return {"title": folder.name, **_load(folder)}
    except OSError as error:
        raise BrokenFileError(f"The run in {folder} cannot be read: {error.strerror}.") from error


def _load(folder: Path) -> dict[str, Any]:
    if has_record(folder):
        return _readable(folder, lambda: read_run(folder))
    states = [folder / STATE, *folder.glob(f"checkpoint-*/{STATE}")]
    states = [path for path in states if path.is_file()]
    if not states:
        raise BrokenFileError(
            f"{folder} has no {FOLDER}/{SUMMARY} and no {STATE}. Give the output_dir of a run; RunRecordCallback() "
            "records one."
        )
    found = _readable(folder, lambda: [check_state(load_json(path), path) for path in states])
    state = max(found, key=lambda one: one["global_step"])
    return {
        "log_history": without_probes(state["log_history"]),
        "events": [],
        "totals": {},
        "progress": {"step": state["global_step"]},
        "max_steps": state["max_steps"],
    }


def _readable(folder: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except BrokenFileError as error:
        raise BrokenFileError(f"The run in {folder} cannot be read: {error}") from error


def load_group(folder: str | Path) -> list[dict[str, Any]]:
    """
    Return the run in a folder, or those in its sub-folders: the seeds of one setting.

    Raises:
        BrokenFileError: no run there.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BrokenFileError(f"{folder} is not a folder. Give the output_dir of a run.")
    try:
        return [load_run(folder)]
    except BrokenFileError as error:
        inner = sorted(path for path in folder.iterdir() if path.is_dir())
        runs = [load_run(path) for path in inner if has_record(path) or _has_state(path)]
        if not runs:
            raise error
        return runs


def _has_state(folder: Path) -> bool:
    return (folder / STATE).exists() or any(folder.glob(f"checkpoint-*/{STATE}"))


def series(run: dict[str, Any], name: str) -> dict[float, float]:
    """Return step -> value of a logged metric; what is not a finite number is left out."""
    found = ((entry.get("step"), entry.get(name)) for entry in run["log_history"])
    return {step: float(value) for step, value in found if is_number(step) and is_number(value)}


def memory_series(run: dict[str, Any]) -> dict[str, dict[float, float]]:
    """Return host and accelerator -> step -> peak memory so far, in GiB."""
    found: dict[str, dict[float, float]] = {}
    for event in run["events"]:
        for where, peak in event.get("totals", {}).get("peak_memory_bytes", {}).items():
            found.setdefault(where, {})[event["step"]] = peak / 2**30
    return found


def token_series(run: dict[str, Any]) -> dict[str, dict[float, float]]:
    """Return "forwarded" and "real" -> step -> tokens so far, of all segments: also work that was done twice."""
    found: dict[str, dict[float, float]] = {}
    last: dict[int, dict[str, float]] = {}
    for event in run["events"]:
        if tokens := event.get("totals", {}).get("tokens"):
            last[event["segment"]] = tokens
            for name in ("forwarded", "real"):
                found.setdefault(name, {})[event["step"]] = sum(segment.get(name, 0) for segment in last.values())
    return found


def dropped_series(run: dict[str, Any]) -> dict[float, float]:
    """Return step -> completions dropped per generation, for any reason."""
    total: dict[float, float] = {}
    for name in names_of([run], metrics.DROPPED):
        for step, value in series(run, name).items():
            total[step] = total.get(step, 0.0) + value
    return total


def forecast_lines(groups: Mapping[str, Sequence[dict[str, Any]]]) -> dict[str, list[Point]]:
    """
    Return, for each title, the curve that was fitted at each step and what it said of the end of the run.

    The band of one run is the range of its last five fits, around their middle; that of several is over the runs.
    """
    found: dict[str, list[Point]] = {}
    for title, runs in groups.items():
        now, ends = [_fitted_series(run) for run in runs], [_forecast_series(run, "at_end") for run in runs]
        if not any(ends):
            continue
        told = mean_and_band(ends)
        if len(runs) == 1:
            low, high = (_forecast_series(runs[0], name) for name in ("at_end_low", "at_end_high"))
            told = [(step, (low[step] + high[step]) / 2, (high[step] - low[step]) / 2) for step in low if step in high]
        name = "" if len(groups) == 1 else f"{title}, "
        found[f"{name}fitted curve"] = mean_and_band(now)
        found[f"{name}its end, with the range of the forecast"] = told
    return found


def _forecast_series(run: dict[str, Any], value: str) -> dict[float, float]:
    return series(run, metrics.FORECAST + value)


def _fitted_series(run: dict[str, Any]) -> dict[float, float]:
    """Return step -> value of the curve there: the end lies between it and the asymptote."""
    floors, left = _forecast_series(run, "asymptote"), _forecast_series(run, "remaining")
    ends = _forecast_series(run, "at_end")
    return {step: floors[step] + math.copysign(left[step], end - floors[step]) for step, end in ends.items()}


def names_of(runs: Iterable[dict[str, Any]], prefix: str) -> list[str]:
    """Return the names of logged metrics with this prefix, in the order they first appear."""
    return list(
        dict.fromkeys(
            name for run in runs for entry in run["log_history"] for name in entry if name.startswith(prefix)
        )
    )


def mean_and_band(curves: Sequence[dict[float, float]]) -> list[Point]:
    """
    Return (step, mean, half width of the 95 % interval) at the steps that all curves have; 0 for one curve.

    Example:
    ```python
    >>> mean_and_band([{1: 2.0, 2: 4.0}, {1: 4.0}])
    [(1, 3.0, 12.706)]
    ```
    """
    curves = [curve for curve in curves if curve]
    if not curves:
        return []
    points = []
    for step in sorted(set.intersection(*(set(curve) for curve in curves))):
        values = [curve[step] for curve in curves]
        half = 0.0
        if len(values) > 1:
            quantile = _T_95[len(values) - 2] if len(values) - 2 < len(_T_95) else 1.96
            half = quantile * statistics.stdev(values) / math.sqrt(len(values))
        points.append((step, statistics.fmean(values), half))
    return [(step, mean, round(half, 12)) for step, mean, half in points]


def phases_of(points: Sequence[Point]) -> list[tuple[float, float, str]]:
    """
    Return (first step, last step, "rises", "constant" or "falls") of a learning rate.

    Example:
    ```python
    >>> phases_of([(1, 0.5, 0), (2, 1.0, 0), (3, 1.0, 0), (4, 1.0, 0), (5, 0.2, 0)])
    [(1, 2, 'rises'), (2, 4, 'constant'), (4, 5, 'falls')]
    ```
    """
    phases: list[tuple[float, float, str]] = []
    for (start, before, _), (end, after, _) in zip(points, points[1:], strict=False):
        close = math.isclose(before, after, rel_tol=1e-6, abs_tol=1e-15)
        kind = "constant" if close else "rises" if after > before else "falls"
        if phases and phases[-1][2] == kind:
            phases[-1] = (phases[-1][0], end, kind)
        else:
            phases.append((start, end, kind))
    return phases
