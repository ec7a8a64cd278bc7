"""`hf-effi profile`, also `hf-effi report profile`: which setting reached a target for less, over run records."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .._untrusted import is_number
from ..errors import BrokenFileError
from ..functional.referee import (
    Point,
    compute_equivalent_gain,
    median_cost,
    performance_profile,
    time_to_target,
)
from .run_data import load_group

UNITS = ("seconds", "updates", "tokens")
#: what makes a comparison fair; printed below each table, since no record can show the first three
RULES = (
    "The target was set before the runs.",
    "Each setting had the same tuning budget, its learning rate above all.",
    "A run is judged at the end of its decay, not in the middle of a plateau.",
    "At least 3 seeds, none of which was tuned on.",
    "One kind of machine in a table of seconds.",
)


def costs_and_values(run: Mapping[str, Any], metric: str, unit: str) -> list[Point]:
    """
    Return (cost so far, value) at each evaluation of a recorded run.

    Seconds are those of the run without evaluations. What a run did before it was resumed counts as well, also
    updates that were done twice.

    Args:
        run (`Mapping`): From [`load_run`].
        metric (`str`): Name in the log, for example `"eval_loss"`.
        unit (`str`): `"seconds"`, `"updates"` or `"tokens"` (forwarded ones).

    Raises:
        BrokenFileError: the run has no record of its costs, or never logged the metric.
    """
    found: list[Point] = []
    parts: dict[int, float] = {}
    for event in run["events"]:
        totals = event.get("totals")
        if totals is None:
            continue
        parts[event["segment"]] = _cost(totals, unit)
        value = event.get("values", {}).get(metric)
        if is_number(value) or value in ("nan", "inf", "-inf"):
            found.append((sum(parts.values()), float(value)))
    title = run.get("title", "a run")
    if not parts:
        raise BrokenFileError(
            f"{title} has no record of what it cost. Train with RunRecordCallback(), or with an Effi trainer."
        )
    if not found:
        names = sorted({name for entry in run["log_history"] for name in entry if name.startswith("eval_")})
        raise BrokenFileError(
            f"{title} never logged {metric!r}. It has {', '.join(names) or 'no evaluation: set eval_strategy'}."
        )
    return found


def _cost(totals: Mapping[str, Any], unit: str) -> float:
    if unit == "updates":
        return float(totals.get("updates", 0))
    if unit == "tokens":
        return float(totals.get("tokens", {}).get("forwarded", 0))
    return sum(value for name, value in totals.get("seconds", {}).items() if name != "evaluate")


def compare_settings(
    settings: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]],
    targets: Mapping[str, float],
    *,
    metric: str = "eval_loss",
    direction: str = "lower",
    unit: str = "seconds",
    patience: int = 1,
    baseline: str | None = None,
) -> dict[str, Any]:
    """
    Return costs to the targets, ratios, scores and notes.

    Args:
        settings (`Mapping`): Setting -> workload -> its runs, one for each seed.
        targets (`Mapping[str, float]`): Workload -> target.
        metric, direction, unit, patience: As in [`costs_and_values`] and [`time_to_target`].
        baseline (`str`, *optional*): Setting for the compute-equivalent gain of the others, on its own curves; only
            where lower is better and values are above 0.

    Raises:
        BrokenFileError: a run without a record or without the metric.
        ValueError: seconds of several machines, or no setting that reaches a target.
    """
    runs = [run for workloads in settings.values() for of in workloads.values() for run in of]
    machines = {json.dumps(run.get("machine"), sort_keys=True) for run in runs}
    if unit == "seconds" and len(machines) > 1:
        raise ValueError(
            f"The runs are of {len(machines)} machines, whose seconds cannot be compared: {', '.join(machines)}. "
            "Compare --unit updates or tokens."
        )
    costs: dict[str, list[float | None]] = {}
    seeds: dict[str, list[list[float | None]]] = {}
    for name, workloads in settings.items():
        seeds[name] = [
            [
                time_to_target(costs_and_values(run, metric, unit), target, direction, patience)  # type: ignore[arg-type]
                for run in workloads[workload]
            ]
            for workload, target in targets.items()
        ]
        costs[name] = [median_cost(row) for row in seeds[name]]
    profile = performance_profile(costs)
    return {
        "unit": unit,
        "metric": metric,
        "workloads": dict(targets),
        "settings": {
            name: {
                "costs": costs[name],
                "costs_by_seed": seeds[name],
                "ratios": [None if math.isinf(ratio) else ratio for ratio in profile.ratios[name]],
                "score": profile.scores[name],
                **_gains(settings, name, baseline, targets, metric, unit),
            }
            for name in settings
        },
        "notes": _notes(seeds),
        "rules": list(RULES),
        "profile": {name: profile.curve(name) for name in settings},
    }


def _gains(settings: Mapping, name: str, baseline: str | None, targets: Mapping, metric: str, unit: str) -> dict:
    if baseline is None or name == baseline:
        return {}
    gains = []
    for workload in targets:
        base = [
            point for run in settings[baseline][workload] for point in costs_and_values(run, metric, unit) if point[0]
        ]
        ends = [costs_and_values(run, metric, unit)[-1] for run in settings[name][workload]]
        found = [compute_equivalent_gain(base, *end) for end in ends]
        gains.append(None if None in found else median_cost(found))
    return {"compute_equivalent_gains": gains}


def _notes(seeds: Mapping[str, Sequence[Sequence[float | None]]]) -> list[str]:
    fewest = min(len(row) for rows in seeds.values() for row in rows)
    unequal = len({len(row) for rows in seeds.values() for row in rows}) > 1
    notes = [f"Only {fewest} seed{'s' * (fewest != 1)} in a cell: too few to tell a difference."] if fewest < 3 else []
    return notes + (["The settings have different numbers of seeds."] if unequal else [])


def as_text(found: Mapping[str, Any]) -> str:
    """Return the comparison as a table and sentences."""
    unit = found["unit"]
    lines = [f"median {unit} to {found['metric']}, and times the fastest"]
    width = max(map(len, found["settings"]))
    for name, row in found["settings"].items():
        cells = [
            "not reached" if cost is None else f"{cost:.4g} ({ratio:.2f}x)"
            for cost, ratio in zip(row["costs"], row["ratios"], strict=True)
        ]
        gains = row.get("compute_equivalent_gains", [])
        told = ["beyond the baseline's curve" if gain is None else f"{gain:.2f}" for gain in gains]
        more = f"  compute-equivalent gain {', '.join(told)}" if told else ""
        lines.append(f"  {name.ljust(width)}  {'  '.join(cells)}  score {row['score']:.3f}{more}")
    targets = ", ".join(f"{name or 'target'}: {value:g}" for name, value in found["workloads"].items())
    lines += [f"targets: {targets}", *found["notes"], "What makes this fair, and no record shows:"]
    return "\n".join([*lines, *(f"  - {rule}" for rule in found["rules"])])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `hf-effi profile`."""
    parser.add_argument("settings", nargs="+", help="NAME=FOLDER or FOLDER: a run, or a folder with its seeds")
    parser.add_argument("--target", type=float, help="value to reach, for one workload")
    parser.add_argument(
        "--workload",
        action="append",
        metavar="NAME=TARGET",
        help="instead: sub-folder of each setting, and the value to reach there; several are allowed",
    )
    parser.add_argument("--metric", default="eval_loss", help="metric of the evaluations (default eval_loss)")
    parser.add_argument("--higher", action="store_true", help="higher values are better")
    parser.add_argument("--unit", choices=UNITS, default="seconds", help="what is compared (default seconds)")
    parser.add_argument("--patience", type=int, default=1, help="evaluations in a row that must meet it (default 1)")
    parser.add_argument("--baseline", metavar="NAME", help="setting for the compute-equivalent gain of the others")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")


