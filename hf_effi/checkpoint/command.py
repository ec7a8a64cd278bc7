"""`hf-effi checkpoint list | verify | repair | convert | interval`: which checkpoints are whole; how often to save."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .._untrusted import one_line
from ..functional.save_interval import lost_fraction, save_interval
from .folders import list_checkpoints, repair_run_dir
from .manifest import CheckpointReport, verify_checkpoint
from .structure import step_of

_HELP = {
    "list": "each checkpoint of a run, and whether it is whole by lengths and structure of its files (milliseconds)",
    "verify": "the same, or for one checkpoint, reading every byte; ends with 1 where one is not whole",
    "repair": "put a folder in order after a crash: finish what was complete, delete what was not",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sub-commands and their options."""
    commands = parser.add_subparsers(dest="action", metavar="{list,verify,repair,convert,interval}", required=True)
    for name, text in _HELP.items():
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        what = "output_dir of a run" + (", or a checkpoint-N in it" if name == "verify" else "")
        command.add_argument("folder", type=Path, help=what)
        command.add_argument("--json", action="store_true", help="print JSON")
    text = "convert a checkpoint of one process or DDP to one of FSDP2 or back, with the state of the optimizer"
    command = commands.add_parser("convert", help=text, description=f"C{text[1:]}.")
    command.add_argument("folder", type=Path, metavar="SRC", help="a checkpoint-N")
    command.add_argument("target", type=Path, metavar="DST", help="the new checkpoint-N, which does not exist yet")
    command.add_argument("--to", choices=("single", "fsdp2"), required=True, help="what goes on from it")
    command.add_argument("--json", action="store_true", help="print JSON")
    text = "how often to save, from what a save costs and how often the job fails (Young, Daly)"
    command = commands.add_parser("interval", help=text, description=f"H{text[1:]}.")
    command.add_argument("stall", type=float, metavar="SECONDS", help="that one save holds up the training")
    command.add_argument(
        "hours", type=float, metavar="HOURS", help="between two failures of the whole job, on average"
    )
    command.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Run one sub-command and return its exit code."""
    if args.action == "interval":
        return _interval(args)
    if not args.folder.is_dir():
        print(f"There is no folder {str(args.folder)!r}.", file=sys.stderr)
        return 1
    if args.action == "convert":
        return _convert(args)
    if args.action == "repair":
        done = repair_run_dir(args.folder)
        print(json.dumps({"done": done}) if args.json else "\n".join(done) or "Nothing to repair.")
        return 0
    if args.action == "verify" and step_of(args.folder) >= 0:
        reports = [verify_checkpoint(args.folder)]
    else:
        reports = list_checkpoints(args.folder, "content" if args.action == "verify" else "size")
    if args.json:
        print(json.dumps([as_json(report) for report in reports], indent=1))
    else:
        print(table(reports) if reports else f"No checkpoint in {args.folder}.")
    return int(args.action == "verify" and not all(report.whole for report in reports))


def _convert(args: argparse.Namespace) -> int:
    from .convert import convert_checkpoint  # torch is for this one alone

    try:
        made = convert_checkpoint(args.folder, args.target, to=args.to)
    except (ValueError, OSError) as error:
        print(one_line(error, 2000), file=sys.stderr)
        return 1
    print(json.dumps({"path": str(made), "layout": args.to}) if args.json else f"{made} is for {args.to}.")
    return 0


def _interval(args: argparse.Namespace) -> int:
    try:
        best = save_interval(args.stall, args.hours * 3600)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    lost = {seconds: lost_fraction(seconds, args.stall, args.hours * 3600) for seconds in (best / 4, best, best * 4)}
    if args.json:
        print(json.dumps({"seconds": best, "lost_fraction": lost[best]}))
        return 0
    print(f"Save every {best:.0f} seconds: {100 * lost[best]:.2f} % of the time goes to saves and to work done twice.")
    for seconds, share in lost.items():
        if seconds != best:
            print(f"Every {seconds:.0f} seconds it would be {100 * share:.2f} %.")
    return 0


def as_json(report: CheckpointReport) -> dict[str, Any]:
    """Return a report in plain values."""
    return {
        "path": str(report.path),
        "step": report.step,
        "whole": report.whole,
        "sealed": report.sealed,
        "problem": report.problem,
        "bytes": report.size,
        "level": report.level,
    }


def table(reports: Sequence[CheckpointReport]) -> str:
    """Return one line per checkpoint, the columns lined up, and a line that says which one a resume would take."""
    rows = [("checkpoint", "size", "manifest", "state")]
    for report in reports:
        state = "whole" if report.whole else one_line(f"broken: {report.problem}")
        rows.append((one_line(report.path.name), _size(report.size), "yes" if report.sealed else "no", state))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in rows
    ]
    newest = next((report.path.name for report in reversed(reports) if report.whole), None)
    lines.append("")
    lines.append(
        'No whole checkpoint: resume_from_checkpoint="auto" starts fresh.'
        if newest is None
        else f'resume_from_checkpoint="auto" would take {one_line(newest)}.'
    )
    if any(not report.sealed for report in reports):
        lines.append("Without a manifest only the structure of the files can be looked at: no flipped bit is found.")
    return "\n".join(lines)


def _size(count: int) -> str:
    for unit, bits in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 1 << bits:
            return f"{count / (1 << bits):.1f} {unit}"
    return f"{count} B"
