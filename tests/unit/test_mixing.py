from collections import Counter

import pytest
import torch

from hf_effi.functional.curriculum import CurriculumError, mixture_at, mixture_counts, mixture_order
from hf_effi.samplers import MixtureSampler, ReplaySampler, SamplerError

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
    with pytest.raises(CurriculumError, match=match):
        mixture_order(["a"], plan, 4, block=2)


def test_samplers():
    sampler = MixtureSampler(["a"] * 10 + ["b"] * 10, [(0.0, {"a": 3, "b": 1})], block=4, num_samples=20)
    assert sampler.passes() == {"a": 1.5, "b": 0.5}
    with pytest.raises(SamplerError, match="num_train_epochs=1"):
        sampler.set_epoch(1)
    replay = ReplaySampler([True] * 100 + [False] * 95, rate=0.05, block=20)
    assert len(replay) == 100
    blocks = torch.tensor(list(replay)).view(5, 20)
    assert (blocks < 100).sum(1).tolist() == [1] * 5
    assert blocks[blocks < 100].tolist() == [0, 1, 2, 3, 4]
    assert sorted(blocks[blocks >= 100].tolist()) == list(range(100, 195))
    for rate in (0, 1, -0.1):
        with pytest.raises(CurriculumError, match="rate"):
            ReplaySampler([True, False], rate, block=2)
    with pytest.raises(CurriculumError, match="'old' has a weight but no row"):
        ReplaySampler([False] * 8, 0.5, block=2)
