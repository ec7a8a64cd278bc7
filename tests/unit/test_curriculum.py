import math
from collections import Counter

import pytest
import torch

from hf_effi.functional.data import (
    competence,
    competence_order,
    cyclical_sizes,
    draw_without_replacement,
    easiest_share,
    fit_rasch,
    interleave_levels,
    learnability,
    mixture_order,
    pass_rate_difficulty,
    percentile_within,
    rasch_ability,
    refill,
    score_order,
    self_paced_weights,
    within_ability,
    word_rarity,
)

NAN = float("nan")


def is_permutation(order, size):
    return order.sort().values.tolist() == list(range(size))


# --- quality ascending ---------------------------------------------------------------------------------------------


def test_full_sort_is_monotone_and_reversible():
    scores = torch.rand(101)
    up, down = score_order(scores), score_order(scores, descending=True)
    assert bool((scores[up].diff() >= 0).all())
    assert bool((scores[down].diff() <= 0).all())
    assert is_permutation(up, 101)
    assert up.tolist() == down.flip(0).tolist()


def test_constant_scores_are_a_seeded_shuffle():
    one, same, other = score_order([1.0] * 50), score_order([1.0] * 50), score_order([1.0] * 50, seed=1)
    assert is_permutation(one, 50) and one.tolist() != list(range(50))
    assert one.tolist() == same.tolist() != other.tolist()


def test_a_list_of_scores_has_the_precision_of_a_tensor_of_doubles():
    close = [0.3 + 1e-12, 0.3]  # one number in single precision
    for scores in (close, torch.tensor(close, dtype=torch.float64)):
        assert {tuple(score_order(scores, seed=seed).tolist()) for seed in range(8)} == {(1, 0)}


def test_labels_in_a_tensor_are_those_of_a_list():
    levels, subjects = [1, 0, 1, 1, 0, 1], [7, 8, 7, 8, 7, 8]
    wanted = interleave_levels(levels, subjects).tolist()
    assert interleave_levels(torch.tensor(levels), torch.tensor(subjects)).tolist() == wanted
    scores = torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0, 6.0])
    wanted = percentile_within(scores, subjects).tolist()
    assert percentile_within(scores, torch.tensor(subjects)).tolist() == wanted
    mixes = [(0.0, {7: 1, 8: 1})]
    wanted = mixture_order(subjects, mixes, 6, block=2).tolist()
    assert mixture_order(torch.tensor(subjects), mixes, 6, block=2).tolist() == wanted


def test_buckets_sort_between_and_shuffle_inside():
    scores = torch.arange(100).float()
    order = score_order(scores, buckets=4)
    for part in range(4):
        assert sorted(order[25 * part : 25 * part + 25].tolist()) == list(range(25 * part, 25 * part + 25))
    assert bool((order.diff() < 0).any())
    assert score_order(scores, buckets=100).tolist() == list(range(100))
    assert is_permutation(score_order(scores, buckets=7), 100)


def test_folds_are_interleaved_ascending_passes():
    order = score_order(torch.arange(10.0), folds=3).tolist()
    assert order == [0, 3, 6, 9, 1, 4, 7, 2, 5, 8]


def test_sources_keep_the_mixture_constant():
    """Without strata the low-scoring source comes first; with them each tenth of the order has both, half and half."""
    scores = torch.cat([torch.rand(100), 10 + torch.rand(100)])
    sources = ["web"] * 100 + ["books"] * 100
    assert bool((score_order(scores)[:100] < 100).all())
    order = score_order(scores, sources=sources)
    shares = (order < 100).view(10, 20).sum(1)
    assert shares.tolist() == [10] * 10
    web = order[order < 100]
    assert bool((scores[web].diff() >= 0).all())


def test_percentiles_of_ties_share_the_mean_rank():
    assert percentile_within(torch.tensor([1.0, 1.0, 2.0]), ["a"] * 3).tolist() == pytest.approx([1 / 3, 1 / 3, 5 / 6])


def test_score_order_edges_and_errors():
    assert score_order([5.0]).tolist() == [0]
    assert score_order([2.0, NAN, 1.0, 3.0], nan="median").tolist()[0] == 2
    for bad, match in (
        ({"scores": [1.0, NAN]}, "1 NaN"),
        ({"scores": [1.0], "buckets": 2}, "buckets=2 exceeds the 1 rows"),
        ({"scores": [1.0], "folds": 0}, "folds=0"),
        ({"scores": [1.0, 2.0], "sources": ["a"]}, "sources has 1 entries for 2"),
    ):
        with pytest.raises(ValueError, match=match):
            score_order(**bad)


# --- CORGI ---------------------------------------------------------------------------------------------------------


def test_levels_are_monotone_and_subjects_alternate():
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(0, 3, (90,), generator=generator).tolist()
    subjects = [("law", "art", "bio")[i] for i in torch.randint(0, 3, (90,), generator=generator).tolist()]
    order = interleave_levels(levels, subjects).tolist()
    assert sorted(order) == list(range(90))
    assert [levels[i] for i in order] == sorted(levels)
    for level in range(3):
        rows = [i for i in order if levels[i] == level]
        left = Counter(subjects[i] for i in rows)
        for before, after in zip(rows, rows[1:], strict=False):
            left[subjects[before]] -= 1
            if sum(count > 0 for count in left.values()) > 1:
                assert subjects[before] != subjects[after]


