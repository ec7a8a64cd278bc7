"""The report page: one self-contained HTML file, made from a result file and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from .._compat import require
from .._files import save_text
from .._plots import draw_curves, draw_stacked_bars
from .comparison import mean_curve, summarize

TEMPLATE = "report.html.jinja"


def as_percent(value: float | None) -> str:
    """
    Return a fraction in per cent, a dash for `None`.

    Example:
    ```python
    >>> as_percent(0.4375), as_percent(None)
    ('43.8 %', '–')
    ```
    """
    return "–" if value is None else f"{100 * value:.1f} %"


def as_points(value: float | None) -> str:
    """
    Return a difference of two fractions in percentage points, with its sign.

    Example:
    ```python
    >>> as_points(0.1124), as_points(-0.005), as_points(0.0)
    ('+11.2 pts', '-0.5 pts', '+0.0 pts')
    ```
    """
    return "–" if value is None else f"{100 * value + 0.0:+.1f} pts"


def as_times(value: float | None, digits: int = 2) -> str:
    """Return a ratio such as `1.72x`; `not reached` for `None`."""
    return "not reached" if value is None else f"{value:.{digits}f}x"


def speedup(ratio: float | None) -> float | None:
    """Return the inverse of a time ratio; `None` stays `None`."""
    return None if not ratio else 1 / ratio


def figures(result: Mapping[str, Any]) -> dict[str, str]:
    """Return the page's figures by name, as inline SVG, from the rows of a result."""
    rows = summarize(result["rows"])
    titles = {arm: row["title"] for arm, row in rows.items()}
    curves = {titles[arm]: mean_curve(result["rows"], arm) for arm in rows}
    return {
        "steps": draw_curves(curves, "step", "optimizer steps", "sampled", "a"),
        "cpu": draw_curves(curves, "cpu_seconds", "CPU seconds of one thread", "sampled", "b"),
        "split": draw_stacked_bars(
            {titles[arm]: row["cpu_seconds"] for arm, row in rows.items()}, "CPU seconds of the run", "c"
        ),
        "rows": draw_stacked_bars(
            {
                titles[arm]: {"trained": row["rows"]["trained"], **_dropped_words(row["rows"]["dropped"])}
                for arm, row in rows.items()
            },
            "completions generated in the run",
            "d",
            "{:,.0f}",
        ),
        "tokens": draw_stacked_bars(
            {
                titles[arm]: {"tokens forwarded for one real token": row["tokens_forwarded_per_real_token"]}
                for arm, row in rows.items()
            },
            "1.0 = no padding is forwarded",
            "e",
            "{:.2f}",
        ),
    }


def _dropped_words(dropped: Mapping[str, float]) -> dict[str, float]:
    return {f"dropped: {reason.replace('_', ' ')}": rows for reason, rows in dropped.items()}


def environment() -> Any:
    """
    Return the template environment of the pages.

    Raises:
        MissingPackageError: jinja2 is missing; the message names the extra.
    """
    jinja2 = require("jinja2", "writing the report page")
    folder = resources.files("hf_effi.report").joinpath("templates")
    loader = jinja2.FunctionLoader(lambda name: folder.joinpath(name).read_text(encoding="utf-8"))
    made = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, loader=loader)
    made.filters |= {"percent": as_percent, "points": as_points, "times": as_times, "speedup": speedup}
    return made


def render_page(result: Mapping[str, Any]) -> str:
    """
    Return the page for a demo result: the schema of `hf_effi.report.result_record`, rows as the demo writes them.

    Raises:
        MissingPackageError: matplotlib or jinja2 is missing; the message names the extra.
    """
    template = environment().get_template(TEMPLATE)
    rows = result["rows"]
    return template.render(
        result=result,
        settings=rows[0]["settings"],
        arms=summarize(rows),
        options={row["arm"]: row["options"] for row in rows},
        svg=figures(result),
    )


def write_page(result: Mapping[str, Any], path: Path) -> Path:
    """Write [`render_page`] to `path` and return it."""
    save_text(path, render_page(result))
    return path
