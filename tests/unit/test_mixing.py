import itertools
import math
import random
from collections import Counter
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_effi.functional.data import apportion, mixture_at, mixture_counts, mixture_order
from hf_effi.samplers import MixtureSampler, ReplaySampler

PLAN = [(0.0, {"a": 7, "b": 3}), (0.85, {"a": 3, "b": 6, "c": 1})]


def test_switch_and_line():
    assert mixture_at(0.84, PLAN) == {"a": 0.7, "b": 0.3, "c": 0.0}
    assert mixture_at(0.85, PLAN) == mixture_at(7.0, PLAN) == {"a": 0.3, "b": 0.6, "c": 0.1}
    half = mixture_at(0.425, PLAN, smooth=True)
    assert [half[name] for name in "abc"] == pytest.approx([0.5, 0.45, 0.05])
    assert mixture_at(1.0, PLAN, smooth=True) == mixture_at(1.0, PLAN)


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("block", [1, 7, 16])
def test_every_block_is_full_and_every_domain_within_one_sample(block, smooth):
    blocks = mixture_counts(1000, block, PLAN, smooth)
    owed, served, first = Counter(), Counter(), 0
    for counts in blocks:
        size = min(block, 1000 - first)
        assert sum(counts.values()) == size and min(counts.values()) >= 0
        for name, share in mixture_at(first / 1000, PLAN, smooth).items():
            owed[name] += share * size
            served[name] += counts[name]
            if share == 0:
                assert counts[name] == 0
            assert abs(owed[name] - served[name]) < 1 + 1e-6
        first += size


def test_the_switch_happens_in_its_block():
    blocks = mixture_counts(100, 10, [(0.0, {"a": 1}), (0.8, {"b": 1})])
    assert blocks == [{"a": 10, "b": 0}] * 8 + [{"a": 0, "b": 10}] * 2


# --- whole numbers ---------------------------------------------------------------------------------------------------


def check_quota(sizes, shares):
    """Full blocks, no negative count, nothing for a share of 0, running totals rounded down or up."""
    found = apportion(sizes, shares)
    owed, served = [Fraction(0)] * len(shares[0]), [0] * len(shares[0])
    for size, row, counts in zip(sizes, shares, found, strict=True):
        assert sum(counts) == size and min(counts) >= 0
        assert all(count == 0 for count, share in zip(counts, row, strict=True) if share == 0)
        owed = [o + Fraction(size * share, sum(row)) for o, share in zip(owed, row, strict=True)]
        served = [s + count for s, count in zip(served, counts, strict=True)]
        assert all(math.floor(o) <= s <= math.ceil(o) for o, s in zip(owed, served, strict=True))
    assert found == apportion(sizes, shares)
    return found


def exact_rows(domains, sparse):
    """Shares that change from block to block, with zeros in between where `sparse`; all rows have one sum."""
    share = st.one_of(st.just(0), st.integers(1, 60)) if sparse else st.integers(1, 60)
    row = st.lists(share, min_size=domains, max_size=domains).filter(any)
    row = row.map(lambda values: [Fraction(value, sum(values)) for value in values])
    return st.lists(row, min_size=1, max_size=25)


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(1, 40), st.integers(1, 64), st.booleans())
def test_any_shares_that_change_from_block_to_block(data, domains, block, sparse):
    rows = data.draw(exact_rows(domains, sparse))
    scale = math.lcm(*(share.denominator for row in rows for share in row))
    last = data.draw(st.integers(1, block))
    sizes = [block] * (len(rows) - 1) + [last]
    check_quota(sizes, [[int(share * scale) for share in row] for row in rows])


def test_domains_that_pause_make_earlier_blocks_exchange_places():
    """
    By deadline alone the second place goes to domain 3. In the last block only domains 0 and 3 are open, and both have
    got all that they may: domain 1 must have had the second place. Found by search; the others are drawn.
    """
    found = check_quota([1] * 4, [[2, 1, 1, 0], [0, 2, 0, 2], [1, 0, 0, 3], [1, 0, 0, 3]])
    assert found == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 1]]
    rows = [list(row) for row in itertools.product((0, 1, 2, 3), repeat=4) if sum(row) == 4]
    rng = random.Random(0)
    for _ in range(3000):
        check_quota([1] * 5, [rng.choice(rows) for _ in range(5)])


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.lists(st.sampled_from([0, 0.05, 0.3, 1, 5, 50, 1e-6]), min_size=4, max_size=4).filter(any), min_size=1
    ),
    st.integers(1, 64),
    st.integers(1, 300),
    st.booleans(),
)
def test_mixtures_that_move_never_go_below_zero(table, block, num_samples, smooth):
    plan = [(index / len(table), dict(enumerate(weights))) for index, weights in enumerate(table)]
    owed, served, first = Counter(), Counter(), 0
    for counts in mixture_counts(num_samples, block, plan, smooth):
        size = min(block, num_samples - first)
        assert sum(counts.values()) == size and min(counts.values()) >= 0
        for name, share in mixture_at(first / num_samples, plan, smooth).items():
            owed[name] += share * size
            served[name] += counts[name]
            assert abs(owed[name] - served[name]) < 1 + 1e-6
        first += size


