r"""Tables in Markdown, HTML and LaTeX: read out of a text, aligned with another one, and scored."""

from __future__ import annotations

import html
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

#: formats of [`read_tables`]
TABLE_FORMATS = ("markdown", "html", "latex")
#: largest table that is read, and most tables of a text that are looked at
MOST_ROWS, MOST_COLUMNS, MOST_TABLES = 500, 64, 2
Table = list[list[str]]

_TAG = re.compile(r"<(/?)(table|tr|th|td)\b[^<>]*+>", re.IGNORECASE)
_ANY_TAG = re.compile(r"<[^<>]*+>")
_RULE = re.compile(r"\s*+:?-++:?\s*+")
_LATEX_TABLE = re.compile(r"\\(begin|end)\{(tabular[*x]?|longtable|array)\}")
_LATEX_LINES = re.compile(
    r"\\(?:hline|toprule|midrule|bottomrule)(?![A-Za-z])|\\(?:cline|cmidrule)(?:\([a-z]{0,4}\))?\{[\d -]{0,9}\}"
)
_LATEX_STYLE = re.compile(r"\\(?:textbf|textit|emph|text|mathbf|mathrm|underline)\{([^{}]*+)\}")
_NUMBER = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})++|\d{1,30})(?:\.\d{0,30})?(?:[eE][+-]?\d{1,3})?")


def read_tables(text: str, format: str) -> list[Table]:
    r"""
    Return the tables in a text, each a list of rows of cells, of which the first is the header.

    At most the first two. A table of more than 500 rows or 64 columns is left out, and one with another inside of it.
    Cells that span several columns or rows are one cell. Takes linear time.

    Args:
        text (`str`): Any text.
        format (`str`): `"markdown"` (pipes, with a line of dashes below the header), `"html"` (`<table>`), or
            `"latex"` (`tabular`, `tabularx`, `longtable`, `array`).

    Raises:
        ValueError: `format` is unknown.

    Example:
    ```python
    >>> read_tables("Scores:\n| name | goals |\n|---|---:|\n| Ada | 3 |\n", "markdown")
    [[['name', 'goals'], ['Ada', '3']]]
    >>> read_tables("<table><tr><th>a<td>b &amp; c</table>", "html")
    [[['a', 'b & c']]]
    >>> read_tables(r"\begin{tabular}{ll} a & b \\ \hline 1 & 50\% \\ \end{tabular}", "latex")
    [[['a', 'b'], ['1', '50%']]]
    ```
    """
    if format not in TABLE_FORMATS:
        raise ValueError(f"format must be one of {TABLE_FORMATS}, got {format!r}.")
    tables: list[Table] = []
    for table in {"markdown": _markdown, "html": _html, "latex": _latex}[format](text):
        if 0 < len(table) <= MOST_ROWS and all(0 < len(row) <= MOST_COLUMNS for row in table):
            tables.append(table)
            if len(tables) == MOST_TABLES:
                break
    return tables


def _markdown(text: str) -> Iterator[Table]:
    lines = text.splitlines()
    place = 0
    while place + 1 < len(lines):
        header, rule = _cells(lines[place]), _cells(lines[place + 1])
        if not header or len(header) != len(rule) or not all(_RULE.fullmatch(cell) for cell in rule):
            place += 1
            continue
        table, place = [header], place + 2
        while place < len(lines) and (row := _cells(lines[place])):
            table.append(row)
            place += 1
        yield table


def _cells(line: str) -> list[str]:
    """Return the cells of a line with pipes; no cell without one."""
    parts = line.strip().replace("\\|", "\0").split("|", 4 * MOST_COLUMNS)
    if len(parts) < 2:
        return []
    parts = parts[1:] if not parts[0].strip() else parts
    parts = parts[:-1] if parts and not parts[-1].strip() else parts
    return [part.replace("\0", "|").strip() for part in parts]


def _html(text: str) -> Iterator[Table]:
    table: Table | None = None
    depth = start = 0
    broken, cell = False, False

    def close(end: int) -> None:
        nonlocal cell
        if cell and table:
            table[-1].append(html.unescape(_ANY_TAG.sub("", text[start:end])).strip())
        cell = False

    for tag in _TAG.finditer(text):
        ends, name = bool(tag[1]), tag[2].lower()
        if name == "table":
            close(tag.start())
            depth += -1 if ends else 1
            if depth < 0:
                depth = 0
            elif not ends and depth == 1:
                table, broken = [], False
            elif not ends:
                broken = True
            elif depth == 0 and table is not None:
                if not broken:
                    yield [row for row in table if row]
                table = None
            continue
        if table is None:
            continue
        close(tag.start())
        if not ends and (name == "tr" or not table):
            table.append([])
        if not ends and name != "tr":
            cell, start = True, tag.end()


def _latex(text: str) -> Iterator[Table]:
    open_at: int | None = None
    broken = False
    for mark in _LATEX_TABLE.finditer(text):
        if mark[1] == "begin":
            broken, open_at = open_at is not None, mark.end()
        elif open_at is not None:
            if not broken:
                yield _latex_rows(text[open_at : mark.start()])
            open_at = None


