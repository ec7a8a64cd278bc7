"""One function that draws any set of schedules; the gallery of the docs is made by it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .._compat import require
from .._plots import as_label
from .._text_plot import text_plot
from ..functional.schedules import Schedule
from ..functional.schedules._checks import check_steps


def label_of(schedule: Schedule) -> str:
    """
    Name of a schedule with the arguments that differ from their defaults.

    Example:
    ```python
    >>> from hf_effi.functional.schedules import rex
    >>> label_of(rex(100, kappa=0.9))
    'rex(kappa=0.9)'
    ```
    """
    given = []
    for field in dataclasses.fields(schedule):
        value = getattr(schedule, field.name)
        if (
            field.name not in ("total_steps", "values", "schedule", "schedules", "reference_lr")
            and value != field.default
        ):
            given.append(f"{field.name}={value:g}" if isinstance(value, float) else f"{field.name}={value}")
    return f"{type(schedule).__name__}({', '.join(given)})" if given else type(schedule).__name__


def plot_schedules(
    schedules: Sequence[Schedule] | Mapping[str, Schedule],
    steps: int | None = None,
    path: str | Path | None = None,
    *,
    base_lr: float = 1.0,
    title: str | None = None,
    panels: int | None = None,
) -> Any:
    """
    Draw schedules over the updates of a run.

    Args:
        schedules (`Sequence[Schedule]` or `dict[str, Schedule]`): What to draw; a dict gives the labels.
        steps (`int`, *optional*): Updates shown; the longest length among the schedules if `None`.
        path (`str`, *optional*): File to write (PNG, SVG, PDF).
        base_lr (`float`, *optional*, defaults to 1.0): Scales the vertical axis from multipliers to learning rates.
        title (`str`, *optional*): Title.
        panels (`int`, *optional*): Columns of a grid with one small panel for each schedule; `None` draws all into
            one.

    Returns:
        `matplotlib.figure.Figure`: The figure.

    Raises:
        MissingPackageError: matplotlib is not installed (`pip install 'hf_effi[report]'`).
        ValueError: nothing to draw, or no length.
    """
    require("matplotlib", "plot_schedules")
    import matplotlib.figure as figure_module

    if isinstance(schedules, Schedule) or not isinstance(schedules, (Sequence, Mapping)):
        raise ValueError(f"schedules={schedules!r} is not a list or a dict of schedules. Pass e.g. [wsd(100)].")
    named = (
        dict(schedules)
        if isinstance(schedules, Mapping)
        else {label_of(s) if isinstance(s, Schedule) else str(s): s for s in schedules}
    )
    for name, schedule in named.items():
        if not isinstance(schedule, Schedule):
            raise ValueError(f"{name!r} is {schedule!r}, not a Schedule. Pass a list such as [wsd(100)], or a dict.")
    if steps is not None:
        check_steps("steps", steps, 1)
    if not named:
        raise ValueError("schedules is empty: pass at least one.")
    steps = steps or max((s.last_step or 0 for s in named.values()), default=0)
    if steps < 1:
        raise ValueError("No schedule knows its length: pass steps=....")
    unit = "LR / base LR" if base_lr == 1.0 else "learning rate"

    def draw(axes: Any, schedule: Schedule, **style: Any) -> None:
        end = steps if schedule.last_step is None else min(steps, schedule.last_step)
        shown = range(0, end + 1, max(1, end // 1000))
        axes.plot(list(shown), [base_lr * schedule(t) for t in shown], **style)
        axes.set_xlim(0, steps)
        axes.set_ylim(0, None)
        axes.grid(alpha=0.3)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)

    if panels is None:
        figure = figure_module.Figure(figsize=(9, 4.5), layout="constrained")
        axes = figure.add_subplot()
        styles = ("-", "--", ":", "-.")
        for i, (name, schedule) in enumerate(named.items()):
            draw(axes, schedule, label=as_label(name), linestyle=styles[i // 10 % len(styles)], linewidth=1.8)
        axes.set_xlabel("finished updates")
        axes.set_ylabel(unit)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)
    else:
        rows = -(-len(named) // panels)
        figure = figure_module.Figure(figsize=(2.7 * panels, 1.65 * rows), layout="constrained")
        for i, (name, schedule) in enumerate(named.items()):
            axes = figure.add_subplot(rows, panels, i + 1)
            draw(axes, schedule, color="C0", linewidth=2.2)
            axes.set_title(_wrap(as_label(name, 200), 28), fontsize=9)
            axes.locator_params(nbins=4)
            axes.tick_params(labelsize=9)
        figure.supylabel(unit, fontsize=12)
        figure.supxlabel("finished updates", fontsize=12)
    if title:
        figure.suptitle(as_label(title, 200), fontsize=11)
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
    return figure


def _wrap(name: str, width: int) -> str:
    lines, line = [], ""
    for word in name.split(" "):
        if line and len(line) + len(word) >= width:
            lines.append(line)
            line = ""
        line = f"{line} {word}".strip()
    return "\n".join([*lines, line])


def text_curve(schedule: Schedule, steps: int, width: int = 60, height: int = 8) -> str:
    """
    Draw a schedule with characters, for the command line.

    Example:
    ```python
    >>> from hf_effi.functional.schedules import linear
    >>> print(text_curve(linear(100), 100, width=8, height=2))
    1.00 |****
    0.50 |    ****
    ```
    """
    values = [schedule(min(steps, (i + 0.5) * steps / width)) for i in range(width)]
    return text_plot(values, height, top=max(1.0, max(values)))