def test_small_blocks_of_many_domains():
    blocks = mixture_counts(20, 1, [(0, {0: 50, 1: 50, 2: 50, 3: 5, 4: 5})])
    assert [[name for name, count in counts.items() if count] for counts in blocks[:4]] == [[0], [1], [2], [0]]
    assert Counter(name for counts in blocks for name, count in counts.items() for _ in range(count)) == Counter(
        {0: 6, 1: 6, 2: 6, 3: 1, 4: 1}
    )
    assert all(min(counts.values()) >= 0 for counts in blocks)


def test_weights_count_as_the_decimals_that_they_are_printed_as():
    """0.05 in binary is more than 1/20, and 0.29999999999999998 less than 0.3: neither may shift a block."""
    blocks = mixture_counts(4000, 20, [(0, {"old": 0.05, "mid": 0.3, "new": 0.65})])
    assert blocks == [{"old": 1, "mid": 6, "new": 13}] * 200


@pytest.mark.parametrize(
    ("sizes", "shares", "match"),
    [
        ([1, 1], [[1, 1], [1, 2]], r"the sums \[2, 3\]"),
        ([1], [[1, 1], [1, 1]], "1 sizes and 2 rows"),
        ([1], [[0, 0]], "all with the same positive sum"),
        ([-1], [[1, 1]], "negative size or share"),
        ([1], [[2, -1]], "negative size or share"),
    ],
)
def test_bad_shares_are_named(sizes, shares, match):
    with pytest.raises(ValueError, match=match):
        apportion(sizes, shares)
    assert apportion([], []) == []


def test_rows_of_a_domain_are_served_equally_often():
    domains = ["a"] * 5 + ["b"] * 20
    order = mixture_order(domains, [(0.0, {"a": 1, "b": 1})], 40, block=4).tolist()
    for end in range(4, 44, 4):
        counts = [order[:end].count(row) for row in range(5)]
        assert max(counts) - min(counts) <= 1
    assert sorted(row for row in order if row >= 5) == list(range(5, 25))
    assert all(sum(row < 5 for row in order[i : i + 4]) == 2 for i in range(0, 40, 4))
    assert order == mixture_order(domains, [(0.0, {"a": 1, "b": 1})], 40, block=4).tolist()
    assert order != mixture_order(domains, [(0.0, {"a": 1, "b": 1})], 40, block=4, seed=1).tolist()


def test_in_order_keeps_dataset_order_within_a_domain():
    order = mixture_order(list("aabb"), [(0.0, {"a": 1, "b": 1})], 8, block=8, in_order=True)
    assert sorted(order.tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]
    long = mixture_order(["a"] * 50, [(0.0, {"a": 1})], 50, block=1, in_order=True)
    assert long.tolist() == list(range(50))


@pytest.mark.parametrize(
    ("plan", "match"),
    [
        ([], "the first at progress 0"),
        ([(0.1, {"a": 1})], "the first at progress 0"),
        ([(0.0, {"a": 1}), (0.0, {"a": 1})], "must ascend"),
        ([(0.0, {"a": 0})], "all weights at progress 0"),
        ([(0.0, {"a": -1})], "weight of 'a'"),
        ([(0.0, {"a": 1}), (1.5, {"a": 1})], "1.5"),
        ([(0.0, {"z": 1})], "domain 'z' has a weight but no row"),
    ],
)
def test_bad_plans(plan, match):
    with pytest.raises(ValueError, match=match):
        mixture_order(["a"], plan, 4, block=2)


def test_samplers():
    sampler = MixtureSampler(["a"] * 10 + ["b"] * 10, [(0.0, {"a": 3, "b": 1})], block=4, num_samples=20)
    assert sampler.passes() == {"a": 1.5, "b": 0.5}
    with pytest.raises(ValueError, match="num_train_epochs=1"):
        sampler.set_epoch(1)
    replay = ReplaySampler([True] * 100 + [False] * 95, rate=0.05, block=20)
    assert len(replay) == 100
    blocks = torch.tensor(list(replay)).view(5, 20)
    assert (blocks < 100).sum(1).tolist() == [1] * 5
    assert blocks[blocks < 100].tolist() == [0, 1, 2, 3, 4]
    assert sorted(blocks[blocks >= 100].tolist()) == list(range(100, 195))
    for rate in (0, 1, -0.1):
        with pytest.raises(ValueError, match="rate"):
            ReplaySampler([True, False], rate, block=2)
    with pytest.raises(ValueError, match="'old' has a weight but no row"):
        ReplaySampler([False] * 8, 0.5, block=2)
