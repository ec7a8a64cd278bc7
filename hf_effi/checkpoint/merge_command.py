"""`hf-effi average`: the average of checkpoints or runs, a model between two, or an instruction delta, as a folder."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .average import carry_out, plan_average
from .merge_delta import add_instruction_delta
from .merge_files import check_target
from .merge_interpolate import write_interpolation
from .merge_runs import average_runs

_OF_CHECKPOINTS = ("last", "weights", "alpha", "penalty", "greater_is_better", "exact_delta", "dry_run")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("run_dir", type=Path, nargs="?", metavar="OUT_DIR", help="output_dir of a finished run")
    parser.add_argument("--output", type=Path, metavar="X", help="folder of the result; must not exist")
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else, on stdout")
    one = parser.add_argument_group("the last checkpoints of a run")
    one.add_argument("--last", type=int, metavar="K", help="how many; 6 without it; 0 for all")
    one.add_argument(
        "--weights",
        metavar="KIND",
        help="ema (without it), uniform, linear, trend, loss, step, or the name of a logged metric such as eval_loss",
    )
    one.add_argument("--penalty", type=float, metavar="P", help="of loss, step and metrics; 4 without it")
    text = "of ema: weight of the newest, 0.2 without it; with --interpolate: share of the tuned model, 0.5 without it"
    one.add_argument("--alpha", type=float, metavar="A", help=text)
    better = one.add_mutually_exclusive_group()
    better.add_argument("--greater-is-better", action="store_true", default=None, help="of a logged metric")
    better.add_argument("--lower-is-better", action="store_false", dest="greater_is_better", help="of a logged metric")
    one.add_argument("--exact-delta", action="store_true", default=None, help="of LoRA: average the products exactly")
    one.add_argument("--dry-run", action="store_true", default=None, help="say what would be averaged, and stop")
    other = parser.add_argument_group("in place of OUT_DIR")
    ways = other.add_mutually_exclusive_group()
    ways.add_argument(
        "--runs", nargs="+", type=Path, metavar="DIR", help="models of one base, trained with other seeds"
    )
    text = "a model between two; BASE is - for a LoRA adapter that holds no whole weights"
    ways.add_argument("--interpolate", nargs=2, type=Path, metavar=("BASE", "TUNED"), help=text)
    text = "CPT + scale (INSTRUCT - BASE)"
    ways.add_argument("--delta", nargs=3, type=Path, metavar=("BASE", "INSTRUCT", "CPT"), help=text)
    other.add_argument("--base", type=Path, help="with --runs: the model that all were trained from")
    other.add_argument("--min-cosine", type=float, metavar="C", help="with --runs; 0.5 without it")
    other.add_argument("--scale", type=float, metavar="S", help="with --delta; 1 without it")


def run(args: argparse.Namespace) -> int:
    """Run the command and return its exit code: 1 where it is refused, 2 where it was called wrongly."""
    if (wrong := _wrong(args)) is not None:
        print(f"hf-effi average: {wrong} `hf-effi average --help` lists what it takes.", file=sys.stderr)
        return 2
    try:
        said, lines = _done(args)
    except (ValueError, OSError) as error:
        print(f"hf-effi average: {error}", file=sys.stderr)
        return 1
    print(json.dumps(said) if args.json else "\n".join(lines))
    return 0


def _wrong(args: argparse.Namespace) -> str | None:
    ways = {"OUT_DIR": args.run_dir, "--runs": args.runs, "--interpolate": args.interpolate, "--delta": args.delta}
    chosen = [name for name, value in ways.items() if value is not None]
    if len(chosen) != 1:
        return f"name one of OUT_DIR, --runs, --interpolate and --delta; got {' and '.join(chosen) or 'none'}."
    if args.output is None and not args.dry_run:
        return "--output is missing: the folder of the result."
    takes = {
        "OUT_DIR": _OF_CHECKPOINTS,
        "--runs": ("base", "min_cosine"),
        "--interpolate": ("alpha",),
        "--delta": ("scale",),
    }
    for name in {option for options in takes.values() for option in options}:
        if getattr(args, name) is not None and name not in takes[chosen[0]]:
            return f"--{name.replace('_', '-')} does nothing with {chosen[0]}."
    return None


def _given(args: argparse.Namespace, **names: str) -> dict[str, Any]:
    """Return the options that were set, under the names of the function."""
    return {name: value for option, name in names.items() if (value := getattr(args, option)) is not None}


def _done(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    if args.runs is not None:
        found = average_runs(args.runs, args.output, **_given(args, base="base", min_cosine="min_cosine"))
        lines = [f"The mean of {len(found.folders)} runs is in {args.output}."]
        if found.lowest_cosine is not None:
            lines.append(f"Lowest cosine between two runs: {found.lowest_cosine:.3f} ({found.lowest_tensor}).")
        if found.task_cosine is not None:
            lines.append(f"Lowest cosine between what two runs learnt: {found.task_cosine:.3f}.")
        if found.exact_delta:
            lines.append("The products of the LoRA factors were averaged: the rank is the sum of the ranks.")
        return {"output": str(args.output), **asdict(found)}, lines
    if args.interpolate is not None:
        base, tuned = args.interpolate
        alpha = 0.5 if args.alpha is None else args.alpha
        write_interpolation(None if str(base) == "-" else base, tuned, args.output, alpha)
        said = {"output": str(args.output), "base": str(base), "tuned": str(tuned), "alpha": alpha}
        return said, [f"{1 - alpha:g} of {base} and {alpha:g} of {tuned} are in {args.output}."]
    if args.delta is not None:
        base, instruct, cpt = args.delta
        made = add_instruction_delta(base, instruct, cpt, args.output, **_given(args, scale="scale"))
        lines = [
            f"The instruction delta ({made.delta:.3g} of the base's length) was added to {cpt} "
            f"({made.drift:.3g} away from its base), in {args.output}.",
            f"Tokenizer: {made.tokenizer}. Chat template: {made.template}.",
        ]
        lines += [f"{name}: {count} rows of new tokens kept." for name, count in made.new_rows.items()]
        return {"output": str(args.output), **asdict(made)}, lines
    return _checkpoints(args)


def _checkpoints(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    names = {"last": "last", "weights": "kind", "alpha": "alpha", "penalty": "penalty"}
    options = _given(args, **names, greater_is_better="greater_is_better")
    if options.get("last") == 0:
        options["last"] = None
    target = None if args.dry_run else check_target(args.output)
    plan = plan_average(args.run_dir, **options)
    if target is not None:
        kind, alpha = options.get("kind", "ema"), options.get("alpha", 0.2)
        carry_out(plan, target, kind, alpha, args.penalty, bool(args.exact_delta))
    said = {
        "output": None if args.dry_run else str(args.output),
        "steps": plan.steps,
        "weights": plan.weights,
        "values": plan.values,
        "skipped": plan.skipped,
        "lr_ratio": plan.lr_ratio,
        "advice": plan.advice,
    }
    values = ["" if plan.values is None else f"   {value:.6g}" for value in plan.values or plan.weights]
    lines = [
        f"checkpoint-{step:<8} weight {weight:+.4f}{value}"
        for step, weight, value in zip(plan.steps, plan.weights, values, strict=True)
    ]
    lines += [f"Left out: {reason}." for reason in plan.skipped]
    lines += [] if plan.advice is None else [plan.advice]
    lines.append("Nothing was written." if args.dry_run else f"The average is in {args.output}.")
    return said, lines
