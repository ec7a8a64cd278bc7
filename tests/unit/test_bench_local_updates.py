"""The bench of traffic runs on a few updates, and its figures follow from its rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench import local_updates as bench
from bench import local_updates_outer
from bench._schema import write_result
from tests.helpers import run_distributed


def quick(folder: str) -> list[dict[str, Any]]:
    return bench.measure(bench.QUICK, folder)


def test_the_quick_run_makes_a_whole_result(tmp_path: Path) -> None:
    rows, other = run_distributed(quick, 2, str(tmp_path))
    by = {row["arm"]: row for row in rows}
    whole = 4 * by["ddp"]["parameters"]
    assert by["ddp"]["bytes"] == 6 * whole and by["ddp"]["collectives"] == 6
    assert by["local 2"]["bytes"] == 3 * whole and by["local 3"]["bytes"] == 2 * whole
    assert by["fp16"]["bytes"] == 3 * whole
    assert by["powersgd"]["bytes"] < 3.5 * whole  # two whole gradients, then four of rank 4
    assert 3 * 1.5 * whole < by["qsdp w8g8"]["bytes"] < 3 * 1.6 * whole, "gradients once, weights twice"
    assert by["qsdp g4"]["bytes"] < 0.8 * whole
    assert by["l-greco"]["bytes"] < whole + 5 / 6 * by["qsdp g4"]["bytes"] * 1.05
    assert [row["held_out_loss"] for row in rows] == [row["held_out_loss"] for row in other], "the same weights"
    assert abs(by["qsdp w8g8"]["held_out_loss"] - by["ddp"]["held_out_loss"]) < 1e-2
    found = bench.figures(rows)
    path = write_result("local_updates", command="test", seeds=(0,), headline=found, rows=rows, folder=tmp_path)
    values = {figure["name"]: figure["value"] for figure in json.loads(path.read_text())["headline"]}
    assert values["local_2_bytes_over_ddp"] == 0.5 and values["ddp_seed_sd"] is None


def test_seconds_to_a_loss() -> None:
    curve = [[50, 1.0, 3.0], [100, 2.0, 2.5], [150, 3.0, 2.6]]
    assert bench.seconds_to(curve, 2.5) == 2.0 and bench.seconds_to(curve, 2.4) is None


def test_the_quick_run_of_the_outer_steps(tmp_path: Path) -> None:
    result = json.loads(local_updates_outer.main(["--quick"], tmp_path).read_text())
    losses = {row["arm"]: row["held_out_loss"] for row in result["rows"]}
    assert set(losses) == {"ddp", "diloco 2", "mean 2"} and max(losses.values()) < 6
    (diloco, mean) = result["headline"]
    assert mean["value"] == round(losses["mean 2"] / losses["ddp"] - 1, 5) and diloco["goal"] == "<= 0.02"
