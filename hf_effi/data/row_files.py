"""Rows of a dataset from a file or folder on this machine, for commands that look at a few of them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .._untrusted import one_line, shorten

#: the largest text file that is read, in bytes
LARGEST_FILE = 2**28
_TEXT = (".jsonl", ".json", ".csv")


def read_rows(path: str | Path, columns: Sequence[str] = ()) -> list[dict[str, Any]]:
    """
    Return the rows of a `.jsonl`, `.json` (list of objects), `.csv` or `.parquet` file, or of a folder that
    `Dataset.save_to_disk` wrote.

    Of a folder with several splits `train` is read. A value of a CSV file is a text.

    Args:
        path (`str` or `Path`): At most 256 MiB where it is a text file.
        columns (`Sequence[str]`, *optional*): Columns that each row must have.

    Raises:
        ValueError: it is not there, of another kind, too large, broken, or empty, or a row lacks a column; the message
            names the row.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: there is no such file or folder.")
    rows = _of_dataset(path) if path.is_dir() or path.suffix == ".parquet" else _of_text(path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        example = columns[0] if columns else "prompt"
        raise ValueError(f'{path.name} must hold one object per row, such as {{"{example}": ...}}.')
    if not rows:
        raise ValueError(f"{path.name} has no rows.")
    for number, row in enumerate(rows):
        for column in columns:
            if column not in row:
                known = shorten(sorted(map(str, row)), 300)
                raise ValueError(f"{path.name}, row {number}: no column {column!r}. It has {known}.")
    return rows


def _of_text(path: Path) -> Any:
    if path.suffix not in _TEXT:
        raise ValueError(
            f"{path.name}: {path.suffix or 'no suffix'} is not known. Use .jsonl, .json, .csv or .parquet, or a "
            "folder of `Dataset.save_to_disk`."
        )
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise ValueError(f"it is larger than {LARGEST_FILE:,} bytes; give a part of it")
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".csv":
            return list(csv.DictReader(io.StringIO(text, newline="")))
        if path.suffix == ".json":
            return json.loads(text)
        return _json_lines(text)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}.") from error
    except (ValueError, RecursionError, csv.Error) as error:
        raise ValueError(f"{path.name} cannot be read as {path.suffix}: {one_line(error, 200)}.") from error


def _json_lines(text: str) -> list[Any]:
    rows = []
    # Not `splitlines`: a text of a row may hold U+2028 and others that it takes for the end of a line.
    for number, line in enumerate(text.split("\n"), 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            raise ValueError(f"line {number} is not JSON ({error})") from None
    return rows


def _of_dataset(path: Path) -> list[Any]:
    from datasets import Dataset, DatasetDict, load_from_disk

    try:
        loaded = load_from_disk(str(path)) if path.is_dir() else Dataset.from_parquet(str(path))
    except Exception as error:  # whatever is in there
        kind = "a folder of `Dataset.save_to_disk`" if path.is_dir() else "a Parquet file"
        raise ValueError(f"{path.name} is not {kind} ({one_line(error, 200)}).") from None
    if isinstance(loaded, DatasetDict):
        if "train" not in loaded:
            raise ValueError(f"{path} has the splits {', '.join(loaded)}, not 'train'. Give the folder of one split.")
        loaded = loaded["train"]
    return list(loaded)
