"""The pictures of what `CausesCallback` read: gradients, kurtosis and weight norms, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .._plots import MAX_SERIES, draw_lines
from ..functional import metrics
from .run_data import Point, mean_and_band, names_of, series

Groups = Mapping[str, Sequence[dict[str, Any]]]
#: what the names of the log begin with -> caption, vertical axis, salt, whether the axis begins at 0
_PICTURES = {
    metrics.CAUSE_LAYER_GRADIENT: ("Gradient norm, before clipping", "norm of the gradient", "causegrad", True),
    metrics.CAUSE_KURTOSIS: ("Excess kurtosis of hidden states", "mean over tokens", "causekurt", False),
    metrics.CAUSE_WEIGHT_NORM: ("Weight norm over that at the start", "|W| / |W at the start|", "causeweight", False),
}


def cause_curves(groups: Groups) -> dict[str, str]:
    """
    Return caption -> inline SVG, for what the runs have: a line for each layer of one setting, eight at most; for
    several settings a line each, of the layer with the largest value.

    Args:
        groups (`Mapping`): Title -> runs of one setting; several are seeds, and get a mean with its 95 % band.
    """
    found = {}
    for prefix, (caption, axis, salt, from_zero) in _PICTURES.items():
        lines, what = _lines(groups, prefix)
        if lines:
            svg = draw_lines(lines, "optimizer steps", axis, salt, from_zero=from_zero, name_one=True)
            found[f"{caption}, {what}"] = svg
    return found


def _lines(groups: Groups, prefix: str) -> tuple[dict[str, list[Point]], str]:
    if len(groups) > 1:
        largest = {title: mean_and_band([_largest(run, prefix) for run in runs]) for title, runs in groups.items()}
        return {title: curve for title, curve in largest.items() if curve}, "of the layer with the largest"
    runs = next(iter(groups.values()))
    names = names_of(runs, prefix)
    shown = evenly(names, MAX_SERIES)
    curves = {_title(name.removeprefix(prefix)): mean_and_band([series(run, name) for run in runs]) for name in shown}
    curves = {title: curve for title, curve in curves.items() if curve}
    return curves, "by layer" if len(shown) == len(names) else f"{len(shown)} of {len(names)} layers"


def _title(layer: str) -> str:
    return f"layer {layer}" if layer.isdigit() else layer


def _largest(run: dict[str, Any], prefix: str) -> dict[float, float]:
    found: dict[float, float] = {}
    for name in names_of([run], prefix):
        for step, value in series(run, name).items():
            found[step] = max(value, found.get(step, value))
    return found


def evenly(names: Sequence[str], most: int) -> list[str]:
    """
    Return at most so many of the names, the first and the last among them.

    Example:
    ```python
    >>> evenly(["0", "1", "2", "3", "4"], 3), evenly(["0", "1"], 3)
    (['0', '2', '4'], ['0', '1'])
    ```
    """
    if len(names) <= most:
        return list(names)
    return [names[round(place * (len(names) - 1) / (most - 1))] for place in range(most)]
