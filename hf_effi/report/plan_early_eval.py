"""`hf-effi plan early-eval`: which logged metric orders the runs of a sweep early as their end does."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import BrokenFileError
from ..functional import metrics
from ..functional.early_signals import FEWEST_RUNS, WEIGHT_DOMAIN, MetricSignal, rank_metrics
from .run_data import load_group, names_of, series

#: what a log entry has that is no measure of the model
_NO_METRICS = ("step", "epoch", "learning_rate", "total_flos", "num_input_tokens_seen")
_NO_PARTS = ("runtime", "per_second", "step_time", "mem_")
GRADIENT_NORM = "grad_norm"


def curves_of(run: Mapping[str, Any]) -> dict[str, dict[float, float]]:
    """Return metric -> step -> value of a run from [`load_group`], without clocks, rates and forecasts."""
    names = names_of([dict(run)], "")
    kept = [
        name
        for name in names
        if name not in _NO_METRICS
        and not any(part in name for part in _NO_PARTS)
        and not name.startswith((metrics.FORECAST, "train_"))
    ]
    return {name: found for name in kept if (found := series(dict(run), name))}


def compare_runs(
    runs: Sequence[Mapping[str, Any]], early: float = 0.1, target: str = "eval_loss", draws: int = 500
) -> dict[str, Any]:
    """
    Return what [`rank_metrics`] says of recorded runs, and notes.

    Args:
        runs (`Sequence`): From [`load_group`].
        early, target, draws: As in [`rank_metrics`].

    Raises:
        ValueError: as [`rank_metrics`].
    """
    curves = [curves_of(run) for run in runs]
    found = rank_metrics(curves, early, target, draws)
    names = {name for curve in curves for name in curve}
    left_out = sorted(names - {one.name for one in found})
    return {
        "runs": [str(run.get("title", "")) for run in runs],
        "early": early,
        "target": target,
        "metrics": [_plain(one) for one in found],
        "gradient_norm": _of_gradient_norm(found),
        "left_out": left_out,
        "notes": _notes(runs, left_out),
    }


def _plain(one: MetricSignal) -> dict[str, Any]:
    row = dataclasses.asdict(one)
    return {name: None if value == math.inf else value for name, value in row.items()} | {
        "has_signal": one.has_signal,
        "noiseless": math.isinf(one.signal_to_noise),
    }


def _of_gradient_norm(found: Sequence[MetricSignal]) -> dict[str, Any] | None:
    row = next((one for one in found if one.name == GRADIENT_NORM), None)
    return None if row is None else dataclasses.asdict(row.to_target)


def _notes(runs: Sequence[Mapping[str, Any]], left_out: Sequence[str]) -> list[str]:
    notes = []
    if len(runs) < FEWEST_RUNS:
        notes.append(
            f"{len(runs)} runs have {len(runs) * (len(runs) - 1) // 2} pairs: a tau of so few is meaningless, and "
            f"none is printed. Give at least {FEWEST_RUNS} runs."
        )
    ends = [(run.get("progress", {}).get("step"), run.get("max_steps")) for run in runs]
    short = sum(bool(done and planned and done < planned) for done, planned in ends)
    if short:
        notes.append(f"{short} of the runs are not finished: what counts as their end is where they are now.")
    if len({done for done, _ in ends}) > 1:
        notes.append("The runs have different lengths: fractions are of each one's own.")
    if left_out:
        notes.append(f"Left out, too seldom logged or not in every run: {', '.join(left_out)}.")
    notes.append(
        f"The score is 0.5 signal quality + 0.1 ranking consistency, of 0.6: E2LM's third part (domain compliance, "
        f"{WEIGHT_DOMAIN}) cannot be computed from a log, and its exact sub-scores are not known: the quality is ours."
    )
    notes.append("It orders and stops nothing: early orders were shown to hold among variants of one setting only.")
    return notes


def as_text(found: Mapping[str, Any]) -> str:
    """Return the comparison as a table and sentences."""
    share = f"{found['early']:.0%}"
    lines = [f"{len(found['runs'])} runs at {share}, and at their end by {found['target']}"]
    width = max(len("metric"), *(len(row["name"]) for row in found["metrics"]))
    head = f"monotone  signal/noise  spread  tau {share} to end      to {found['target']}"
    lines.append(f"  {'metric'.ljust(width)}  {head:64}  tau >= 0.8 from (surely)  score")
    for row in found["metrics"]:
        name = f"  {row['name'].ljust(width)}  "
        if not row["has_signal"]:
            lines.append(f"{name}no signal: it never moves")
            continue
        earliest = f"{_share(row['earliest'])} ({_share(row['earliest_surely'])})"
        score = "-" if row["score"] is None else f"{row['score']:.2f}"
        lines.append(
            f"{name}{row['monotonicity']:8.2f}  {_number(row['signal_to_noise']):>12}  {_number(row['spread']):>6}  "
            f"{_tau(row['ranking']):<21}  {_tau(row['to_target']):<21}  {earliest:>24}  {score:>5}"
        )
    norm = found["gradient_norm"]
    if norm is not None and norm["value"] is not None:
        lines.append(
            f"Norm of the gradient at {share} against the final {found['target']}: tau {_tau(norm)}. Above 0, runs "
            f"with a smaller norm end lower; published for large batches, where a higher early loss went with it."
        )
    return "\n".join([*lines, *(f"Note: {note}" for note in found["notes"])])


def _number(value: float | None) -> str:
    return "no noise" if value is None else f"{value:.3g}"


def _share(value: float | None) -> str:
    return "never" if value is None else f"{value:.0%}"


def _tau(tau: Mapping[str, Any]) -> str:
    if tau["value"] is None:
        return "-"
    return f"{tau['value']:.2f} [{tau['low']:.2f}, {tau['high']:.2f}]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `hf-effi plan early-eval`."""
    parser.add_argument("folders", nargs="+", help="folders of runs, or folders that have them")
    parser.add_argument("--early", type=float, default=0.1, help="fraction of a run that is looked at (default 0.1)")
    parser.add_argument("--target", default="eval_loss", help="metric whose end counts (default eval_loss)")
    parser.add_argument("--draws", type=int, default=500, help="draws for the intervals (default 500)")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")


def run(args: argparse.Namespace) -> int:
    """Compare the runs and print which metric says something early."""
    try:
        runs = [run for folder in args.folders for run in load_group(Path(folder))]
        found = compare_runs(runs, args.early, args.target, args.draws)
    except (BrokenFileError, ValueError) as error:
        print(f"hf-effi plan early-eval: {error}", file=sys.stderr)
        return 1 if isinstance(error, BrokenFileError) else 2
    print(json.dumps(found, indent=2) if args.json else as_text(found))
    return 0