def run(args: argparse.Namespace) -> int:
    """Compare the settings and print who reached the target for less."""
    try:
        targets, settings = _asked(args)
        if args.baseline is not None and args.baseline not in settings:
            raise ValueError(f"--baseline {args.baseline}: the settings are {', '.join(settings)}.")
        if args.baseline is not None and args.higher:
            raise ValueError("--baseline needs a metric of which lower values are better.")
        found = compare_settings(
            settings,
            targets,
            metric=args.metric,
            direction="higher" if args.higher else "lower",
            unit=args.unit,
            patience=args.patience,
            baseline=args.baseline,
        )
    except (BrokenFileError, ValueError) as error:
        print(f"hf-effi profile: {error}", file=sys.stderr)
        return 1 if isinstance(error, BrokenFileError) else 2
    print(json.dumps(found, indent=2) if args.json else as_text(found))
    return 0


def _asked(args: argparse.Namespace) -> tuple[dict[str, float], dict[str, dict[str, list]]]:
    if (args.target is None) == (args.workload is None):
        raise ValueError("give --target VALUE for one workload, or --workload NAME=TARGET for each of several.")
    targets = {"": args.target} if args.workload is None else {}
    for text in args.workload or []:
        name, equals, value = text.partition("=")
        try:
            targets[name] = float(value)
        except ValueError:
            equals = ""
        if not equals or not name:
            raise ValueError(f"--workload {text!r} is not NAME=TARGET, e.g. lm=2.5.")
    settings: dict[str, dict[str, list]] = {}
    for text in args.settings:
        name, equals, folder = text.partition("=")
        name, folder = (name, folder) if equals else (Path(text).name or text, text)
        if name in settings:
            raise ValueError(f"two settings are called {name!r}. Write NAME=FOLDER.")
        settings[name] = {workload: load_group(Path(folder) / workload) for workload in targets}
    return targets, settings