def _latex_rows(body: str) -> Table:
    lines = [re.split(r"(?<!\\)%", line, maxsplit=1)[0] for line in body.splitlines()]
    body = _without_groups("\n".join(lines).lstrip())
    table: Table = []
    for row in body.split("\\\\", 2 * MOST_ROWS):
        row = _LATEX_LINES.sub("", re.sub(r"^\s*+(?:\*|\[[^\[\]]{0,20}\])", "", row))
        if row.strip():
            table.append([_latex_cell(cell) for cell in re.split(r"(?<!\\)&", row, maxsplit=4 * MOST_COLUMNS)])
    return table


def _without_groups(body: str) -> str:
    """Take away the width, position and columns that stand behind `\\begin{tabular}`."""
    while body[:1] in ("{", "["):
        depth = end = 0
        for place, letter in enumerate(body, 1):
            depth += (letter in "{[") - (letter in "}]")
            if depth == 0:
                end = place
                break
        body = body[end:].lstrip() if end else ""
    return body


def _latex_cell(cell: str) -> str:
    cell = _LATEX_STYLE.sub(r"\1", _LATEX_STYLE.sub(r"\1", cell))
    return re.sub(r"\\([&%$#_{}])", r"\1", cell).strip().strip("$").strip()


# --- scores ----------------------------------------------------------------------------------------------------------


def table_scores(table: Sequence[Sequence[str]], gold: Sequence[Sequence[str]]) -> tuple[float, float]:
    """
    F1 of the header and of the cells of a table, beside the table that it should be.

    Columns belong together by their header, those that are left by their order; then rows, so that as many cells as
    can be are equal while both keep their order. A cell that is equal in its aligned row and column counts once in
    `2 equal / (cells + gold cells)`. Numbers are equal to six digits, `1,000` is `1000`; texts by folded case, without
    `*`, `_` and backquotes around them, and with single spaces.

    Args:
        table, gold (`Sequence[Sequence[str]]`): Rows of cells, the header first; from [`read_tables`].

    Returns:
        `tuple[float, float]`: F1 of the header, F1 of the cells below it, each in [0, 1]. Where neither has a cell it
        is 1.

    Example:
    ```python
    >>> gold = [["name", "goals"], ["Ada", "3"], ["Bo", "1"]]
    >>> table_scores([["Goals", "Name"], ["3.0", "Ada"], ["1", "bo"]], gold)
    (1.0, 1.0)
    >>> table_scores([["name", "goals"], ["Bo", "1"]], gold)
    (1.0, 0.6666666666666666)
    ```
    """
    ours, theirs = ([[_key(cell) for cell in row] for row in rows] for rows in (table, gold))
    headers = [Counter(rows[0] if rows else ()) for rows in (ours, theirs)]
    header = _f1((headers[0] & headers[1]).total(), headers[0].total(), headers[1].total())
    pairs = _columns(ours[0] if ours else [], theirs[0] if theirs else [])
    equal = _aligned([_picked(row, [one for one, _ in pairs]) for row in ours[1:]],
                     [_picked(row, [other for _, other in pairs]) for row in theirs[1:]])  # fmt: skip
    return header, _f1(equal, sum(map(len, ours[1:])), sum(map(len, theirs[1:])))


def _f1(met: int, ours: int, theirs: int) -> float:
    return 2.0 * met / (ours + theirs) if ours + theirs else 1.0


def _key(cell: Any) -> str:
    word = " ".join(str(cell).split()).strip("*_`").strip().casefold()
    if _NUMBER.fullmatch(word):
        number = float(word.replace(",", ""))
        return f"{number:.6g}" if math.isfinite(number) and number else "0" if number == 0 else word
    return word


def _columns(ours: list[str], theirs: list[str]) -> list[tuple[int, int]]:
    """Pair columns by header, those that are left by order."""
    free = list(range(len(ours)))
    pairs: list[tuple[int, int]] = []
    missing: list[int] = []
    for place, name in enumerate(theirs):
        found = next((one for one in free if ours[one] == name), None)
        if found is None:
            missing.append(place)
        else:
            free.remove(found)
            pairs.append((found, place))
    return pairs + list(zip(free, missing, strict=False))


def _picked(row: list[str], places: list[int]) -> list[str | None]:
    return [row[place] if place < len(row) else None for place in places]


def _aligned(ours: list[list[str | None]], theirs: list[list[str | None]]) -> int:
    """Return the most equal cells over all alignments that keep the order of rows."""
    if not ours or not theirs or not ours[0]:
        return 0
    numbers: dict[str | None, int] = {}
    left, right = (
        torch.tensor([[-1 - side if cell is None else numbers.setdefault(cell, len(numbers)) for cell in row]
                      for row in rows])
        for side, rows in enumerate((ours, theirs))
    )  # fmt: skip
    equal = torch.zeros(len(left), len(right), dtype=torch.long)
    for one, other in zip(left.unbind(1), right.unbind(1), strict=True):
        equal += one.unsqueeze(1) == other.unsqueeze(0)
    best: Tensor = torch.zeros(len(right) + 1, dtype=torch.long)
    for row in equal:
        best[1:] = torch.maximum(best[1:], best[:-1] + row)
        best = best.cummax(0).values
    return int(best[-1])
