"""What every bench script shares: the result schema, where results lie, and how they are written."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hf_effi.report import result_record

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"


def command_line(module: str) -> str:
    """Return the command that started this script, as one types it in the repository root."""
    return " ".join(["python", "-m", module, *sys.argv[1:]])


def headline(name: str, value: float | None, goal: str | None = None, met: bool | None = None) -> dict[str, Any]:
    """
    Return one named figure. `met` follows from value and goal; where it is given too, the two must agree.

    Raises:
        ValueError: `met` disagrees with value and goal.
    """
    figure = result_record.headline(name, value, goal)
    if met is not None and bool(met) != figure["met"]:
        raise ValueError(f"{name}: met={met} disagrees with value {value} and goal {goal!r}.")
    return figure


def write_result(
    bench: str,
    *,
    command: str,
    seeds: Sequence[int],
    headline: Sequence[dict[str, Any]],
    rows: Sequence[dict[str, Any]],
    folder: Path = RESULTS,
) -> Path:
    """Stamp a result with commit, date, machine and versions, check it, and write `<folder>/<bench>.json`."""
    result = result_record.make_record(bench, command, seeds, headline, rows)
    result_record.check_record(result, f"{bench}.json")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{bench}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path


def figure_again(
    bench: str,
    judge: Callable[[Sequence[dict[str, Any]]], tuple[list[dict[str, Any]], list[dict[str, Any]]]],
    folder: Path = RESULTS,
) -> list[dict[str, Any]]:
    """
    Compute the figures of finished runs again, by a rule that has changed, and return all rows.

    Commit, date and machine of the file stay those of the measurement.

    Args:
        judge (`Callable`): Takes the rows; returns the headline and the rows to keep.
    """
    path = folder / f"{bench}.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    result["headline"], result["rows"] = judge(result["rows"])
    result_record.check_record(result, path.name)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result["rows"]


def load_results(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """
    Return all result files by bench name, each checked against the schema.

    Raises:
        ValueError: a file is no JSON or breaks the schema; the message names the file.
    """
    results = {}
    for path in sorted(folder.glob("*.json")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path.name}: not JSON ({error}).") from None
        result_record.check_record(result, path.name)
        results[path.stem] = result
    return results
