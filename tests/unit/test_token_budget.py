import random
from itertools import pairwise

import pytest

from hf_effi.errors import MismatchError
from hf_effi.functional.data import (
    batch_costs,
    deal_snake,
    fill_to_multiple,
    flop_coefficients,
    pack_best_fit,
    pack_padded,
    row_lengths,
)
from hf_effi.samplers import TokenBudgetBatchSampler, cost_of_model
from tests.helpers import tiny_qwen3


def log_normal(rows, seed=0):
    draw = random.Random(seed)
    return [min(max(int(draw.lognormvariate(5.5, 1.0)), 1), 2048) for _ in range(rows)]


def flat(batches):
    return [row for batch in batches for row in batch]


def test_best_fit_takes_the_fullest_batch_that_has_room():
    # 6 opens A (room 4), 5 opens B (room 5), 4 fills A, 3 goes to B (room 2), 2 fills B; first fit would do the same,
    # but with 7 and 6 first, 3 must go to the batch with room 3, not to the one with room 4.
    assert pack_best_fit([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]
    assert pack_best_fit([6, 7, 3, 4], 10) == [[1, 2], [0, 3]]
    assert pack_best_fit([10], 10) == [[0]]
    assert pack_best_fit([5, 5, 5, 5], 10) == [[0, 1], [2, 3]]
    assert pack_best_fit([1] * 7, 3) == [[0, 1, 2], [3, 4, 5], [6]]


@pytest.mark.parametrize("pack", [pack_best_fit, pack_padded])
@pytest.mark.parametrize("seed", range(5))
def test_packing_keeps_rows_and_budget(pack, seed):
    lengths = log_normal(300, seed)
    batches = pack(lengths, 2500)
    assert sorted(flat(batches)) == list(range(300))
    of_batch = [[lengths[row] for row in batch] for batch in batches]
    for batch in of_batch:
        assert (sum(batch) if pack is pack_best_fit else len(batch) * max(batch)) <= 2500
    if pack is pack_padded:
        assert all(min(a) >= max(b) for a, b in pairwise(of_batch))


def test_costs_by_hand():
    assert batch_costs([[4, 2, 1]], (2.0, 0.0)).tolist() == [24.0]  # three rows of 4
    assert batch_costs([[4, 2, 1]], (2.0, 0.0), padded=False).tolist() == [14.0]
    assert batch_costs([[4, 2, 1]], (1.0, 1.0)).tolist() == [60.0]
    assert batch_costs([[4, 2, 1]], (1.0, 1.0), padded=False).tolist() == [28.0]
    with pytest.raises(ValueError, match=r"cost\[1\]=-1"):
        batch_costs([[1]], (1.0, -1))
    with pytest.raises(ValueError, match="cost=\\(0, 0\\)"):
        batch_costs([[1]], (0, 0))


def test_cost_of_a_model():
    tied, untied = tiny_qwen3(tie_word_embeddings=True), tiny_qwen3()
    table = untied.get_input_embeddings().weight.numel()
    total = sum(p.numel() for p in untied.parameters())
    # 2 layers of 4 heads of 8; scores and values are 2 l^2 D operations each a head, tripled by the backward pass
    assert cost_of_model(untied) == (6.0 * (total - table), 3 * 2 * (2 * 2 * 4 * 8))
    assert cost_of_model(tied) == cost_of_model(untied)
    assert flop_coefficients(1, 1, 1, 1) == (6.0, 12.0)
    with pytest.raises(ValueError, match="num_layers=0"):
        flop_coefficients(1, 0, 1, 1)


def test_filling_halves_the_dearest():
    lengths = [5, 4, 3, 2, 8, 1]
    filled = fill_to_multiple([[0, 1, 2, 3], [4, 5]], lengths, 4, padded=False)
    # 14 -> 8 and 6; then 9 -> 8 and 1
    assert filled == [[0, 2], [1, 3], [4], [5]]
    assert fill_to_multiple([[0], [1]], lengths, 2) == [[0], [1]]
    with pytest.raises(ValueError, match="3 rows make 3 micro-batches, and 4 are needed"):
        fill_to_multiple([[0], [1], [2]], lengths, 2)


def test_snake():
    assert deal_snake([1, 2, 3, 4], 2).tolist() == [[[3, 2]], [[0, 1]]]
    dealt = deal_snake(range(24), ranks=3, accumulation=2)
    assert sorted(dealt.flatten().tolist()) == list(range(24))
    of_rank = dealt.sum(dim=1)  # a cost is its own number here
    assert bool((of_rank == of_rank[:, :1]).all())
    with pytest.raises(ValueError, match="5 batches cannot be dealt to 2 places"):
        deal_snake(range(5), 2)


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize(("ranks", "accumulation"), [(8, 1), (8, 4), (1, 8)])
def test_golden_even_cost_on_log_normal_lengths(padding_free, ranks, accumulation):
    sampler = TokenBudgetBatchSampler(log_normal(8000), 4096, cost=(1.0, 1e-3), padding_free=padding_free)
    sampler.deal(ranks, accumulation)
    of_place = sampler.costs.sum(dim=0).flatten()
    assert of_place.max() / of_place.mean() <= 1.05
    assert sampler.imbalance <= 1.05


def test_every_row_once_in_each_epoch_and_the_same_number_of_batches():
    lengths = log_normal(500)
    sampler = TokenBudgetBatchSampler(lengths, 4096, length_multiple=32, seed=1)
    sampler.deal(ranks=3, accumulation=2)
    seen = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        parts = [list(sampler.batches(rank)) for rank in range(3)]
        assert {len(part) for part in parts} == {sampler.batches_per_rank}
        assert sampler.batches_per_rank % 2 == 0
        assert sorted(flat(flat(parts))) == list(range(500))
        together = [row for batch in zip(*parts, strict=True) for row in flat(batch)]
        assert together == sampler.order(epoch).tolist()
        for batch in flat(parts):
            assert len(batch) * max(-(-lengths[row] // 32) * 32 for row in batch) <= 4096
        seen.append(parts)
    assert seen[0] != seen[1] != seen[2]
    members = [{frozenset(batch) for batch in flat(parts)} for parts in seen]
    assert members[0] != members[1], "rows of one rounded length change places, not updates alone"


def test_updates_hold_the_same_rows_at_any_split_into_ranks_and_steps():
    def updates(ranks, accumulation):
        sampler = TokenBudgetBatchSampler(log_normal(200), 4096, seed=4)
        sampler.deal(ranks, accumulation)
        sampler.set_epoch(1)
        parts = [list(sampler.batches(rank)) for rank in range(ranks)]
        size = range(0, sampler.batches_per_rank, accumulation)
        return [sorted(flat(flat(part[i : i + accumulation] for part in parts))) for i in size], sampler.state_dict()

    assert updates(1, 4) == updates(2, 2) == updates(4, 1)
    with pytest.raises(MismatchError, match="other settings"):
        other = TokenBudgetBatchSampler(log_normal(200), 4096, seed=4)
        other.deal(2, 4)
        other.load_state_dict(updates(1, 4)[1])


def test_one_row_and_equal_rows():
    one = TokenBudgetBatchSampler([7], 7)
    assert list(one.batches(0)) == [[0]] and one.imbalance == 1.0
    equal = TokenBudgetBatchSampler([4] * 6, 8)
    equal.deal(3)
    assert [len(batch) for rank in range(3) for batch in equal.batches(rank)] == [2, 2, 2]
    assert equal.imbalance == 1.0


def test_start_from_the_middle():
    sampler = TokenBudgetBatchSampler(log_normal(50), 4096)
    sampler.set_epoch(1)
    whole = list(sampler)
    sampler.start_from(1, 20)
    assert list(sampler) == whole[20:]


def test_refusals_name_row_and_fix():
    with pytest.raises(ValueError, match=r"Row 1 has 9 tokens, .* max_tokens=8\. Raise max_tokens to at least 9"):
        TokenBudgetBatchSampler([3, 9, 2], 8)
    with pytest.raises(ValueError, match="Row 2 has 0 tokens"):
        TokenBudgetBatchSampler([3, 1, 0], 8)
    for bad in ([], [[1, 2]], [1.5], [float("nan")]):
        with pytest.raises(ValueError, match="lengths has shape"):
            TokenBudgetBatchSampler(bad, 8)
    for bad in (5.0, (1, 2, 3), "ab"):
        with pytest.raises(ValueError, match="must be a pair|outside"):
            TokenBudgetBatchSampler([3], 8, cost=bad)
    with pytest.raises(ValueError, match="max_tokens=8.0"):
        TokenBudgetBatchSampler([3], 8.0)
    with pytest.raises(ValueError, match="max_tokens=0"):
        TokenBudgetBatchSampler([1], 0)
    with pytest.raises(ValueError, match="3 rows make 3 micro-batches, and 4 are needed"):
        TokenBudgetBatchSampler([5, 5, 5], 8).deal(2, 2)
    assert TokenBudgetBatchSampler(row_lengths([[1, 2], [3]]), 8).lengths.tolist() == [2, 1]
