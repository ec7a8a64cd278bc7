"""What every bench script shares: the result schema, where results lie, and how they are written."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_effi.report.record import check_record, headline, make_record

__all__ = [
    "RESULTS",
    "ROOT",
    "check_record",
    "command_line",
    "headline",
    "load_results",
    "make_record",
    "write_result",
]

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"


def command_line(module: str) -> str:
    """Return the command that started this script, as one types it in the repository root."""
    return " ".join(["python", "-m", module, *sys.argv[1:]])


def write_result(result: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Check a result against the schema, write it to `<folder>/<bench>.json`, and return the path."""
    check_record(result, f"{result.get('bench', 'result')}.json")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result['bench']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path


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
        check_record(result, path.name)
        results[path.stem] = result
    return results
