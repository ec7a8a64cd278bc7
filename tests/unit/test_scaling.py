"""Scaling laws: constants that made the points come back, published optima, and what is refused."""

import math

import pytest

from hf_effi.functional.scaling import ScalingLaw, fit_scaling_law, held_out_error

TRUE = ScalingLaw(1.8, 400.0, 1500.0, 0.35, 0.36)
SIZES = (1e6, 3e6, 1e7, 3e7, 1e8)
TOKENS = (2e7, 6e7, 2e8, 6e8, 2e9, 6e9)
POINTS = [(n, d, TRUE.predict(n, d)) for n in SIZES for d in TOKENS]


def test_the_constants_come_back_from_noiseless_points():
    law = fit_scaling_law(POINTS)
    assert law.E == pytest.approx(1.8, rel=1e-4) and law.alpha == pytest.approx(0.35, rel=1e-3)
    assert law.A == pytest.approx(400, rel=5e-3) and law.B == pytest.approx(1500, rel=5e-3)
    assert law.beta == pytest.approx(0.36, rel=1e-3) and law.notes == ()
    assert law.predict(1e9, 1e10) == pytest.approx(TRUE.predict(1e9, 1e10), rel=1e-4)


@pytest.mark.parametrize(
    ("constants", "optimum"),
    [
        ((1.69, 406.4, 410.7, 0.34, 0.28), (1.8242e9, 9.1363e10, 2.32888)),
        ((1.82, 482.01, 2085.43, 0.3478, 0.3658), (2.7784e9, 5.9987e10, 2.30832)),
    ],
)
def test_published_optima_at_1e21_flops(constants, optimum):
    found = ScalingLaw(*constants).optimal(1e21)
    assert found == pytest.approx(optimum, rel=1e-4)
    assert 6 * found[0] * found[1] == pytest.approx(1e21, rel=1e-12)


def test_intervals_hold_the_truth_under_noise_and_the_largest_run_is_predicted():
    noisy = [(n, d, loss * (1 + 0.002 * math.sin(7 * i))) for i, (n, d, loss) in enumerate(POINTS)]
    law = fit_scaling_law(noisy, bootstrap=8)
    low, high = law.interval(1e8, 6e9, level=0.9)
    assert low < high and low * 0.99 < TRUE.predict(1e8, 6e9) < high * 1.01
    found = held_out_error(noisy)
    assert found["point"] == noisy[-1] and found["relative_error"] < 0.01
    assert set(found["leave_one_out"]) == set(SIZES) and max(found["leave_one_out"].values()) < 0.05
    with pytest.raises(ValueError, match=r"level=1 must lie between 0 and 1"):
        law.interval(1e8, 1e9, level=1)
    assert law.is_far(1e9, 6e9) and not law.is_far(2e8, 6e9)


def test_what_makes_a_fit_doubtful_is_said():
    few = fit_scaling_law([point for point in POINTS if point[0] in SIZES[:2]])
    assert "2 model sizes are fewer than 5" in few.notes[0]
    free = [(n, d, 400 / n**0.35 + 1500 / d**0.36) for n in SIZES for d in TOKENS]
    assert any("E is near 0" in note for note in fit_scaling_law(free).notes)


@pytest.mark.parametrize(
    ("points", "options", "message"),
    [
        (POINTS[:5], {}, "5 points are fewer than the 6"),
        ([(0.0, 1.0, 1.0), *POINTS], {}, "finite and above 0"),
        ([*POINTS, (1e6, 1e6, math.nan)], {}, "finite and above 0"),
        (POINTS[:6], {}, "one model size"),
        (POINTS[::6] * 2, {}, "one number of tokens"),
        (POINTS, {"bootstrap": -1}, "bootstrap=-1"),
    ],
)
def test_points_that_tell_too_little(points, options, message):
    with pytest.raises(ValueError, match=message):
        fit_scaling_law(points, **options)


def test_laws_without_an_optimum_or_an_interval():
    with pytest.raises(ValueError, match="has no best size"):
        ScalingLaw(1.0, 1.0, 1.0, 0.0, 0.3).optimal(1e20)
    with pytest.raises(ValueError, match="must be above 0 FLOPs"):
        TRUE.optimal(0)
    with pytest.raises(ValueError, match="without resampling"):
        TRUE.interval(1e6, 1e6)