def test_tuples_compare_stage_first_and_blocks_are_one_subject():
    order = interleave_levels([(1, 3), (2, 1), (1, 1)], ["a", "a", "a"]).tolist()
    assert order == [2, 0, 1]
    with pytest.raises(ValueError, match="levels has 1 and subjects 2"):
        interleave_levels([1], ["a", "b"])
    with pytest.raises(ValueError, match=r"levels\[0\] is NaN"):
        interleave_levels([NAN], ["a"])


# --- competence ----------------------------------------------------------------------------------------------------


def test_competence_by_hand():
    assert competence(0.0) == pytest.approx(0.01)
    assert competence(1.0) == competence(7.0) == 1.0
    assert competence(0.5, start=0.2, root=1) == pytest.approx(0.6)
    assert competence(0.5, start=0.01, root=2) == pytest.approx(math.sqrt(0.5 * (1 - 1e-4) + 1e-4))
    assert competence(0.25, start=0.2, root=1, full_at=0.5) == pytest.approx(0.6)
    assert competence(-1.0) == pytest.approx(0.01)
    for bad in ({"start": 0}, {"start": 1.1}, {"root": 0.5}, {"full_at": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            competence(0.5, **bad)


def test_competence_order_never_draws_too_hard_a_row():
    scores = torch.arange(50).flip(0).float()  # row 49 is the easiest
    order = competence_order(scores, 400, start=0.1)
    for sample, row in enumerate(order.tolist()):
        assert scores[row] < math.ceil(competence(sample / 400, 0.1) * 50 - 1e-9)
    assert order[0] >= 45
    assert len(set(order[-100:].tolist())) > 30


def test_competence_order_edges():
    assert competence_order([1.0], 3).tolist() == [0, 0, 0]
    counts = torch.bincount(competence_order(torch.arange(10.0), 20000, start=1.0), minlength=10)
    assert bool(((counts - 2000).abs() < 200).all())  # start = 1 is uniform sampling
    with pytest.raises(ValueError, match="num_samples=0"):
        competence_order([1.0], 0)


# --- cyclical ------------------------------------------------------------------------------------------------------


def test_cyclical_golden():
    assert cyclical_sizes(6) == [0.25, 0.5, 1, 0.5, 0.25, 0.5, 1, 0.5, 0.25, 0.5, 1]
    assert cyclical_sizes(2, start=0.5, end=0.5) == [0.5] * 4
    assert cyclical_sizes(1.5, start=0.4, end=0.9, alpha=0.5) == [0.4, 0.8, 0.9]
    for bad in ({"alpha": 1}, {"alpha": 0}, {"start": 0}, {"start": 1.5}, {"end": 1.5}, {"total": 0}):
        with pytest.raises(ValueError):
            cyclical_sizes(**{"total": 2, **bad})


def test_draws_follow_the_weights_without_duplicates():
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0])
    first = torch.tensor([draw_without_replacement(weights, 2, 0, i).tolist() for i in range(8000)])
    assert bool((first[:, 0] != first[:, 1]).all())
    observed = torch.bincount(first[:, 0], minlength=4).double()
    expected = 8000 * weights.double() / 10
    assert float(((observed - expected) ** 2 / expected).sum()) < 16.27  # chi-square, 3 degrees, p = 0.001
    # Second draw given the first: weight over what is left.
    second = first[first[:, 0] == 3][:, 1]
    observed = torch.bincount(second, minlength=4)[:3].double()
    expected = second.numel() * torch.tensor([1.0, 2.0, 3.0]).double() / 6
    assert float(((observed - expected) ** 2 / expected).sum()) < 13.82


def test_draw_edges():
    assert is_permutation(draw_without_replacement(torch.rand(9) + 0.1, 9), 9)
    with pytest.raises(ValueError, match="count=3 exceeds the 2"):
        draw_without_replacement(torch.ones(2), 3)
    with pytest.raises(ValueError, match="positive and finite"):
        draw_without_replacement(torch.tensor([1.0, 0.0]), 1)


# --- self-paced ----------------------------------------------------------------------------------------------------


def test_self_paced_weights_minimise_their_objective():
    losses, lam = torch.tensor([0.2, 0.9, 1.0, 3.0]).double(), 1.0
    grid = torch.linspace(0, 1, 1001).double()
    hard = [float(grid[(grid * loss - lam * grid).argmin()]) for loss in losses]
    soft = [float(grid[(grid * loss + lam * (grid**2 / 2 - grid)).argmin()]) for loss in losses]
    weights = self_paced_weights(losses, lam)
    # At loss == lambda every weight is a minimum of the hard form.
    assert weights[[0, 1, 3]].tolist() == [hard[0], hard[1], hard[3]]
    assert self_paced_weights(losses, lam, soft=True).tolist() == pytest.approx(soft, abs=1e-3)
    with pytest.raises(ValueError, match="threshold=0"):
        self_paced_weights([1.0], 0)


