"""`hf-effi report`: one self-contained page that tells a run, or compares several."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .._files import save_text
from .._plots import MAX_SERIES, draw_lines, draw_stacked_areas, draw_stacked_bars
from ..callbacks.run_summary import time_parts
from ..errors import BrokenFileError
from ..functional import metrics
from ..functional.findings import Finding
from .cause_pictures import cause_curves
from .page import environment
from .run_data import (
    Point,
    dropped_series,
    load_group,
    mean_and_band,
    memory_series,
    names_of,
    phases_of,
    series,
    token_series,
)

TEMPLATE = "run.html.jinja"
#: More phases than this are the wiggles of a learning rate, not phases.
_MOST_PHASES = 6
#: A stacked plot stays readable with this many steps.
_MOST_COLUMNS = 200

Groups = Mapping[str, Sequence[dict[str, Any]]]


def curves(groups: Groups) -> dict[str, str]:
    """
    Return caption -> inline SVG, over the steps, of what the runs recorded.

    Args:
        groups (`Mapping`): Title -> runs of one setting; several are seeds, and get a mean with its 95 % band.
    """
    found = {"Loss": _draw(_lines(groups, {"training": "loss", "evaluation": "eval_loss"}), "loss", "loss")}
    rates = _lines(groups, {"learning rate": "learning_rate"})
    phases = phases_of(next(iter(rates.values()))) if len(rates) == 1 else []
    phases = phases if len(phases) <= _MOST_PHASES else []
    found["Learning rate and its phases"] = _draw(rates, "learning rate", "lr", phases=phases, from_zero=True)
    rewards = _lines(
        groups, {"generated": metrics.REWARD_GENERATED, "kept": metrics.REWARD_KEPT}, {"reward": "reward"}
    )
    found["Reward before and after filters"] = _draw(rewards, "mean weighted reward", "reward")
    decides = _lines(groups, {"generated": metrics.FILTER_REWARD_GENERATED, "kept": metrics.FILTER_REWARD_KEPT})
    if decides != rewards:  # with one reward function of weight 1 they are the same
        found["The reward that the filter looks at"] = _draw(decides, "mean of one function, unweighted", "decides")
    if len(groups) == 1:
        found["Completions dropped, by reason"] = _drops_over_time(next(iter(groups.values())))
    else:
        drops = _lines_of(groups, lambda run: {"dropped": dropped_series(run)})
        options = {"from_zero": True, "name_one": True}
        found["Completions dropped"] = _draw(drops, "completions dropped per generation", "drops", **options)
    tokens = _lines_of(groups, token_series)
    found["Tokens so far, forwarded and real"] = _draw(tokens, "tokens", "tokens", from_zero=True)
    memory = _lines_of(groups, memory_series)
    found["Peak memory so far"] = _draw(memory, "GiB", "memory", from_zero=True)
    found |= cause_curves(groups)
    return {caption: svg for caption, svg in found.items() if svg}


def bars(groups: Groups) -> dict[str, str]:
    """Return caption -> inline SVG of whole runs: completions, tokens and time, means over the runs of a setting."""
    found = {
        "Completions of the run": _bars(groups, _rows_of, "completions", "rows", "{:,.0f}"),
        "Tokens of the run": _bars(groups, _tokens_of, "tokens", "tokensum", "{:,.0f}"),
        "Time of the run": _bars(groups, time_parts, "seconds", "time", "{:,.1f}"),
    }
    return {caption: svg for caption, svg in found.items() if svg}


def _draw(lines: Mapping[str, Sequence[Point]], y_label: str, salt: str, **options: Any) -> str:
    return draw_lines(lines, "optimizer steps", y_label, salt, **options) if lines else ""


def _lines(
    groups: Groups, measures: Mapping[str, str], otherwise: Mapping[str, str] | None = None
) -> dict[str, list[Point]]:
    """Return label -> curve of logged metrics; `otherwise` stands in for a group that has none of `measures`."""

    def read(run: dict[str, Any]) -> dict[str, dict[float, float]]:
        found = {label: series(run, name) for label, name in measures.items()}
        return (
            found if any(found.values()) else {label: series(run, name) for label, name in (otherwise or {}).items()}
        )

    return _lines_of(groups, read)


def _lines_of(
    groups: Groups, read: Callable[[dict[str, Any]], Mapping[str, dict[float, float]]]
) -> dict[str, list[Point]]:
    """Name lines by what differs: the group, the measure, or both."""
    found = {}
    for title, runs in groups.items():
        parts = [read(run) for run in runs]
        labels = dict.fromkeys(label for part in parts for label in part)
        own = {label: mean_and_band([part.get(label, {}) for part in parts]) for label in labels}
        own = {label: curve for label, curve in own.items() if curve}
        for label, curve in own.items():
            found[label if len(groups) == 1 else title if len(own) == 1 else f"{title}, {label}"] = curve
    return dict(list(found.items())[: 2 * MAX_SERIES])


def _drops_over_time(runs: Sequence[dict[str, Any]]) -> str:
    curves = {
        name.removeprefix(metrics.DROPPED).replace("_", " "): mean_and_band([series(run, name) for run in runs])
        for name in names_of(runs, metrics.DROPPED)
    }
    curves = {name: points for name, points in curves.items() if any(value for _, value, _ in points)}
    curves = dict(list(curves.items())[: 2 * MAX_SERIES])
    if not curves:
        return ""
    steps = sorted({step for points in curves.values() for step, _, _ in points})
    # A reason that some log entries do not have dropped nothing there.
    curves = {name: _filled(points, steps) for name, points in curves.items()}
    width = -(-len(steps) // _MOST_COLUMNS)
    columns = [steps[i] for i in range(0, len(steps), width)]
    parts = {}
    for name, values in curves.items():
        parts[name] = [statistics.fmean(values[i : i + width]) for i in range(0, len(values), width)]
    return draw_stacked_areas(parts, columns, "optimizer steps", "completions dropped per generation", "drops")


def _filled(points: Sequence[Point], steps: Sequence[float]) -> list[float]:
    values = {step: value for step, value, _ in points}
    return [values.get(step, 0.0) for step in steps]


def _bars(
    groups: Groups, parts_of: Callable[[Mapping[str, Any]], dict[str, float]], unit: str, salt: str, form: str
) -> str:
    parts = {title: [parts_of(run["totals"]) for run in runs] for title, runs in groups.items()}
    parts = {title: own for title, own in parts.items() if any(own)}
    names = dict.fromkeys(name for own in parts.values() for part in own for name in part)
    names = sorted(list(names)[: 4 * MAX_SERIES], key=lambda name: name == "other")  # what is left over goes last
    found = {
        title: {name: statistics.fmean(part.get(name, 0) for part in own) for name in names}
        for title, own in parts.items()
    }
    return draw_stacked_bars(found, unit, salt, form, name_one=len(groups) > 1) if found else ""


def _rows_of(totals: Mapping[str, Any]) -> dict[str, float]:
    rows = totals.get("rows", {})
    if not rows.get("generated"):
        return {}
    drops = {f"dropped: {reason.replace('_', ' ')}": n for reason, n in totals.get("drops", {}).items() if n}
    rest = rows["generated"] - rows.get("trained", 0) - sum(drops.values())
    # Rows that no filter dropped and whose advantage is zero carry no gradient; they are not forwarded.
    return {"trained": rows.get("trained", 0), **drops, **({"no gradient": rest} if rest > 0 else {})}


def _tokens_of(totals: Mapping[str, Any]) -> dict[str, float]:
    tokens = totals.get("tokens", {})
    if not tokens.get("forwarded"):
        return {}
    real = tokens.get("real", 0)
    parts = {"real": real, "padding": max(0, tokens["forwarded"] - real)}
    parts["saved: not forwarded"] = tokens.get("saved", 0)
    return {name: value for name, value in parts.items() if value or name == "real"}


def facts(runs: Sequence[dict[str, Any]], as_text: bool = True) -> dict[str, Any]:
    """Return what stands in the first table: name -> text, or number, as a mean over the runs."""

    def mean(read: Callable[[dict[str, Any]], float | None], form: str) -> Any:
        values = [value for run in runs if (value := read(run)) is not None]
        if not values:
            return None
        return form.format(statistics.fmean(values)) if as_text else statistics.fmean(values)

    def last(run: dict[str, Any], name: str) -> float | None:
        values = list(series(run, name).values())
        return statistics.fmean(values[-max(1, len(values) // 20) :]) if values else None

    def dropped(run: dict[str, Any]) -> float | None:
        totals = run["totals"]
        generated = totals.get("rows", {}).get("generated")
        return 100 * sum(totals.get("drops", {}).values()) / generated if generated else None

    def saved(run: dict[str, Any]) -> float | None:
        tokens = run["totals"].get("tokens", {})
        return 100 * tokens["saved"] / (tokens["saved"] + tokens.get("forwarded", 0)) if tokens.get("saved") else None

    def peak(run: dict[str, Any], where: str) -> float | None:
        value = run["totals"].get("peak_memory_bytes", {}).get(where)
        return value / 2**30 if value else None

    found = {
        "runs": str(len(runs)) if as_text else len(runs),
        "steps": mean(lambda run: run.get("progress", {}).get("step"), "{:,.0f}"),
        "loss at the end": mean(lambda run: last(run, "loss"), "{:.3g}"),
        "reward at the end": mean(lambda run: last(run, "reward"), "{:.3g}"),
        "wall-clock": mean(lambda run: sum(run["totals"].get("seconds", {}).values()) or None, "{:,.1f} s"),
        "tokens forwarded per real token": mean(
            lambda run: run["totals"].get("tokens_forwarded_per_real_token"), "{:.2f}"
        ),
        "tokens saved": mean(saved, "{:.1f} %"),
        "completions dropped": mean(dropped, "{:.1f} %"),
        "peak memory, host": mean(lambda run: peak(run, "host"), "{:.2f} GiB"),
        "peak memory, accelerator": mean(lambda run: peak(run, "accelerator"), "{:.2f} GiB"),
    }
    return {name: text for name, text in found.items() if text is not None}


def render_run_page(groups: Groups) -> str:
    """
    Return the page: one file, without a script, that asks the network for nothing.

    Raises:
        MissingPackageError: matplotlib or jinja2 is missing; the message names the extra.
    """
    tables = {title: facts(runs) for title, runs in groups.items()}
    names = dict.fromkeys(name for table in tables.values() for name in table)
    first = next(iter(groups.values()))[0]
    findings = {
        text: None for runs in groups.values() for run in runs for text in map(_sentence, run.get("findings", []))
    }
    return (
        environment()
        .get_template(TEMPLATE)
        .render(
            title=" beside ".join(groups),
            groups=tables,
            names=list(names),
            curves=curves(groups),
            bars=bars(groups),
            findings=list(findings),
            first=first,
            seeds=max(len(runs) for runs in groups.values()),
            details={
                key: first[key]
                for key in ("arguments", "schedule", "model", "data", "machine", "versions")
                if key in first
            },
        )
    )


def _sentence(finding: Mapping[str, Any]) -> str:
    return str(Finding(**finding))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `hf-effi report`."""
    parser.add_argument("folder", nargs="?", help="output_dir of a run, or a folder with the seeds of one setting")
    parser.add_argument("--compare", nargs="+", metavar="FOLDER", help="two or more of them, overlaid with bands")
    parser.add_argument("--output", metavar="FILE", help="page to write; default: report.html in the (first) folder")
    parser.add_argument(
        "--json", action="store_true", help="print the numbers as JSON; the page is then written only with --output"
    )


