"""Merging as pure functions: weights by hand, exact ends, rows of new tokens, products of factors, the search."""

import math

import pytest
import torch

from hf_effi.functional import merging
from hf_effi.functional.averaging import averaging_weights, trend_weights
from hf_effi.functional.coefficient_search import plain_combinations, search_weights
from hf_effi.functional.merging import (
    add_delta,
    combine,
    concatenate_lora,
    cosine,
    interpolated,
    metric_weights,
    pareto_flags,
    products,
)


def test_metric_weights_by_hand():
    assert metric_weights([2.0, 1.0], 2) == pytest.approx([0.2, 0.8])
    assert metric_weights([100, 200], 1, greater_is_better=True) == pytest.approx([1 / 3, 2 / 3])
    assert metric_weights([5.0, 1.0, 2.0], 0) == averaging_weights(3, "uniform")  # to the bit
    assert metric_weights([2.0, 1.0, 3.0], 1e4) == [0.0, 1.0, 0.0]
    assert metric_weights([7.0], 3) == [1.0]
    assert metric_weights([3.0] * 4, 16) == [0.25] * 4
    assert metric_weights([1.0, 2.0], 1) == pytest.approx(metric_weights([10.0, 20.0], 1))  # units do not matter


@pytest.mark.parametrize(
    ("values", "penalty", "word"),
    [([], 1, "values"), ([0.0], 1, "values"), ([math.nan], 1, "values"), ([-1.0, 1.0], 1, "values"),
     ([1.0], -1, "penalty"), ([1.0], math.inf, "penalty"), ([1.0], True, "penalty")],
)  # fmt: skip
def test_metric_weights_refuse(values, penalty, word):
    with pytest.raises(ValueError, match=f"{word}="):
        metric_weights(values, penalty)


def test_combinations_are_wide_and_their_ends_exact():
    old = {"w": torch.tensor([1.0, 3.0]).bfloat16(), "n": torch.tensor([1])}
    new = {"w": torch.tensor([2.0, 7.0]).bfloat16(), "n": torch.tensor([9])}
    made = combine([old, new], [-0.5, 1.5])
    assert made["w"].tolist() == [2.5, 9.0] and made["w"].dtype is torch.bfloat16 and made["n"].item() == 9
    many = [{"w": torch.tensor([1.0]).bfloat16()}] * 256 + [{"w": torch.tensor([1.25]).bfloat16()}]
    assert combine(many, [1 / 512] * 256 + [0.5])["w"].item() == 1.125  # a bf16 sum would stand still at 1
    for alpha, end in ((0, old), (1, new)):
        made = interpolated(old, new, alpha)
        assert torch.equal(made["w"], end["w"]) and made["w"] is not end["w"]
    assert interpolated(old, new, 2)["w"].tolist() == [3.0, 11.0]


def test_combinations_refuse():
    one, other = {"w": torch.zeros(2)}, {"w": torch.zeros(3)}
    with pytest.raises(ValueError, match="sum to 1"):
        combine([one, one], [0.5, 0.6])
    with pytest.raises(ValueError, match="one number per state"):
        combine([one, one], [1.0])
    with pytest.raises(ValueError, match=r"w has the shapes \[\(2,\), \(3,\)\]"):
        combine([one, other], [0.5, 0.5])
    with pytest.raises(ValueError, match="different tensors: v, w"):
        combine([one, {"v": torch.zeros(2)}], [0.5, 0.5])
    with pytest.raises(ValueError, match="alpha=nan"):
        interpolated(one, one, math.nan)


def test_delta_by_hand_and_rows_of_new_tokens():
    target, tuned, base = (
        torch.tensor([[1.0], [2.0], [9.0]]),
        torch.tensor([[4.0], [4.0]]),
        torch.tensor([[2.0], [3.0]]),
    )
    assert add_delta(target, tuned, base).tolist() == [[3.0], [3.0], [9.0]]
    assert add_delta(target, tuned, base, 0.5).tolist() == [[2.0], [2.5], [9.0]]
    assert torch.equal(add_delta(target, tuned, base, 0), target)
    assert add_delta(torch.tensor(1.0), torch.tensor(3.0), torch.tensor(1.0)).item() == 3.0
    assert add_delta(torch.tensor([5]), torch.tensor([7]), torch.tensor([6])).tolist() == [5]
    for odd in (torch.zeros(1, 1), torch.zeros(3, 2)):
        with pytest.raises(ValueError, match="do not fit"):
            add_delta(odd, tuned, base)


