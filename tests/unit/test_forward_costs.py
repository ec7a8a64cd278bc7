"""The cost of a forward in three layouts, by hand; the order and the cuts of flat rows."""

from __future__ import annotations

import pytest
import torch

from hf_effi.attention.switch import switched_attention
from hf_effi.functional.forward_costs import ForwardCosts, RowLengths, grouped_order
from hf_effi.functional.rollouts import split_evenly
from hf_effi.functional.shared_prefix import plan_shared_prefix
from hf_effi.trainers.grpo.packed import _CALL_OPERATIONS, FlatRows, PackedForward, costs_of
from tests.helpers import tiny_qwen3

#: two rows share a prompt of 10 tokens, with completions of 2 and 5; one has a prompt of 4 and a completion of 6
ROWS = [RowLengths("a", 10, 2), RowLengths("b", 4, 6), RowLengths("a", 10, 5)]


def test_costs_by_hand():
    costs = ForwardCosts(per_pair=0.01, per_call=3.0)
    # One bucket of 3 rows of 15 tokens.
    assert costs.padded(ROWS, 1) == pytest.approx(45 + 0.01 * 3 * 15**2 + 3)
    # Two buckets: 10 and 12 tokens padded to 12, and 15.
    assert costs.padded(ROWS, 2) == pytest.approx(24 + 15 + 0.01 * (2 * 12**2 + 15**2) + 2 * 3)
    assert costs.packed(ROWS) == pytest.approx(37 + 0.01 * (12**2 + 10**2 + 15**2) / 2 + 3 * 3)
    # 9 tokens of the prompt, branches of 3 and 6, and the row on its own; 4 calls and one over the prefix.
    tokens, pairs = 9 + 3 + 6 + 10, (9**2 + 3**2 + 6**2 + 10**2) / 2 + 9 * (3 + 6)
    assert costs.shared(ROWS) == pytest.approx(tokens + 0.01 * pairs + 5 * 3)


def test_the_count_of_tokens_is_that_of_the_layout():
    costs = ForwardCosts(0.0, 0.0)
    prompts = [[1] * 10, [2] * 4, [1] * 10]
    for share, cost in ((True, costs.shared(ROWS)), (False, costs.packed(ROWS))):
        assert plan_shared_prefix(prompts, [2, 6, 5], share).num_tokens == cost


@pytest.mark.parametrize(
    ("per_pair", "per_call", "chosen"),
    [(0.0, 0.0, "share"), (0.0, 30.0, "trim"), (0.0, 1e9, "trim"), (10.0, 0.0, "share")],
)
def test_the_cheapest_layout_is_chosen(per_pair, per_call, chosen):
    packed = PackedForward(("trim", "pack", "share"), ForwardCosts(per_pair, per_call), None, lambda: None)
    assert packed.choose(ROWS, 1) == chosen
    assert PackedForward(("pack",), ForwardCosts(0.0, 1e9), None, lambda: None).choose(ROWS, 1) == "pack"


def test_rows_longer_than_the_window_cost_what_packed_ones_do():
    costs = ForwardCosts(0.0, 0.0)
    short, long = (PackedForward(("pack", "share"), costs, reach, lambda: None) for reach in (14, 15))
    assert short.cost("share", ROWS, 1) == costs.packed(ROWS) > long.cost("share", ROWS, 1) == costs.shared(ROWS)
    assert short.choose(ROWS, 1) == "pack"


def test_costs_of_a_model_are_read_from_its_weights():
    model = tiny_qwen3()
    layer = sum(p.numel() for p in model.model.layers[0].parameters()) + model.model.norm.weight.numel() / 2
    costs = costs_of(model, torch.device("cpu"))
    assert costs.per_pair == pytest.approx(2 * 32 / layer) and costs.per_call == pytest.approx(
        _CALL_OPERATIONS / (6 * layer)
    )
    assert costs_of(model, torch.device("cuda")).per_call == 0


def test_flat_rows_are_the_real_tokens():
    ids = torch.tensor([[0, 5, 6, 7, 0], [3, 4, 8, 9, 2]])
    rows = FlatRows.of(ids, torch.tensor([[0, 1, 1, 1, 0], [1, 1, 1, 1, 1]]), 2)
    assert rows == FlatRows([[5], [3, 4]], [[6, 7], [8, 9, 2]])
    assert [length.tokens for length in rows.lengths()] == [3, 5]


def test_order_of_groups():
    assert grouped_order(ROWS, [True] * 3) == [1, 0, 2]
    assert grouped_order(ROWS, [True, False, True]) == [1, 0, 2]
    assert grouped_order(ROWS, [False, True, True]) == [0, 1, 2]


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_cuts_leave_no_piece_empty(parts):
    for costs in ([1, 1, 1, 1, 1, 1, 1], [100, 1, 1, 1], [1, 1, 1, 100], [5]):
        pieces = split_evenly(costs, parts)
        assert len(pieces) == min(parts, len(costs)) and all(pieces)
        assert [place for piece in pieces for place in piece] == list(range(len(costs)))


def test_attention_is_put_back_after_an_error():
    model = tiny_qwen3()
    with pytest.raises(ZeroDivisionError), switched_attention(model):
        assert model.config._attn_implementation == model.model.config._attn_implementation == "hf_effi_varlen"
        raise ZeroDivisionError
    assert model.config._attn_implementation == "sdpa"
