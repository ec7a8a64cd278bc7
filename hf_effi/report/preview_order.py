"""What a sampler would serve, without training: `hf-effi preview-order`."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .._untrusted import shorten
from ..data.row_files import read_rows
from ..samplers import (
    CompetenceSampler,
    CyclicalSampler,
    EffiSampler,
    InterleavedSampler,
    QualityAscendingSampler,
    ShuffledSampler,
)

#: name on the command line -> sampler from (numbers of the column, groups or `None`, arguments)
_ORDERS: dict[str, Callable[[list[float], list[str] | None, argparse.Namespace], EffiSampler]] = {
    "shuffled": lambda values, groups, args: ShuffledSampler(len(values), args.seed),
    "quality-ascending": lambda values, groups, args: QualityAscendingSampler(
        values, buckets=args.buckets, descending=args.descending, sources=groups, seed=args.seed
    ),
    "competence": lambda values, groups, args: CompetenceSampler(values, args.samples, seed=args.seed),
    "cyclical": lambda values, groups, args: CyclicalSampler(values, args.epochs, seed=args.seed),
    "interleaved": lambda values, groups, args: InterleavedSampler(
        values, groups or [""] * len(values), seed=args.seed
    ),
}
#: order -> the options that act on it besides `--seed`; any other that is given raises
_ACTS = {
    "shuffled": set(),
    "quality-ascending": {"buckets", "descending", "group"},
    "competence": {"samples"},
    "cyclical": {"epochs"},
    "interleaved": {"group"},
}


def preview(
    sampler: EffiSampler,
    values: Sequence[float],
    groups: Sequence[str] | None = None,
    *,
    batch_size: int = 8,
    parts: int = 10,
    batches: int = 3,
) -> dict[str, Any]:
    """
    Return what one epoch of a sampler looks like over time.

    Args:
        sampler ([`EffiSampler`]): Its current epoch is shown; nothing is trained.
        values (`Sequence[float]`): A number for each row, such as the score.
        groups (`Sequence[str]`, *optional*): A label for each row, such as the source.
        batch_size (`int`, *optional*, defaults to 8): Rows of a batch.
        parts (`int`, *optional*, defaults to 10): Equal parts of the epoch.
        batches (`int`, *optional*, defaults to 3): First batches to list.

    Returns:
        `dict`: `samples`, `distinct_rows`, `rows`, `most_often` (times that the most frequent row comes), `parts`
            (each
        with `samples`, `mean`, `low`, `high` and `shares` of the groups) and `first_batches` of row numbers.

    Raises:
        ValueError: another number of values or groups than rows, or a count below 1.

    Example:
    ```python
    >>> from hf_effi.samplers import QualityAscendingSampler
    >>> shown = preview(QualityAscendingSampler([0.3, 0.1, 0.2, 0.4]), [0.3, 0.1, 0.2, 0.4], parts=2, batch_size=2)
    >>> [round(part["mean"], 2) for part in shown["parts"]], shown["first_batches"]
    ([0.15, 0.35], [[1, 2], [0, 3]])
    ```
    """
    for name, given in (("values", values), ("groups", groups)):
        if given is not None and len(given) != sampler.num_rows:
            raise ValueError(f"{name} has {len(given)} entries for {sampler.num_rows} rows. Give one per row.")
    for name, count in (("batch_size", batch_size), ("parts", parts), ("batches", batches)):
        if count < 1:
            raise ValueError(f"{name}={count} must be at least 1.")
    order = list(sampler)
    parts = min(parts, len(order))
    bounds = [round(part * len(order) / parts) for part in range(parts + 1)]
    names = sorted(set(groups)) if groups is not None else []
    shown = []
    for low, high in zip(bounds, bounds[1:], strict=False):
        rows = order[low:high]
        numbers = [float(values[row]) for row in rows]
        part: dict[str, Any] = {
            "samples": len(rows),
            "mean": statistics.fmean(numbers),
            "low": min(numbers),
            "high": max(numbers),
        }
        if groups is not None:
            part["shares"] = {name: sum(groups[row] == name for row in rows) / len(rows) for name in names}
        shown.append(part)
    counts = [0] * sampler.num_rows
    for row in order:
        counts[row] += 1
    return {
        "samples": len(order),
        "rows": sampler.num_rows,
        "distinct_rows": sum(count > 0 for count in counts),
        "most_often": max(counts),
        "parts": shown,
        "first_batches": [
            order[first : first + batch_size] for first in range(0, min(batches * batch_size, len(order)), batch_size)
        ],
    }


def render(shown: dict[str, Any]) -> str:
    """Return a preview as text: one line a part of the epoch, with a bar from the lowest to the highest mean."""
    means = [part["mean"] for part in shown["parts"]]
    low, span = min(means), (max(means) - min(means)) or 1.0
    lines = [
        f"{shown['samples']} samples of {shown['rows']} rows: {shown['distinct_rows']} distinct, the most frequent "
        f"{shown['most_often']} time(s)",
        f"{'part':>5}  {'mean':>10}  {'low':>10}  {'high':>10}",
    ]
    for number, part in enumerate(shown["parts"], 1):
        bar = "#" * (1 + round(19 * (part["mean"] - low) / span))
        shares = "  ".join(f"{name} {share:.0%}" for name, share in part.get("shares", {}).items())
        numbers = f"{number:>5}  {part['mean']:>10.4g}  {part['low']:>10.4g}  {part['high']:>10.4g}"
        lines.append(f"{numbers}  {bar:<20}  {shares}".rstrip())
    lines += [f"batch {number}: rows {rows}" for number, rows in enumerate(shown["first_batches"], 1)]
    return "\n".join(lines)


def read_column(path: Path, column: str) -> list[Any]:
    """
    Return one column of a file or folder that [`~hf_effi.data.row_files.read_rows`] reads.

    Raises:
        ValueError: another kind of file, no row, a row that is no object, or one without the column.
    """
    rows = read_rows(path, (column,))
    return [row[column] for row in rows]


def read_numbers(path: Path, column: str) -> list[float]:
    """Return [`read_column`] as numbers; a value that is none raises `ValueError` with its row."""
    numbers = []
    for row, value in enumerate(read_column(path, column)):
        try:
            numbers.append(float(value))
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"{path.name}, row {row}: {column}={shorten(value)} is not a number.") from None
    return numbers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `hf-effi preview-order`."""
    parser.add_argument("order", choices=sorted(_ORDERS), help="the curriculum")
    parser.add_argument("file", type=Path, help="rows of the training set: .jsonl, .json, .csv, .parquet or a folder")
    parser.add_argument("--column", required=True, help="score, difficulty, loss or level of each row")
    parser.add_argument("--group", help="source or subject of each row")
    parser.add_argument("--buckets", type=int, help="quality-ascending: shuffle inside so many parts")
    parser.add_argument("--descending", action="store_true", help="quality-ascending: highest first")
    parser.add_argument("--samples", type=int, help="competence: samples of the run")
    parser.add_argument("--epochs", type=float, help="cyclical: passes of the plan (default 4)")
    parser.add_argument("--seed", type=int, default=0, help="of the shuffles (default 0)")
    parser.add_argument("--batch-size", type=int, default=8, help="rows of a batch (default 8)")
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else, on stdout")


def run(args: argparse.Namespace) -> int:
    """Print the preview; 0, or with one line on stderr 1 where the rows cannot be ordered and 2 for a wrong option."""
    for name in ("buckets", "descending", "samples", "epochs"):
        if getattr(args, name) and name not in _ACTS[args.order]:
            print(f"hf-effi preview-order: --{name} does not act on {args.order}. Remove it.", file=sys.stderr)
            return 2
    if args.batch_size < 1:
        print(f"hf-effi preview-order: --batch-size must be at least 1, got {args.batch_size}.", file=sys.stderr)
        return 2
    try:
        args.epochs = args.epochs or 4.0
        values = read_numbers(args.file, args.column)
        groups = [str(group) for group in read_column(args.file, args.group)] if args.group else None
        by = groups if "group" in _ACTS[args.order] else None
        shown = preview(_ORDERS[args.order](values, by, args), values, groups, batch_size=args.batch_size)
    except ValueError as error:
        print(f"hf-effi preview-order: {error}", file=sys.stderr)
        return 1
    print(json.dumps(shown, indent=1) if args.json else render(shown))
    return 0
