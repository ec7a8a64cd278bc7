"""Tables of the referee over several benches, and of the speed run; `bench.render` writes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench._schema import load_results
from bench._selection_arms import BASELINE, EXACT
from hf_effi.functional.referee import median_cost, performance_profile
from hf_effi.report.result_card import markdown_table

#: result file -> what the table calls its task
TASKS = {"grpo_selection": "chains of sums", "grpo_second_task": "second task"}


def _cell(cost: float | None, ratio: float) -> str:
    return "not reached" if cost is None else f"{cost:.1f} ({ratio:.2f}x)"


def _profile(costs: Mapping[str, list[float | None]], titles: Mapping[str, str], header: list[str]) -> str:
    profile = performance_profile(costs)
    rows = [
        [titles[name]]
        + [_cell(cost, ratio) for cost, ratio in zip(costs[name], profile.ratios[name], strict=True)]
        + [f"{profile.share_within(name, 1.5):.2f}", f"{profile.scores[name]:.3f}"]
        for name in sorted(costs, key=lambda name: -profile.scores[name])
    ]
    return markdown_table([*header, "share within 1.5x", "score"], rows)


def selection_profile(root: Path) -> str:
    """Return the performance profile of whole combinations of RL methods over two tasks."""
    results = load_results(root / "bench" / "results")
    costs: dict[str, list[float | None]] = {}
    titles: dict[str, str] = {}
    for task in TASKS:
        for row in results[task]["rows"]:
            if "ratio_to_baseline" in row and (row["combination"] or row["arm"] in (BASELINE, EXACT)):
                costs.setdefault(row["arm"], []).append(row["to_target"]["cpu_seconds"])
                titles[row["arm"]] = row["title"]
    whole = {name: row for name, row in costs.items() if len(row) == len(TASKS)}
    return _profile(whole, titles, ["setting", *(f"{title}, CPU seconds to target" for title in TASKS.values())])


def speedrun_table(root: Path) -> str:
    """Return one row for each entry of the speed run: median cost on each workload, and its score."""
    rows: list[Mapping[str, Any]] = load_results(root / "bench" / "results")["speedrun"]["rows"]
    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    costs: dict[str, list[float | None]] = {}
    for name in dict.fromkeys(row["entry"] for row in rows):
        costs[name] = [
            median_cost([r["cpu_seconds_to_target"] for r in rows if (r["entry"], r["workload"]) == (name, workload)])
            for workload in workloads
        ]
    titles = {name: f"`{name}`" for name in costs}
    return _profile(costs, titles, ["entry", *(f"`{name}`, CPU seconds" for name in workloads)])


VIEWS = {"selection_profile": selection_profile, "speedrun": speedrun_table}
