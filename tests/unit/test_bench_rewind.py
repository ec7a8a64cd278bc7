"""The bench of rewinds runs on a tiny model, and its figures follow from its rows."""

from __future__ import annotations

import json
from pathlib import Path

from bench import rewind


def test_the_smoke_run_writes_a_whole_result(tmp_path: Path) -> None:
    result = json.loads(rewind.main(["--smoke"], tmp_path).read_text())
    values = {figure["name"]: figure for figure in result["headline"]}
    assert values["rescued_minus_never_saw_loss"]["value"] == 0.0 and values["rescued_minus_never_saw_loss"]["met"]
    assert values["stock_runs_that_end_in_nan"]["value"] == 1.0
    (cost,) = [row for row in result["rows"] if row["part"] == "cost"]
    assert 12 * cost["parameters"] <= cost["mib"] * 2**20 < 13 * cost["parameters"]


def test_the_headline_is_a_median_over_seeds() -> None:
    rows = [
        {
            "part": "cost", "size": "1M", "take_seconds": 1.0, "update_seconds": 4.0, "restore_seconds": 1.0,
            "disk_load_seconds": load, "disk_save_seconds": 10.0,
        }
        for load in (2.0, 3.0, 40.0)
    ]  # fmt: skip
    rows.append({"part": "rescue", "held_out_losses": {"stock": float("nan"), "rewind": 1.5, "never saw them": 1.0}})
    values = {figure["name"]: (figure["value"], figure["met"]) for figure in rewind.figures(rows)}
    assert values["disk_over_memory_restore_1M"] == (3.0, True) and values["memory_over_disk_save_1M"] == (0.1, True)
    assert values["take_over_update_seconds_1M"][0] == 0.25
    assert values["rescued_minus_never_saw_loss"] == (0.5, False) and values["stock_runs_that_end_in_nan"][0] == 1.0
