"""The table that the demo prints, and the same cells as Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from typing import Any

from ..report.page import as_percent, as_points, as_times, speedup

Row = Mapping[str, Any]


def _seconds(row: Row) -> str:
    return f"{sum(row['cpu_seconds'].values()):.0f} s"


def _share(phase: str) -> Callable[[Row], str]:
    return lambda row: f"{row['cpu_seconds'][phase]:.1f} s"


def _gain(name: str) -> Callable[[Row], str]:
    return lambda row: as_points(row[f"accuracy_gain_equal_{name}"])


def _sooner(axis: str) -> Callable[[Row], str]:
    return lambda row: as_times(speedup(row[f"{axis}_to_target_ratio"]))


def _dropped(row: Row) -> str:
    return ", ".join(f"{count:,.0f} {reason.replace('_', ' ')}" for reason, count in row["rows"]["dropped"].items())


#: (section title, what Markdown puts before its labels), or (label, cell).
LINES: tuple[tuple[str, str | Callable[[Row], str]], ...] = (
    ("Held-out accuracy after equal steps (95 % interval over the problems)", "held-out accuracy, "),
    ("sampled", lambda row: f"{as_percent(row['sampled'])} ± {100 * row['sampled_ci']:.1f}"),
    ("greedy", lambda row: f"{as_percent(row['greedy'])} ± {100 * row['greedy_ci']:.1f}"),
    ("Sampled accuracy against the baseline (smoothed curves)", "gain in sampled accuracy "),
    ("at equal prompts", _gain("prompts")),
    ("at equal optimizer steps", _gain("steps")),
    ("at equal CPU time", _gain("cpu_seconds")),
    ("at equal wall-clock", _gain("wall_seconds")),
    (
        "How much sooner the baseline's final sampled accuracy is reached",
        "speed-up to the baseline's accuracy: ",
    ),
    ("in CPU time", _sooner("cpu_seconds")),
    ("in wall-clock", _sooner("wall_seconds")),
    ("in completions generated", _sooner("rows_generated")),
    ("CPU seconds of the run", "CPU time, "),
    ("generation", _share("generation")),
    ("reward", _share("reward")),
    ("log-probs", _share("logprobs")),
    ("training", _share("training")),
    ("other", _share("other")),
    ("in all", _seconds),
    ("step speed-up", lambda row: as_times(row["step_speedup"])),
    ("Work", ""),
    ("completions generated", lambda row: f"{row['rows']['generated']:,.0f}"),
    ("completions trained on", lambda row: f"{row['rows']['trained']:,.0f}"),
    ("dropped, and why", _dropped),
    ("tokens forwarded per real token", lambda row: f"{row['tokens_forwarded_per_real_token']:.2f}"),
    ("tokens forwarded per generated token", lambda row: f"{row['tokens_forwarded_per_generated_token']:.2f}"),
)


def render_table(rows: Mapping[str, Row], width: int = 108) -> str:
    """Return the comparison as text for a terminal: measures down, arms across, long cells wrapped."""
    label = max(len(line[0]) for line in LINES if not isinstance(line[1], str)) + 2
    cell = max(14, (width - label) // len(rows) - 2)

    def block(first: str, cells: list[str]) -> list[str]:
        wrapped = [textwrap.wrap(text, cell) or ["–"] for text in cells]
        height = max(map(len, wrapped))
        return [
            (first if i == 0 else "").ljust(label)
            + "".join("  " + (lines[i] if i < len(lines) else "").rjust(cell) for lines in wrapped)
            for i in range(height)
        ]

    rule = "─" * (label + (cell + 2) * len(rows))
    out = [rule, *block("", [row["title"] for row in rows.values()]), rule]
    for text, cell_of in LINES:
        if isinstance(cell_of, str):
            out += ["", text]
        else:
            out += block("  " + text, [cell_of(row) for row in rows.values()])
    return "\n".join([*out, rule])


def table_cells(rows: Mapping[str, Row]) -> tuple[list[str], list[list[str]]]:
    """Return (header, rows) of the same table, for Markdown."""
    body, prefix = [], ""
    for label, cell in LINES:
        if isinstance(cell, str):
            prefix = cell
        else:
            body.append([prefix + label, *(cell(row) for row in rows.values())])
    return ["", *(row["title"] for row in rows.values())], body
