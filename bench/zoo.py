"""Every model class of transformers against every feature that promises the untouched model's numbers.
`python -m bench.zoo`.

Writes `bench/results/zoo.json`, from which `bench.render` makes the tables of `docs/zoo.md`. Each class is built tiny
from its config and tried with the plain settings and with further rows of a covering design (`tests/zoo`), one thread
in each of `--processes` processes. `--only CLASS` runs one class and writes nothing; `--feature KEY` runs one feature
on all classes again and puts its cells into the file that is there.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import multiprocessing
import sys
import time
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch

from bench._schema import RESULTS, command_line, headline, write_result
from tests.zoo.builders import SEED, Family
from tests.zoo.cases import describe
from tests.zoo.features import FEATURES, Outcome
from tests.zoo.ranks import SEQUENCE_PARALLEL, run_pair
from tests.zoo.run import Result, everything, jobs_on_ranks, run_family

#: of the rows of a class, for sequence parallelism
_ROWS_ON_RANKS = 3
_REASON = 160


def on_ranks(items: Sequence[Family]) -> list[Result]:
    """Run sequence parallelism over two processes for every third causal class."""
    jobs = jobs_on_ranks(items, _ROWS_ON_RANKS)
    outcomes = run_pair([(family.kind, family.name, family.model_type, row) for family, row in jobs])
    return [
        Result(family, SEQUENCE_PARALLEL.key, row, outcome)
        for (family, row), outcome in zip(jobs, outcomes, strict=True)
    ]


def mark_of(outcomes: Sequence[Outcome]) -> str:
    """
    Return what a class and a feature come to over all settings.

    `neither`: some difference or foreign error; `n/a`: the untouched model never ran; `partly`: equal with some
    settings and refused with others.
    """
    statuses = {outcome.status for outcome in outcomes} - {"stock"}
    if statuses & {"different", "error"}:
        return "neither"
    if not statuses:
        return "n/a"
    return "partly" if len(statuses) > 1 else statuses.pop()


def rows_of_table(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return one row per class, then one row per setting."""
    classes: dict[Family, dict[str, list[Result]]] = {}
    for result in results:
        classes.setdefault(result.family, {}).setdefault(result.feature, []).append(result)
    return [_class_row(family, cells) for family, cells in classes.items()] + _setting_rows(results)


def _class_row(family: Family, cells: Mapping[str, Sequence[Result]]) -> dict[str, Any]:
    row: dict[str, Any] = {"kind": family.kind, "class": family.name, "model_type": family.model_type}
    if "" in cells:
        return {**row, "error": cells[""][0].outcome.note[: 2 * _REASON]}
    return {**row, "cells": {feature: _cell(found) for feature, found in cells.items()}}


def _cell(found: Sequence[Result]) -> dict[str, str]:
    mark = mark_of([result.outcome for result in found])
    wanted = {"neither": ("different", "error"), "n/a": ("stock",)}.get(mark, ("refused",))
    notes = [result.outcome.note for result in found if result.outcome.status in wanted]
    return {"mark": mark} | ({"why": notes[0][:_REASON]} if notes else {})


def _setting_rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """How often each level of each axis was equal and refused, by feature, on classes where the plain row is equal."""
    plain = {(r.family, r.feature) for r in results if describe(r.row) == "plain" and r.outcome.status == "equal"}
    counts: dict[tuple[str, str], dict[str, list[int]]] = {}
    for result in results:
        for axis, level in result.row.items() if (result.family, result.feature) in plain else ():
            cell = counts.setdefault((axis, level), {}).setdefault(result.feature, [0, 0])
            cell[0] += result.outcome.status == "equal"
            cell[1] += result.outcome.status == "refused"
    return [{"axis": axis, "level": level, "counts": cells} for (axis, level), cells in sorted(counts.items())]