def test_easiest_share():
    assert easiest_share([3.0, 1.0, 1.0], 0.0).tolist() == [False, True, False]
    assert easiest_share([3.0, 1.0], 1.0).all()
    assert int(easiest_share(torch.rand(10), 0.3).sum()) == 3  # 0.3 * 10 is just above 3 in floating point
    assert int(easiest_share(torch.rand(10), 0.0, min_rows=20).sum()) == 10


def test_refill_counts():
    counts = torch.bincount(refill(torch.tensor([3, 5, 6]), 8), minlength=7)
    assert counts.sum() == 8 and set(counts[[3, 5, 6]].tolist()) == {2, 3}
    assert refill(torch.arange(5), 3).unique().numel() == 3
    with pytest.raises(ValueError, match="no row"):
        refill(torch.empty(0, dtype=torch.int64), 3)


# --- outcomes ------------------------------------------------------------------------------------------------------


def test_pass_rates():
    raw = pass_rate_difficulty([1, 0], [4, 2], prior_passed=0, prior_failed=0)
    assert raw.tolist() == [0.75, 1.0]
    for passed, tried in (([2], [1]), ([-1], [1]), ([1, 1], [1]), ([NAN], [1])):
        with pytest.raises(ValueError, match="0 <= passed <= tried"):
            pass_rate_difficulty(passed, tried)
    with pytest.raises(ValueError, match="prior is empty"):
        pass_rate_difficulty([0], [0], prior_passed=0, prior_failed=0)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        learnability([1.5])


def test_word_rarity():
    rare = word_rarity([[1] * 9, [2], []])
    assert rare.tolist() == pytest.approx([math.log(10 / 9), math.log(10), 0.0])


# --- item response theory ------------------------------------------------------------------------------------------


def test_ability_goldens():
    b, y = torch.tensor([-3.0, -2, -2, -1, -3]), torch.tensor([1.0, 0, 1, 1, 0])
    assert rasch_ability(y, b) == pytest.approx(-0.848772, abs=1e-6)
    assert rasch_ability(y, b, prior_std=None) == pytest.approx(-1.749786, abs=1e-6)
    with_gap = torch.cat([y, torch.tensor([NAN])]), torch.cat([b, torch.tensor([9.0])])
    assert rasch_ability(*with_gap) == pytest.approx(-0.848772, abs=1e-6)


def test_all_right_is_finite_with_a_prior_and_an_error_without():
    b, y = torch.linspace(-2, 2, 9), torch.ones(9)
    assert 1 < rasch_ability(y, b) < 4
    assert rasch_ability(1 - y, b) == pytest.approx(-rasch_ability(y, b))
    with pytest.raises(ValueError, match="All answers agree"):
        rasch_ability(y, b, prior_std=None)
    with pytest.raises(ValueError, match="entries 0, 1 or NaN"):
        rasch_ability(y * 0.5, b)
    with pytest.raises(ValueError, match="difficulty"):
        rasch_ability(y, b[:3])


def test_ability_is_the_maximum_even_far_away():
    b = torch.full((1000,), 30.0).double()
    theta = rasch_ability(torch.ones(1000), b)
    p = torch.sigmoid(theta - b)
    assert float((1 - p).sum()) - theta == pytest.approx(0.0, abs=1e-6)


def test_fit_recovers_simulated_difficulty():
    generator = torch.Generator().manual_seed(0)
    # With 50 examinees the answers themselves allow about 0.95 and no more, whatever the estimator.
    b, theta = torch.randn(200, generator=generator), torch.randn(100, generator=generator)
    answers = (torch.rand(100, 200, generator=generator) < torch.sigmoid(theta[:, None] - b)).float()
    found, ability = fit_rasch(answers)
    assert torch.corrcoef(torch.stack([found, b.double()]))[0, 1] > 0.95
    assert torch.corrcoef(torch.stack([ability, theta.double()]))[0, 1] > 0.95
    # A stationary point of the joint posterior.
    p = torch.sigmoid(ability[:, None] - found)
    assert float(((answers - p).sum(1) - ability).abs().max()) < 1e-4
    assert float(((p - answers).sum(0) - found).abs().max()) < 1e-4


def test_selected_sets_are_nested_as_ability_grows():
    b = torch.randn(100)
    last = torch.zeros(100, dtype=torch.bool)
    for theta in (-3.0, -1.0, 0.0, 1.0, 5.0):
        now = within_ability(b, theta)
        if int(now.sum()) > 1:
            assert bool((now | ~last).all())
        last = now
    assert within_ability(b, 9.0).all()
    assert int(within_ability(b, -9.0, min_rows=5).sum()) == 5
    with pytest.raises(ValueError, match="lower=1"):
        within_ability(b, 0.0, lower=1, upper=0)
    with pytest.raises(ValueError, match="min_rows=101"):
        within_ability(b, 0.0, min_rows=101)
