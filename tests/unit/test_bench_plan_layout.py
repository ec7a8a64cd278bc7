"""The bench of the layout planner: its order, its two unknowns, its six layouts."""

from __future__ import annotations

import pytest

from bench import plan_layout as bench
from hf_effi.functional.layout_plan import Space, why_not
from hf_effi.functional.layout_time import Machine


def test_kendalls_tau():
    assert bench.kendall_tau([1, 2, 3, 4], [10, 20, 30, 40]) == 1
    assert bench.kendall_tau([1, 2, 3], [3, 2, 1]) == -1
    assert bench.kendall_tau([1, 2, 3], [1, 3, 2]) == pytest.approx(1 / 3)
    assert bench.kendall_tau([1, 1], [1, 2]) == 0
    for first, second in (([1], [1]), ([1, 2], [1])):
        with pytest.raises(ValueError, match="tau needs"):
            bench.kendall_tau(first, second)


def test_two_unknowns_of_two_rows():
    per_flop, per_layer = bench._two_unknowns((100.0, 3, 100 * 2e-3 + 3 * 0.5), (400.0, 6, 400 * 2e-3 + 6 * 0.5))
    assert (per_flop, per_layer) == pytest.approx((2e-3, 0.5))
    assert bench._two_unknowns((100.0, 3, 0.1), (400.0, 6, 0.5))[1] == 0  # no negative time
    with pytest.raises(ValueError, match="no speed"):
        bench._two_unknowns((100.0, 3, 1.0), (100.0, 3, 1.0))


def test_the_slower_rank_counts_and_the_first_update_does_not():
    first, second = [(0.0, 0.0), (1.0, 5.0), (2.0, 4.0)], [(0.0, 0.0), (3.0, 1.0), (1.0, 6.0)]
    assert bench.slower_rank([first, second]) == (2.0, 5.0)


def test_six_layouts_that_can_run_and_figures():
    layouts = bench.six_layouts(8)
    space = Space(bench.RANKS, 8, sequence_sizes=(1, 2))
    assert len({layout.name for layout in layouts}) == 6 and all(why_not(layout, space) is None for layout in layouts)
    said = bench.predicted(bench.QUICK, Machine(overlap=0.0))
    assert list(said) == [layout.name for layout in bench.six_layouts(bench.QUICK.rows)]
    rows = [
        {"part": "layout", "predicted": value, "cpu_seconds": 2 * value, "wall_seconds": -value}
        for value in range(1, 7)
    ]
    found = {one["name"]: one["value"] for one in bench.figures(rows)}
    assert found["layout_kendall_tau"] == 1 and found["layout_kendall_tau_wall_clock"] == -1
    assert found["layout_median_relative_error"] == 0.5
