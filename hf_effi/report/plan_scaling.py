"""`hf-effi plan scaling`: fit a scaling law to finished runs, and say what it can and cannot tell."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.row_files import read_rows
from ..errors import BrokenFileError
from ..functional.scaling import Point, ScalingLaw, fit_scaling_law, held_out_error
from .run_data import load_group

COLUMNS = ("parameters", "tokens", "loss")
#: share of a run's updates at its beginning whose evaluations are left out: warm-up is no part of the law
SKIPPED = 0.1
#: relative error of a held-out run up to which a law is called good, and fair
GOOD, FAIR = 0.04, 0.2


def points_of_runs(runs: Sequence[Mapping[str, Any]], metric: str = "eval_loss", along: bool = False) -> list[Point]:
    """
    Return parameters, tokens and loss of recorded runs.

    Args:
        runs (`Sequence`): From [`load_group`].
        metric (`str`, *optional*, defaults to `"eval_loss"`): What the law is of.
        along (`bool`, *optional*, defaults to `False`): Also the evaluations along each run, less its first tenth.
            Only for runs with a constant learning rate: before the end of a decay a loss is not a final one.

    Raises:
        BrokenFileError: a run without a record, or that never logged the metric.
    """
    points: list[Point] = []
    for run in runs:
        title = run.get("title", "a run")
        size = run.get("model", {}).get("parameters")
        tokens: dict[int, float] = {}
        found: list[tuple[int, float, float]] = []
        for event in run["events"]:
            if "totals" in event:
                tokens[event["segment"]] = event["totals"].get("tokens", {}).get("real", 0)
            value = event.get("values", {}).get(metric)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
                found.append((event["step"], sum(tokens.values()), float(value)))
        if not size or not found or not found[-1][1]:
            raise BrokenFileError(
                f"{title} does not tell {'its size' if not size else f'{metric} and tokens'}. Train with "
                "RunRecordCallback() and evaluations, or give a table with parameters, tokens and loss."
            )
        last = found[-1][0]
        kept = [one for one in found if one[0] > SKIPPED * last] if along else found[-1:]
        points += [(float(size), float(count), loss) for _, count, loss in kept]
    return points


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `hf-effi plan scaling`."""
    parser.add_argument(
        "sources", nargs="+", help="folders of runs, or one .csv/.json/.jsonl with parameters, tokens, loss"
    )
    parser.add_argument("--flops", type=float, help="compute to plan for, 6 N D")
    parser.add_argument("--parameters", type=float, help="with --tokens: a model whose loss is predicted")
    parser.add_argument("--tokens", type=float, help="with --parameters")
    parser.add_argument("--metric", default="eval_loss", help="metric of the runs (default eval_loss)")
    parser.add_argument(
        "--along", action="store_true", help="also the evaluations along each run; only for a constant learning rate"
    )
    parser.add_argument("--bootstrap", type=int, default=200, help="resampled fits for intervals (default 200)")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")


def run(args: argparse.Namespace) -> int:
    """Fit the law and print it."""
    try:
        if (args.parameters is None) != (args.tokens is None):
            raise ValueError("--parameters and --tokens go together.")
        found = plan(_points(args), args)
    except (BrokenFileError, ValueError) as error:
        print(f"hf-effi plan scaling: {error}", file=sys.stderr)
        return 1 if isinstance(error, BrokenFileError) else 2
    print(json.dumps(found, indent=2) if args.json else as_text(found))
    return 0


def _points(args: argparse.Namespace) -> list[Point]:
    points: list[Point] = []
    for source in map(Path, args.sources):
        if source.is_dir():
            points += points_of_runs(load_group(source), args.metric, args.along)
            continue
        for number, row in enumerate(read_rows(source, COLUMNS)):
            try:
                n, d, loss = (float(row[name]) for name in COLUMNS)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"{source.name}, row {number}: parameters, tokens and loss must be numbers."
                ) from error
            points.append((n, d, loss))
    return points


def plan(points: Sequence[Point], args: argparse.Namespace) -> dict[str, Any]:
    """Return the law, how far it is from what it did not see, and what was asked of it."""
    law = fit_scaling_law(points, bootstrap=args.bootstrap)
    found: dict[str, Any] = {
        "law": {name: getattr(law, name) for name in ("E", "A", "B", "alpha", "beta")},
        "points": len(points),
        "notes": list(law.notes),
    }
    try:
        found["held_out"] = held_out_error(points)
    except ValueError as error:
        found["notes"].append(f"Nothing can be held out: {error}")
    if args.flops is not None:
        size, tokens, loss = law.optimal(args.flops)
        found["optimal"] = {
            "flops": args.flops,
            "parameters": size,
            "tokens": tokens,
            **_told(law, size, tokens, loss),
        }
    if args.parameters is not None:
        loss = law.predict(args.parameters, args.tokens)
        found["predicted"] = {
            "parameters": args.parameters,
            "tokens": args.tokens,
            **_told(law, args.parameters, args.tokens, loss),
        }
    return found


def _told(law: ScalingLaw, parameters: float, tokens: float, loss: float) -> dict[str, Any]:
    told: dict[str, Any] = {"loss": loss, "extrapolated": law.is_far(parameters, tokens)}
    if law.samples:
        told["interval_80"] = list(law.interval(parameters, tokens))
    return told


def as_text(found: Mapping[str, Any]) -> str:
    """Return what was found in sentences."""
    law = found["law"]
    lines = [
        f"L(N, D) = {law['E']:.4g} + {law['A']:.4g} / N^{law['alpha']:.3f} + {law['B']:.4g} / D^{law['beta']:.3f}, "
        f"from {found['points']} points"
    ]
    if held := found.get("held_out"):
        error = held["relative_error"]
        word = (
            "good" if error <= GOOD else "enough to tell large differences" if error <= FAIR else "no basis for a plan"
        )
        n, d, loss = held["point"]
        lines.append(
            f"held out: the largest run (N {n:.3g}, D {d:.3g}) has {loss:.4g}, predicted {held['predicted']:.4g}: "
            f"{100 * error:.1f} % off, {word}"
        )
        if held["leave_one_out"]:
            worst = max(held["leave_one_out"].values())
            lines.append(f"each size left out in turn: at most {100 * worst:.1f} % off")
    for name, what in (("optimal", "best for {flops:.3g} FLOPs"), ("predicted", "asked for")):
        if row := found.get(name):
            low, high = row.get("interval_80", (math.nan, math.nan))
            far = "; beyond 8 times the compute of the points, an extrapolation" if row["extrapolated"] else ""
            span = f" (80 % of the resampled fits: {low:.4g} to {high:.4g})" if "interval_80" in row else ""
            place = f"N {row['parameters']:.4g}, D {row['tokens']:.4g}"
            lines.append(f"{what.format(**row)}: {place}, loss {row['loss']:.4g}{span}{far}")
    return "\n".join([*lines, *found["notes"]])