def test_cosines_and_pareto(monkeypatch):
    assert cosine(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])) == 0
    assert cosine(torch.tensor([[3.0]]), torch.tensor([[-1.0]])) == -1
    assert cosine(torch.zeros(2), torch.ones(2)) is None
    monkeypatch.setattr(merging, "_BLOCK", 2)  # the blocks add up
    assert products([torch.arange(5.0), torch.ones(5).bfloat16()], torch.ones(5)) == [[15.0, 0.0], [0.0, 0.0]]
    assert pareto_flags([(1, 3), (2, 2), (2, 3), (3, 1)]) == [True, True, False, True]
    assert pareto_flags([(1, 1), (1, 1)]) == [True, True]  # equal ones do not beat each other
    assert pareto_flags([(math.nan, 1), (0, 1)]) == [False, True]
    assert pareto_flags([]) == []


def test_products_of_factors_are_averaged_exactly():
    draw = torch.Generator().manual_seed(0)
    downs = [torch.randn(2, 5, generator=draw) for _ in range(3)]
    ups = [torch.randn(4, 2, generator=draw) for _ in range(3)]
    weights = trend_weights(3)
    down, up = concatenate_lora(downs, ups, weights)
    assert down.shape == (6, 5) and up.shape == (4, 6)
    wanted = sum(w * b.double() @ a.double() for w, a, b in zip(weights, downs, ups, strict=True))
    torch.testing.assert_close((up.double() @ down.double()), wanted, atol=1e-6, rtol=1e-6)


def bowl(wanted, scale=1.0):
    """A loss that is quadratic in the coefficients, with unequal axes."""
    return lambda weights: (
        scale * sum((j + 1) * (w - v) ** 2 for j, (w, v) in enumerate(zip(weights, wanted, strict=True)))
    )


@pytest.mark.parametrize("wanted", [[1.4, -0.4], [-0.3, 0.1, 1.2], [0.2, -0.5, 0.4, 0.1, 0.3, 0.5]])
def test_the_search_recovers_the_optimum_of_a_bowl(wanted):
    found = search_weights(len(wanted), bowl(wanted), confirm=bowl(wanted), seed=1)
    assert found.weights == pytest.approx(wanted, abs=1e-6) and found.name == "searched" and found.confirmed
    assert found.evaluations == 64 == len(found.history) and found.history == sorted(found.history, reverse=True)
    assert math.fsum(found.weights) == pytest.approx(1, abs=1e-12)
    assert "better on the second set too" in str(found)


def test_the_search_is_never_worse_than_the_plain_ones_and_needs_a_second_set():
    wanted = [-0.3, 0.1, 1.2]
    found = search_weights(3, bowl(wanted), confirm=lambda weights: -bowl(wanted)(weights), budget=12)
    best = min(found.plain, key=found.plain.get)
    assert found.confirmed is False and found.name == best and found.weights == plain_combinations(3)[best]
    assert found.searched_score <= found.score == found.plain[best]
    assert "not better on the second set" in str(found) and best in str(found)
    best_is_plain = search_weights(3, bowl([0.0, 0.0, 1.0]), confirm=None, budget=20)
    assert best_is_plain.name == "last" and best_is_plain.weights == [0, 0, 1] and not best_is_plain.confirm_scores
    unconfirmed = search_weights(3, bowl(wanted), confirm=None)
    assert (
        unconfirmed.confirmed is None and unconfirmed.name == "searched" and "without a second set" in str(unconfirmed)
    )
    assert search_weights(3, bowl(wanted), confirm=None) == unconfirmed  # of one seed
    tried = {0: [], 5: []}
    for seed, calls in tried.items():
        search_weights(3, lambda weights, calls=calls: calls.append(weights) or 1.0, confirm=None, budget=9, seed=seed)
    assert tried[0][:6] == tried[5][:6] and tried[0][6:] != tried[5][6:]


def test_scores_that_are_no_number_lose():
    calls = []

    def score(weights):
        calls.append(weights)
        return math.nan if min(weights) < 0 else bowl([0.1, 0.2, 0.7])(weights)

    found = search_weights(3, score, confirm=score, budget=30)
    assert min(found.weights) >= 0 and math.isfinite(found.score) and len(calls) == 30 + 2
    assert found.plain["trend"] == math.inf
    with pytest.raises(ValueError, match="No plain combination"):
        search_weights(3, lambda weights: math.nan, confirm=None)
    with pytest.raises(ValueError, match="count=1"):
        search_weights(1, score, confirm=None)
    with pytest.raises(ValueError, match="budget=6"):
        search_weights(3, score, confirm=None, budget=6)
