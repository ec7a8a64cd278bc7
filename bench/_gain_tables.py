"""The table of `docs/post_training_gains.md`: what our benches measured, as compute-equivalent gains."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_effi.functional.referee import Point, compute_equivalent_gain
from hf_effi.report.result_card import markdown_table

Row = tuple[str, str, str, str]
#: rows of `bench.grpo_selection` and `bench.grpo_second_task` that are shown: sums of methods, each with its control
_SUMS = ("exact", "recommended", "random_recommended", "filter_cppo", "speed_cppo", "random_speed_cppo")
#: shares of the compute of a method's own run at which it is read where it has a curve
_SHARES = (0.25, 0.5, 1.0)


def gains_table(root: Path) -> str:
    """Return one row per bench, method and unit; a result that is not there has no row."""
    rows: list[Row] = []
    for name, read in (
        ("optimizers", _optimizers),
        ("schedules", _schedules),
        ("demo", _demo),
        ("grpo_selection", _selection),
        ("grpo_second_task", _selection),
        ("real_model", _real_model),
    ):
        path = root / "bench" / "results" / f"{name}.json"
        if path.exists():
            rows += [(f"`{name}`", *row) for row in read(json.loads(path.read_text(encoding="utf-8"))["rows"])]
    header = ["bench", "method", "compute in", "gain, by the share of the method's compute at which it is read"]
    return markdown_table(header, [list(row) for row in rows], numbers=False)


def one_gain(base: Sequence[Point], compute: float, loss: float) -> float | str:
    """
    Return the compute-equivalent gain at a point, or why there is none: `"beyond"` the best point of the baseline, or
    `"below"` its cheapest one.
    """
    found = compute_equivalent_gain(base, compute, loss)
    if found is not None:
        return found
    return "beyond" if loss < min(value for _, value in base) else "below"


def told(found: Sequence[float | str]) -> str:
    """
    Return the gains of the seeds in words: the median and the range, where each seed has one.

    Example:
    ```python
    >>> told([1.0, 2.0, 1.5]), told([2.0]), told([1.0, "beyond", "beyond"])
    ('1.50 (1.00 to 2.00)', '2.00', 'beyond with 2 of 3 seeds, else 1.00')
    ```
    """
    numbers = [value for value in found if not isinstance(value, str)]
    words = [value for value in found if isinstance(value, str)]
    if not words:
        middle = f"{statistics.median(numbers):.2f}"
        return middle if len(numbers) == 1 else f"{middle} ({min(numbers):.2f} to {max(numbers):.2f})"
    kinds = ", ".join(
        word if len(found) == words.count(word) else f"{word} with {words.count(word)} of {len(found)} seeds"
        for word in dict.fromkeys(words)
    )
    return f"{kinds}, else {', '.join(f'{value:.2f}' for value in numbers)}" if numbers else kinds


def _readings(readings: Mapping[str, Sequence[float | str]]) -> str:
    return "; ".join(f"{share}: {told(found)}" for share, found in readings.items())


def _optimizers(rows: Sequence[Mapping[str, Any]]) -> Iterable[tuple[str, str, str]]:
    """AdamW at its budgets, each with a decay of its own, against each optimizer at the same ones; several widths."""
    runs = [row for row in rows if row.get("part") == "budget"]
    widths = list(dict.fromkeys(row["width"] for row in runs))
    for arm in [arm for arm in dict.fromkeys(row["arm"] for row in runs) if arm != "adamw"]:
        for unit, cost in (("tokens", _updates), ("seconds of updates", _update_seconds)):
            said = [f"width {w}, {_readings(_of_optimizer(_of(runs, width=w), arm, cost))}" for w in widths]
            yield f"{arm}, over AdamW", unit, "; ".join(said)


def _of_optimizer(
    runs: Sequence[Mapping[str, Any]], arm: str, cost: Callable[[Mapping[str, Any]], float]
) -> dict[str, list[float | str]]:
    readings: dict[str, list[float | str]] = {}
    for seed in sorted({row["seed"] for row in runs}):
        base = [(cost(row), row["loss"]) for row in _of(runs, seed=seed, arm="adamw")]
        mine = sorted(_of(runs, seed=seed, arm=arm), key=_updates)
        for row in mine:
            share = f"{row['updates'] / mine[-1]['updates']:.0%}"
            readings.setdefault(share, []).append(one_gain(base, cost(row), row["loss"]))
    return readings


def _updates(row: Mapping[str, Any]) -> float:
    return float(row["updates"])


def _update_seconds(row: Mapping[str, Any]) -> float:
    return float(row["updates"] * row["update_seconds"])


def _of(rows: Sequence[Mapping[str, Any]], **values: Any) -> list[Mapping[str, Any]]:
    return [row for row in rows if all(row.get(name) == value for name, value in values.items())]


def _schedules(rows: Sequence[Mapping[str, Any]]) -> Iterable[tuple[str, str, str]]:
    """Branches of one constant run against a cosine run for each budget, each with its tuned rate."""
    runs = [row for row in rows if row.get("stage") == "branch"]
    for warmup in dict.fromkeys(row["warmup_steps"] for row in runs):
        readings: dict[str, list[float | str]] = {}
        for seed in sorted({row["seed"] for row in runs}):
            mine = _of(runs, warmup_steps=warmup, seed=seed)
            base = [(float(row["end"]), row["cosine_loss"]) for row in mine]
            for row in mine:
                share = f"{row['end'] / max(other['end'] for other in mine):.0%}"
                readings.setdefault(share, []).append(one_gain(base, float(row["end"]), row["loss"]))
        yield f"WSD branches, warm-up of {warmup} updates, over a cosine for each end", "tokens", _readings(readings)


def _demo(rows: Sequence[Mapping[str, Any]]) -> Iterable[tuple[str, str, str]]:
    for arm in [arm for arm in dict.fromkeys(row["arm"] for row in rows) if arm != "stock"]:
        mine = _of(rows, arm=arm)
        for unit, key in (("CPU seconds", "cpu_seconds"), ("completions", "rows_generated")):
            readings: dict[str, list[float | str]] = {}
            for row in mine:
                stock = _of(rows, arm="stock", seed=row["seed"])[0]
                base = [(p[key], 1 - p["sampled"]) for p in stock["curve"] if p[key]]
                curve = [p for p in row["curve"] if p["step"] <= row["steps"]]
                for share in _SHARES:
                    point = min(curve, key=lambda p: abs(p["step"] - share * row["steps"]))
                    readings.setdefault(f"{share:.0%}", []).append(one_gain(base, point[key], 1 - point["sampled"]))
            yield f"{mine[0]['title']}, over TRL's", unit, _readings(readings)


def _selection(rows: Sequence[Mapping[str, Any]]) -> Iterable[tuple[str, str, str]]:
    """Mean curves of three seeds at even CPU times, the first of them 0."""
    arms = {row["arm"]: row for row in rows if row.get("part") == "arm"}
    base = [(float(i), 1 - value) for i, value in enumerate(arms["trl"]["curve"]) if i]
    for arm in (arm for arm in _SUMS if arm in arms):
        curve = arms[arm]["curve"]
        places = {f"{share:.0%}": round(share * (len(curve) - 1)) for share in _SHARES}
        found = {share: [one_gain(base, float(i), 1 - curve[i])] for share, i in places.items()}
        control = "control: " * arm.startswith("random_")
        yield f"{control}{arms[arm]['title']}, over TRL's, mean of 3 seeds", "CPU seconds", _readings(found)


def _real_model(rows: Sequence[Mapping[str, Any]]) -> Iterable[tuple[str, str, str]]:
    arms = {row["arm"]: row for row in rows if row.get("part") == "arm"}
    base = [(p["cpu_seconds"], 1 - p["accuracy"]) for p in arms["trl"]["curve"] if p["steps"]]
    for arm in (arm for arm in arms if arm != "trl"):
        curve = arms[arm]["curve"]
        points = {f"{share:.0%}": curve[round(share * (len(curve) - 1))] for share in _SHARES}
        found = {share: [one_gain(base, p["cpu_seconds"], 1 - p["accuracy"])] for share, p in points.items()}
        yield f"{arms[arm]['title']}, over TRL's, one seed", "CPU seconds", _readings(found)