def merged(
    rows: Sequence[dict[str, Any]], again: Sequence[dict[str, Any]], keys: Collection[str]
) -> list[dict[str, Any]]:
    """
    Return the rows of a file with the cells and counts of these features taken from a later run.

    Raises:
        ValueError: the two runs do not have the same classes, as with another release of transformers.
    """
    # One class may stand for several model types.
    classes = {(row["kind"], row["class"], row["model_type"]): row for row in again if "class" in row}
    before = {(row["kind"], row["class"], row["model_type"]): row for row in rows if "class" in row}
    if not set(classes) <= set(before):
        raise ValueError("the file has other classes than the installed transformers: run the whole zoo again.")
    found = []
    for name, row in before.items():
        cells = {key: cell for key, cell in row.get("cells", {}).items() if key not in keys}
        cells |= classes.get(name, {}).get("cells", {})
        order = [*row.get("cells", {}), *cells]
        cells = {key: cells[key] for key in dict.fromkeys(order) if key in cells}
        found.append({**row, "cells": cells} if "cells" in row else row)
    counts: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        if "axis" in row:
            counts[row["axis"], row["level"]] = {k: v for k, v in row["counts"].items() if k not in keys}
    for row in again:
        if "axis" in row:
            counts.setdefault((row["axis"], row["level"]), {}).update(row["counts"])
    return found + [{"axis": a, "level": level, "counts": cells} for (a, level), cells in sorted(counts.items())]


def headlines(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the counts of classes and of cells."""
    classes = [row for row in rows if "class" in row]
    marks = [cell["mark"] for row in classes for cell in row.get("cells", {}).values()]
    return [
        headline("classes", len(classes)),
        headline("classes_built", sum("cells" in row for row in classes)),
        headline("cells", len(marks) - marks.count("n/a")),
        headline("cells_equal", marks.count("equal")),
        headline("cells_equal_or_refused_by_setting", marks.count("partly")),
        headline("cells_refused", marks.count("refused")),
        headline("cells_neither", marks.count("neither"), "= 0"),
    ]


def _quiet() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)


def _results_of(family: Family, keys: Collection[str]) -> list[Result]:
    return list(run_family(family, wanted=keys.__contains__))


def results_in_order(
    items: Sequence[Family], processes: int, keys: Collection[str] = tuple(feature.key for feature in FEATURES)
) -> Iterator[list[Result]]:
    """Yield the results of each class, in the order of the classes, whatever the number of processes."""
    run = functools.partial(_results_of, keys=keys)
    if processes == 1:
        yield from map(run, items)
        return
    # Spawned, so that each begins alike; new ones from time to time, as classes leave code and caches behind.
    with multiprocessing.get_context("spawn").Pool(processes, _quiet, maxtasksperchild=40) as pool:
        yield from pool.imap(run, items)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", metavar="CLASS", help="run one class, print its results, write nothing")
    parser.add_argument("--processes", type=int, default=2, help="classes that are run at once (default: 2)")
    parser.add_argument(
        "--feature", action="append", default=[], metavar="KEY", choices=[feature.key for feature in FEATURES],
        help="run only this feature, and put its cells into the file that is there",
    )  # fmt: skip
    args = parser.parse_args(arguments)
    _quiet()
    keys = args.feature or [feature.key for feature in FEATURES]
    found = [family for family in everything() if args.only in (None, family.name, family.model_type)]
    results: list[Result] = []
    start = time.perf_counter()
    for place, mine in enumerate(results_in_order(found, min(args.processes, len(found)), keys)):
        results += mine
        for result in mine if args.only else (result for result in mine if not result.outcome.ok):
            print(result, flush=True)
        if place % 20 == 19:
            print(f"{place + 1} of {len(found)} classes, {time.perf_counter() - start:.0f} s", flush=True)
    if args.only:
        return any(not result.outcome.ok for result in results)
    on_two = [] if args.feature else on_ranks(found)
    print(*(result for result in on_two if not result.outcome.ok), sep="\n", flush=True)
    rows = rows_of_table(results + on_two)
    if args.feature:
        rows = merged(json.loads((RESULTS / "zoo.json").read_text(encoding="utf-8"))["rows"], rows, keys)
    figures = headlines(rows)
    print(f"{len(FEATURES) + 1} features;", ", ".join(f"{f['name']} {f['value']}" for f in figures))
    print("wrote", write_result("zoo", command=command_line("bench.zoo"), seeds=[SEED], headline=figures, rows=rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
