"""The referee by hand: cost to a target, performance profiles, compute-equivalent gain."""

import math

import pytest

from hf_effi.functional.referee import compute_equivalent_gain, median_cost, performance_profile, time_to_target

CURVE = [(10.0, 3.0), (20.0, 2.0), (30.0, math.nan), (40.0, 1.0), (50.0, 2.5), (60.0, 0.5), (70.0, 0.4)]


@pytest.mark.parametrize(
    ("target", "options", "cost"),
    [
        (3.0, {}, 10.0),
        (2.0, {}, 20.0),
        (1.5, {}, 40.0),  # NaN meets nothing
        (1.5, {"interpolate": True}, 40.0),  # and nothing can be drawn from it
        (2.5, {"interpolate": True}, 15.0),
        (1.0, {"patience": 2}, 60.0),
        (0.1, {}, None),
        (0.4, {"patience": 2}, None),
    ],
)
def test_cost_to_a_target(target, options, cost):
    assert time_to_target(CURVE, target, "lower", **options) == cost


def test_higher_can_be_better_and_an_empty_curve_never_arrives():
    assert time_to_target([(1, 0.2), (2, 0.6)], 0.5, "higher") == 2
    assert time_to_target([(1, 0.2), (3, 0.6)], 0.4, "higher", interpolate=True) == pytest.approx(2.0)
    assert time_to_target([], 0.5, "higher") is None


@pytest.mark.parametrize(
    ("points", "options", "message"),
    [
        ([(2, 1.0), (1, 0.5)], {}, "must not fall"),
        (CURVE, {"direction": "up"}, "must be 'lower' or 'higher'"),
        (CURVE, {"patience": 0}, "patience=0"),
        (CURVE, {"target": math.nan}, "target=nan"),
    ],
)
def test_curves_and_arguments_out_of_range(points, options, message):
    with pytest.raises(ValueError, match=message):
        time_to_target(points, **{"target": 1.0, "direction": "lower", **options})


def test_profiles_are_algoperfs():
    profile = performance_profile({"A": (1, 2, 10), "B": (2, 1, 4), "C": (4, 8, None)})
    assert profile.ratios == {"A": (1, 2, 2.5), "B": (2, 1, 1), "C": (4, 8, math.inf)}
    assert profile.scores["A"] == pytest.approx(0.7222, abs=5e-5)
    assert profile.scores["B"] == pytest.approx(0.8889, abs=5e-5) and profile.scores["C"] == 0
    assert profile.curve("A") == [(1.0, 1 / 3), (2, 2 / 3), (2.5, 1.0), (4.0, 1.0)]
    assert profile.share_within("C", 4) == 1 / 3
    assert performance_profile({"alone": [7.0]}).scores == {"alone": 1.0}


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        ({}, "one cost for each workload"),
        ({"A": []}, "one cost for each workload"),
        ({"A": [1], "B": [1, 2]}, "one cost for each workload"),
        ({"A": [0.0]}, "above 0"),
        ({"A": [math.nan]}, "above 0"),
        ({"A": [1, None], "B": [1, None]}, "No submission reaches the target of workload 1"),
    ],
)
def test_tables_that_say_nothing(costs, message):
    with pytest.raises(ValueError, match=message):
        performance_profile(costs)
    with pytest.raises(ValueError, match="r_max=1"):
        performance_profile({"A": [1.0]}, r_max=1)


def test_compute_equivalent_gain_of_shifted_curves():
    base = [(c, 3 * c**-0.3) for c in (1.0, 2.0, 4.0, 8.0, 16.0)]
    for compute, loss in base[1:-1]:
        assert compute_equivalent_gain(base, compute, loss) == pytest.approx(1.0, rel=1e-12)
        assert compute_equivalent_gain(base, compute / 2, loss) == pytest.approx(2.0, rel=1e-12)
    between = 3 * 3.0**-0.3
    assert compute_equivalent_gain(base, 1.5, between) == pytest.approx(2.0, rel=1e-12)
    assert compute_equivalent_gain(base, 16.0, base[-1][1] * 0.99) is None  # beyond the best of the baseline
    assert compute_equivalent_gain(base, 1.0, base[0][1] * 1.01) is None
    worse = [*base, (3.0, 2.9)]  # dearer and worse than a cheaper one: it does not count
    assert compute_equivalent_gain(worse, 1.5, between) == pytest.approx(2.0, rel=1e-12)
    with pytest.raises(ValueError, match="at least 2 points"):
        compute_equivalent_gain(base[:1], 1.0, 1.0)
    with pytest.raises(ValueError, match="numbers above 0"):
        compute_equivalent_gain(base, 0.0, 1.0)


def test_a_median_over_seeds_counts_those_that_did_not_arrive():
    assert median_cost([5.0, 1.0, None]) == 5.0
    assert median_cost([1.0, None]) is None
    assert median_cost([2.0]) == 2.0
    with pytest.raises(ValueError, match="at least one seed"):
        median_cost([])
