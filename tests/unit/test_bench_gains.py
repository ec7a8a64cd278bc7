"""The table of compute-equivalent gains: by hand, and what its page says of our results."""

from __future__ import annotations

import json

import pytest

from bench import _gain_tables as gains
from bench._schema import RESULTS, ROOT
from hf_effi.functional.referee import compute_equivalent_gain


def results(name: str) -> list[dict]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["rows"]


def test_gains_and_words_by_hand():
    base = [(1.0, 4.0), (2.0, 2.0)]
    assert gains.one_gain(base, 2.0, 2.0) == 1.0 and gains.one_gain(base, 0.5, 2.0) == pytest.approx(4.0)
    assert (gains.one_gain(base, 1.0, 1.0), gains.one_gain(base, 1.0, 5.0)) == ("beyond", "below")
    assert gains.told([1.0, 2.0, 1.5]) == "1.50 (1.00 to 2.00)" and gains.told([2.0]) == "2.00"
    assert gains.told(["beyond"] * 3) == "beyond"
    assert gains.told([1.0, "beyond", "below"]) == "beyond with 1 of 3 seeds, below with 1 of 3 seeds, else 1.00"


def test_a_method_that_is_the_baseline_has_gain_one_and_one_of_half_the_cost_two(tmp_path):
    """AdamW under another name, and one that is there with half of the updates."""
    losses = {100: 4.0, 200: 2.0, 400: 1.0}
    row = {"part": "budget", "width": 8, "update_seconds": 0.5}
    rows = [
        {**row, "arm": arm, "seed": seed, "updates": updates // divide, "loss": loss}
        for arm, divide in (("adamw", 1), ("same", 1), ("twice", 2))
        for seed in (0, 1)
        for updates, loss in losses.items()
    ]
    folder = tmp_path / "bench" / "results"
    folder.mkdir(parents=True)
    (folder / "optimizers.json").write_text(json.dumps({"rows": rows}))
    table = gains.gains_table(tmp_path)
    one, two = "1.00 (1.00 to 1.00)", "2.00 (2.00 to 2.00)"
    assert table.count(f"25%: {one}; 50%: {one}; 100%: {one}") == 2  # in tokens and in seconds
    assert table.count(f"25%: {two}; 50%: {two}; 100%: {two}") == 2
    assert len(table.splitlines()) == 2 + 4  # other results are not there


def test_the_page_lists_every_result_that_has_a_curve():
    table = gains.gains_table(ROOT)
    for name in ("optimizers", "schedules", "demo", "grpo_selection", "grpo_second_task", "real_model"):
        assert f"`{name}`" in table


def gains_of_demo(arm: str, key: str) -> list[float]:
    rows = results("demo")
    found = []
    for row in (row for row in rows if row["arm"] == arm):
        stock = next(other for other in rows if other["arm"] == "stock" and other["seed"] == row["seed"])
        base = [(p[key], 1 - p["sampled"]) for p in stock["curve"] if p[key]]
        point = next(p for p in row["curve"] if p["step"] == row["steps"] // 2)
        found.append(compute_equivalent_gain(base, point[key], 1 - point["sampled"]))
    return found


def test_savings_that_compute_the_same_gain_seconds_and_no_completions():
    assert gains_of_demo("exact", "rows_generated") == pytest.approx([1.0] * 5, abs=0.05)
    assert min(gains_of_demo("exact", "cpu_seconds")) > 1.5


def test_a_random_control_has_a_gain_too():
    assert min(gains_of_demo("random", "cpu_seconds")) > 1.5
    assert max(gains_of_demo("random", "rows_generated")) < 1.05


def test_a_gain_belongs_to_its_task_and_to_its_place_on_the_curve():
    def gain(name: str, share: float) -> float | str:
        arms = {row["arm"]: row["curve"] for row in results(name) if row.get("part") == "arm"}
        base = [(float(i), 1 - value) for i, value in enumerate(arms["trl"]) if i]
        place = round(share * (len(arms["trl"]) - 1))
        return gains.one_gain(base, float(place), 1 - arms["filter_cppo"][place])

    assert gain("grpo_selection", 0.5) != gain("grpo_second_task", 0.5)
    assert gain("grpo_selection", 0.25) == "beyond" and isinstance(gain("grpo_second_task", 0.25), float)
    assert gain("grpo_second_task", 0.25) != gain("grpo_second_task", 0.5)
