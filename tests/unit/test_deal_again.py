"""Rows of a generation dealt to another number of ranks, by hand-computed places."""

from __future__ import annotations

import pytest

from hf_effi.functional.rollouts import GenerationLayout, deal_again, first_difference, micro_step_in


def layout(world: int, rows: int, chunks: int, steps: int, **over: int) -> GenerationLayout:
    over = {"num_generations": 2, **over}
    return GenerationLayout(rows, steps_per_generation=chunks, accumulation_steps=steps, world_size=world, **over)


def test_each_update_keeps_its_rows() -> None:
    before, now = layout(2, 1, 4, 2), layout(1, 2, 4, 2)  # two updates per generation, of 4 rows each
    hands = deal_again([[1] * 4, [1] * 4], before, now)
    assert hands == [[[(0, 0, 0), (1, 0, 0)], [(0, 1, 0), (1, 1, 0)], [(0, 2, 0), (1, 2, 0)], [(0, 3, 0), (1, 3, 0)]]]
    back = deal_again([[2] * 4], now, before)
    assert back == [
        [[(0, 0, 0)], [(0, 1, 0)], [(0, 2, 0)], [(0, 3, 0)]],
        [[(0, 0, 1)], [(0, 1, 1)], [(0, 2, 1)], [(0, 3, 1)]],
    ]


def test_an_update_larger_than_a_generation_takes_all_of_it() -> None:
    before, now = layout(1, 2, 2, 4), layout(2, 2, 1, 2)
    hands = deal_again([[2, 2]], before, now)
    assert hands == [[[(0, 0, 0), (0, 0, 1)]], [[(0, 1, 0), (0, 1, 1)]]]


@pytest.mark.parametrize(
    ("counts", "before", "now"),
    [
        ([[1, 1, 1]], layout(1, 2, 3, 2), layout(1, 2, 3, 2)),  # updates take 2 of 3 micro-batches, in turns
        ([[2, 1]], layout(1, 2, 2, 2), layout(2, 1, 2, 2)),  # uneven: means over micro-batches would change
        ([[1, 1]], layout(1, 2, 2, 2), layout(2, 1, 2, 2)),  # 2 rows for 4 micro-batches
        ([[0, 0]], layout(1, 2, 2, 2), layout(2, 1, 2, 2)),
    ],
)
def test_what_cannot_be_dealt_is_none(
    counts: list[list[int]], before: GenerationLayout, now: GenerationLayout
) -> None:
    assert deal_again(counts, before, now) is None


def test_the_first_quantity_that_differs_is_named() -> None:
    before = layout(2, 2, 4, 4)
    assert first_difference(before, layout(1, 2, 8, 8)) is None
    assert str(first_difference(before, layout(1, 2, 8, 4))).startswith("rows per update: 16 before (2 ranks x 2 x 4")
    assert str(first_difference(before, layout(1, 2, 4, 8))).startswith("rows per generation: 16 before")
    for name in ("num_generations", "num_iterations", "oversample"):
        found = str(first_difference(before, layout(1, 2, 8, 8, **{name: 4})))
        assert found.startswith("prune_oversample" if name == "oversample" else name) and "4 now" in found


def test_micro_steps_count_rows() -> None:
    two, one = layout(2, 2, 4, 4), layout(1, 2, 8, 8)
    assert micro_step_in(two, one, 0) == 0
    assert micro_step_in(two, one, 4) == 8
    assert micro_step_in(one, two, 8) == 4
    with pytest.raises(ValueError, match="10 trained rows are no whole number of micro-batches of 4 rows"):
        micro_step_in(layout(1, 2, 1, 1), layout(2, 2, 1, 1), 5)
