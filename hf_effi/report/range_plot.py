"""The picture of a learning-rate range test."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from .._compat import require
from .._files import save_bytes
from ..schedules.range_test import RangeTest


def plot_range_test(test: RangeTest, file: str | Path | None = None) -> Any:
    """
    Draw the loss of each repeat over the learning rate, on a log axis: as measured, smoothed, and the range found.

    Args:
        test ([`RangeTest`]): What [`lr_range_test`] returned.
        file (`str` or `Path`, *optional*): File to write (PNG, SVG, PDF).

    Returns:
        `matplotlib.figure.Figure`: The figure.

    Raises:
        MissingPackageError: matplotlib is not installed (`pip install 'hf_effi[report]'`).
        ValueError: `test` is no [`RangeTest`], or it saw no finite loss.

    Example:
    ```python
    plot_range_test(lr_range_test(trainer), "range.png")
    ```
    """
    require("matplotlib", "plot_range_test")
    import matplotlib.figure as figure_module

    if not isinstance(test, RangeTest):
        raise ValueError(f"test is {type(test).__name__}, not a RangeTest. Pass what lr_range_test returned.")
    curves = [curve for curve in test.curves if curve]
    if not curves:
        raise ValueError("The test saw no finite loss, so there is nothing to draw. Look for NaN in the data.")
    figure = figure_module.Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for number, curve in enumerate(curves):
        rates, losses, smooth = zip(*curve, strict=True)
        axes.plot(rates, losses, ".", color=f"C{number}", alpha=0.3, markersize=4)
        axes.plot(rates, smooth, color=f"C{number}", linewidth=1.8, label=f"sweep {number + 1}, smoothed")
    if test.low is not None and test.high is not None:
        label = f"{test.low:.2g} to {test.high:.2g} (confidence {test.confidence})"
        axes.axvspan(test.low, test.high * 1.001, color="0.5", alpha=0.2, label=label)
    # A sweep ends far above where it was; what matters lies below.
    start, lowest = curves[0][0][2], min(point[2] for curve in curves for point in curve)
    axes.set_ylim(lowest - 0.1 * abs(start - lowest) - 1e-9, start + 0.6 * abs(start - lowest) + 1e-9)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("training loss")
    axes.grid(alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    if file is not None:
        content = io.BytesIO()
        figure.savefig(content, dpi=130, format=Path(file).suffix.lstrip(".") or "png")
        save_bytes(file, content.getvalue())
    return figure
