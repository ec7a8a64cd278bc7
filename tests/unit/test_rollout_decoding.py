"""Which rows are forwarded in generation: equal prompts, and when finished rows leave. Values computed by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_effi.functional.rollouts import compaction_pays, equal_rows


@pytest.mark.parametrize(
    ("rows", "first", "of"),
    [
        ([[1, 2], [1, 2], [1, 2]], [0], [0, 0, 0]),
        ([[1, 2], [2, 1], [1, 2], [0, 0], [2, 1]], [0, 1, 3], [0, 1, 0, 2, 1]),
        ([[5], [4], [3]], [0, 1, 2], [0, 1, 2]),
        ([[7, 7]], [0], [0]),
    ],
    ids=["all equal", "mixed up", "all different", "one row"],
)
def test_equal_rows(rows: list[list[int]], first: list[int], of: list[int]) -> None:
    found = equal_rows([torch.tensor(rows)])
    assert (found[0].tolist(), found[1].tolist()) == (first, of)


def test_rows_are_equal_where_all_of_their_columns_are() -> None:
    ids = torch.tensor([[0, 9], [0, 9], [0, 9]])
    mask = torch.tensor([[0, 1], [1, 1], [0, 1]])  # padding, or the token 0
    places = torch.tensor([0, 1, 1])
    assert equal_rows([ids])[1].tolist() == [0, 0, 0]
    assert equal_rows([ids, mask])[1].tolist() == [0, 1, 0]
    assert equal_rows([ids, mask, places])[1].tolist() == [0, 1, 2]


def test_edges_of_equal_rows() -> None:
    assert equal_rows([torch.tensor([[1.0], [float("nan")], [float("nan")]])])[1].tolist() == [0, 1, 2]
    deep = torch.zeros(2, 3, 4, dtype=torch.bool)
    assert equal_rows([deep])[1].tolist() == [0, 0]
    large = torch.tensor([[2**53 - 1], [2**53 - 2]])
    assert equal_rows([large])[1].tolist() == [0, 1]
    with pytest.raises(ValueError, match="at least one tensor"):
        equal_rows([])


@pytest.mark.parametrize(
    ("call", "pays"),
    [
        ({"live": 8, "held": 16, "wasted": 8, "copy_cost": 1.0}, True),
        ({"live": 8, "held": 16, "wasted": 7, "copy_cost": 1.0}, False),
        ({"live": 15, "held": 16, "wasted": 15, "copy_cost": 1.0}, True),
        ({"live": 16, "held": 16, "wasted": 0, "copy_cost": 0.0}, False),
        ({"live": 0, "held": 16, "wasted": 99}, False),
        ({"live": 1, "held": 2, "wasted": 0, "copy_cost": 0.0}, True),
    ],
    ids=["half", "not yet", "one, for long", "none finished", "all finished", "free copies"],
)
def test_when_finished_rows_leave(call: dict[str, Any], pays: bool) -> None:
    assert compaction_pays(**call) is pays


@pytest.mark.parametrize("cost", [-1.0, float("nan"), float("inf")])
def test_a_cost_is_a_number_from_zero_on(cost: float) -> None:
    with pytest.raises(ValueError, match="copy_cost must be a number >= 0"):
        compaction_pays(1, 2, 3, copy_cost=cost)


def test_what_is_wasted_stays_below_what_copies_cost() -> None:
    """Rows end one after the other: forwards of finished ones cost no more than the copies."""
    ends, cost = [3, 5, 8, 13, 21, 34, 55, 89], 2.0
    held, wasted, all_wasted, copied, copies = len(ends), 0, 0, 0, 0
    for token in range(max(ends)):
        live = sum(end > token for end in ends)
        wasted += held - live
        if compaction_pays(live, held, wasted, cost):
            copied, copies, held, wasted = copied + live, copies + 1, live, 0
        all_wasted += held - live
    assert copies > 2 and all_wasted <= cost * copied
    assert all_wasted < 0.1 * sum(max(ends) - end for end in ends)