def run(args: argparse.Namespace) -> int:
    """Write the page and say where it is, or print the numbers."""
    folders = [*([args.folder] if args.folder else []), *(args.compare or [])]
    if not folders or (args.compare and len(folders) < 2):
        print("hf-effi report: give a folder, or --compare with at least two.", file=sys.stderr)
        return 2
    try:
        groups = dict(zip(_titles(folders), map(load_group, folders), strict=True))
    except BrokenFileError as error:
        print(f"hf-effi report: {error}", file=sys.stderr)
        return 1
    path = Path(args.output or Path(folders[0]) / "report.html")
    if args.output or not args.json:
        try:
            save_text(path, render_run_page(groups))
        except OSError as error:
            print(f"hf-effi report: cannot write {path}: {error.strerror}.", file=sys.stderr)
            return 1
    print(json.dumps(numbers(groups), indent=2) if args.json else path)
    return 0


def numbers(groups: Groups) -> dict[str, Any]:
    """Return the numbers of the page for JSON: the first table, and what the doctor found."""
    return {
        title: {
            "facts": facts(runs, as_text=False),
            "findings": [finding for run in runs for finding in run.get("findings", [])],
        }
        for title, runs in groups.items()
    }


def _titles(folders: Sequence[str]) -> list[str]:
    """Return the names of the folders, with as much of the path as tells them apart."""
    paths = [Path(folder).resolve() for folder in folders]
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{path.name} ({number})" for number, path in enumerate(paths, 1)]
