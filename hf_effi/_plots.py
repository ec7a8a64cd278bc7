"""Figures: inline SVG whose colours follow the page (light, dark, any width), and PNG on paper of its own."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ._compat import require

#: Colour name -> stand-in that matplotlib draws with; the SVG then refers to the page's CSS variable `--<name>`.
_STAND_INS = {
    "ink": "#010203",
    "muted": "#040506",
    "line": "#070809",
    "series-0": "#0a0b0c",
    "series-1": "#0d0e0f",
    "series-2": "#101112",
    "series-3": "#131415",
    "series-4": "#161718",
    "series-5": "#191a1b",
    "series-6": "#1c1d1e",
    "series-7": "#1f2021",
}
#: The same names for a picture that stands alone: opaque paper is readable on a light and on a dark page.
_ON_PAPER = {"paper": "#ffffff", "ink": "#1b2330", "muted": "#5a6575", "line": "#c9d0da", "series-1": "#1769c2"}
MAX_SERIES = 8
#: Lines are told apart without colour too.
_DASHES = ("solid", (0, (6, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (3, 1)), (0, (9, 3)))
_UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


def short_number(value: float, position: int | None = None) -> str:
    """
    Return a number for an axis: no common factor above the plot, thousands as a letter.

    Example:
    ```python
    >>> short_number(8e-05), short_number(0.25), short_number(2500), short_number(-3e6)
    ('8e-05', '0.25', '2.5k', '-3M')
    ```
    """
    size, unit = next(((size, unit) for size, unit in _UNITS if abs(value) >= size), (1, ""))
    return f"{value / size:g}{unit}"


def as_label(name: object, limit: int = 60) -> str:
    """
    Return a name as text that is drawn as it is: no formula between two `$`, not left out of a legend, on one line.

    Example:
    ```python
    >>> as_label("a$b$c"), as_label("_seed 0"), as_label("x" * 100, 10)
    ('a\\\\$b\\\\$c', ' _seed 0', 'xxxxxxx...')
    ```
    """
    text = " ".join("".join(c if c.isprintable() else " " for c in str(name)).split())
    text = text if len(text) <= limit else f"{text[: limit - 3]}..."
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def _figure(width: float, height: float, colours: Mapping[str, str] = _STAND_INS) -> tuple[Any, Any]:
    require("matplotlib", "Drawing a plot")
    from matplotlib.figure import Figure

    paper = colours.get("paper", "none")
    figure = Figure(figsize=(width, height), layout="constrained", facecolor=paper)
    axes = figure.add_subplot(facecolor=paper)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(colours["line"])
    formatter: Any = short_number  # annotated there without the `None` that a position may be
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(formatter)
    axes.tick_params(colors=colours["muted"], labelsize=9, length=3)
    axes.xaxis.label.set_color(colours["muted"])
    axes.yaxis.label.set_color(colours["muted"])
    return figure, axes


def _to_svg(figure: Any, description: str, salt: str) -> str:
    import matplotlib

    buffer = io.StringIO()
    # Text stays text (small, selectable, in the page's font); the salt keeps ids of several figures on a page apart.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"\s(width|height)=\"[\d.]+pt\"", "", svg, count=2)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    # Ids are one name space for the whole page: keep those that something refers to, and tell the figures apart.
    used = set(re.findall(r'(?:url\(#|href="#)(\w+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda found: f' id="{salt}-{found[1]}"' if found[1] in used else "", svg)
    svg = re.sub(r'(url\(#|href="#)(\w+)', rf"\1{salt}-\2", svg)
    for name, colour in _STAND_INS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{description}" ', 1)


def draw_picture(x: Sequence[float], y: Sequence[float], x_label: str, y_label: str) -> bytes:
    """Return one line from zero upwards as a small PNG on white paper; equal values give equal bytes."""
    figure, axes = _figure(6.0, 2.2, _ON_PAPER)
    axes.plot(x, y, color=_ON_PAPER["series-1"], linewidth=1.8)
    axes.set_xlabel(x_label, fontsize=9)
    axes.set_ylabel(y_label, fontsize=9)
    axes.set_xlim(x[0], x[-1])
    axes.set_ylim(0, 1.08 * max(y) or 1.0)
    axes.grid(axis="y", color=_ON_PAPER["line"], linewidth=0.5, alpha=0.5)
    axes.yaxis.offsetText.set_color(_ON_PAPER["muted"])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


def draw_curves(
    curves: Mapping[str, Sequence[Mapping[str, float]]], axis: str, axis_label: str, measure: str, salt: str
) -> str:
    """
    Draw one line per series with its 95 % band.

    Args:
        curves (`Mapping`): Title -> points; a point has `axis`, `measure` and `<measure>_ci` (fractions of 1).

    Returns:
        `str`: An `<svg>` element.
    """
    lines = {
        title: [(point[axis], 100 * point[measure], 100 * point[f"{measure}_ci"]) for point in points]
        for title, points in curves.items()
    }
    return draw_lines(lines, axis_label, f"{measure} accuracy, %", salt, legend="lower right")


def draw_lines(
    lines: Mapping[str, Sequence[tuple[float, float, float]]],
    x_label: str,
    y_label: str,
    salt: str,
    *,
    legend: str = "best",
    phases: Sequence[tuple[float, float, str]] = (),
    from_zero: bool = False,
    name_one: bool = False,
) -> str:
    """
    Draw one line per title, with its band where there is one.

    Args:
        lines (`Mapping`): Title -> (x, y, half width of the band).
        phases (`Sequence`, *optional*): (from, to, name) along x, written above alternating ground.
        from_zero (`bool`, *optional*): Begin the vertical axis at 0, for what is compared by its size.
        name_one (`bool`, *optional*): Name a single line too.

    Returns:
        `str`: An `<svg>` element.
    """
    figure, axes = _figure(5.0, 3.3)
    for number, (start, end, name) in enumerate(phases):
        axes.axvspan(start, end, color=_STAND_INS["line"], alpha=0.28 if number % 2 else 0.1, linewidth=0)
        axes.text(
            (start + end) / 2,
            1.01,
            name,
            transform=axes.get_xaxis_transform(),
            ha="center",
            va="bottom",
            fontsize=8,
            color=_STAND_INS["muted"],
        )
    for index, (title, points) in enumerate(lines.items()):
        colour = _STAND_INS[f"series-{(index + (len(lines) == 1)) % MAX_SERIES}"]
        x, y, half = zip(*points, strict=True)
        if any(half):
            low = [a - b for a, b in zip(y, half, strict=True)]
            high = [a + b for a, b in zip(y, half, strict=True)]
            axes.fill_between(x, low, high, color=colour, alpha=0.09, linewidth=0)
        marker = {"marker": "o", "markersize": 4} if len(points) == 1 else {}
        style = _DASHES[index % len(_DASHES)]
        axes.plot(x, y, color=colour, linewidth=1.8, linestyle=style, label=as_label(title), **marker)
    axes.set_xlabel(x_label, fontsize=9)
    axes.set_ylabel(y_label, fontsize=9)
    axes.set_xlim(left=0)
    if from_zero:
        top = max(value + half for points in lines.values() for _, value, half in points)
        axes.set_ylim(0, 1.08 * top or 1.0)
    axes.grid(axis="y", color=_STAND_INS["line"], linewidth=0.5, alpha=0.5)
    if len(lines) > 1 or name_one:
        axes.legend(frameon=False, fontsize=8.5, labelcolor=_STAND_INS["ink"], loc=legend, handlelength=2.6)
    return _to_svg(figure, f"{y_label} against {x_label}", salt)


def draw_stacked_areas(
    parts: Mapping[str, Sequence[float]], x: Sequence[float], x_label: str, y_label: str, salt: str
) -> str:
    """Draw parts of a whole over x, one on the other, as steps: a part that is 0 leaves no slope."""
    figure, axes = _figure(5.0, 3.3)
    below = [0.0] * len(x)
    for index, (name, values) in enumerate(parts.items()):
        above = [a + b for a, b in zip(below, values, strict=True)]
        colour = _STAND_INS[f"series-{(index + 1) % MAX_SERIES}"]
        axes.fill_between(x, below, above, step="mid", color=colour, alpha=0.85, linewidth=0, label=as_label(name))
        below = above
    axes.set_xlabel(x_label, fontsize=9)
    axes.set_ylabel(y_label, fontsize=9)
    axes.set_ylim(bottom=0)
    _legend_above(figure)
    return _to_svg(figure, f"{y_label} against {x_label}, stacked", salt)


def _legend_above(figure: Any) -> None:
    figure.legend(
        loc="outside upper left",
        ncols=3,
        frameon=False,
        fontsize=8.5,
        labelcolor=_STAND_INS["ink"],
        handlelength=1.0,
        columnspacing=1.2,
    )


def draw_stacked_bars(
    bars: Mapping[str, Mapping[str, float]],
    axis_label: str,
    salt: str,
    number_format: str = "{:.0f}",
    *,
    name_one: bool = False,
) -> str:
    """
    Draw one horizontal bar per row, split into parts, with the parts named in a legend and the totals at the ends.

    Args:
        bars (`Mapping`): Row title -> part name -> size. All rows are drawn in the order of the first.
        name_one (`bool`, *optional*): Name a single row too.
    """
    figure, axes = _figure(5.0, 0.62 + 0.52 * len(bars) + 0.35)
    parts = list(dict.fromkeys(name for row in bars.values() for name in row))
    titles = list(bars)
    left = [0.0] * len(titles)
    for index, part in enumerate(parts):
        sizes = [bars[title].get(part, 0.0) for title in titles]
        # The first part is what one wants to see shrink or stay; it gets the strongest colour, not the baseline's
        # grey.
        colour = _STAND_INS[f"series-{(index + 1) % MAX_SERIES}"]
        axes.barh(range(len(titles)), sizes, left=left, height=0.55, color=colour, label=as_label(part))
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    for row, total in enumerate(left):
        axes.annotate(
            number_format.format(total),
            (total, row),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=_STAND_INS["ink"],
        )
    # Titles sit above their bars: beside them they would take half of a phone's width.
    for row, title in enumerate(titles if len(titles) > 1 or name_one else []):
        axes.text(0, row - 0.34, as_label(title), va="bottom", ha="left", fontsize=8.5, color=_STAND_INS["ink"])
    axes.set_yticks([])
    axes.set_ylim(len(titles) - 0.5, -0.75)
    axes.set_xlim(0, 1.15 * max([*left, 1e-9]))
    axes.set_xlabel(axis_label, fontsize=9)
    _legend_above(figure)
    return _to_svg(figure, f"stacked bars: {axis_label}", salt)
