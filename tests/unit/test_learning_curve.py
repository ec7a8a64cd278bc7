"""Curves that are known are found again; what tells no curve says why."""

import math

import pytest
import torch

from hf_effi.errors import RefusedError
from hf_effi.functional.learning_curve import (
    asymptote_trace,
    fit_power_curve,
    forecast,
    prediction_level,
)

STEPS = [1.0, 2.0, 4.0, 8.0, 16.0]


def law(steps, a=2.0, b=3.0, c=0.5):
    return [a + b * t**-c for t in steps]


def test_the_golden_curve():
    curve = fit_power_curve(STEPS, law(STEPS))
    assert (curve.asymptote, curve.scale, curve.power) == pytest.approx((2.0, 3.0, 0.5), abs=1e-10)
    assert curve.count == 5 and curve.last == 16 and curve.residual < 1e-12
    assert curve(64.0) == pytest.approx(2.375, abs=1e-10)


@pytest.mark.parametrize("constants", [(0.0, 1.0, 2.0), (-4.0, 0.5, 0.05), (1e-3, 2e-4, 1.0), (300.0, 1e4, 0.3)])
@pytest.mark.parametrize("unit", [1.0, 1e9])
def test_other_constants_and_units(constants, unit):
    a, b, c = constants
    steps = [unit * t for t in range(1, 30)]
    curve = fit_power_curve(steps, [a + b * (t / unit) ** -c for t in steps])
    assert (curve.asymptote, curve.scale / unit**c, curve.power) == pytest.approx(constants, rel=1e-6, abs=1e-9)


def test_a_metric_that_rises():
    values = [-y for y in law(STEPS)]
    curve = fit_power_curve(STEPS, values, greater_is_better=True)
    assert (curve.asymptote, curve.scale) == pytest.approx((-2.0, -3.0), abs=1e-10)
    found = forecast(STEPS, values, greater_is_better=True)
    assert found.remaining == pytest.approx(0.75, abs=1e-10), "what is left is positive where it still improves"


def test_values_that_are_no_numbers_are_left_out():
    steps, values = [*STEPS, 32.0, 64.0], [*law(STEPS), math.nan, math.inf]
    assert fit_power_curve(steps, values) == fit_power_curve(STEPS, law(STEPS))
    assert len(asymptote_trace(steps, values)) == 1


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([], "0 finite values are fewer than the 5"),
        ([3.0] * 4, "4 finite values are fewer than the 5"),
        ([math.nan] * 9, "0 finite values are fewer than the 5"),
        ([0.0] * 9, "all values are equal"),
        ([2.5] * 9, "all values are equal"),
        ([float(i) for i in range(9)], "the values get worse"),
        ([math.log(i + 1) for i in range(9)], "the values get worse"),
        ([-math.log(i + 1) for i in range(9)], "go on like a logarithm"),
        ([-float(i) for i in range(9)], "go on like a logarithm"),
    ],
)
def test_what_tells_no_curve_says_why(values, words):
    steps = [float(i + 1) for i in range(len(values))]
    with pytest.raises(RefusedError, match=words):
        fit_power_curve(steps, values)
    assert asymptote_trace(steps, values) == [None] * max(0, sum(map(math.isfinite, values)) - 4)


@pytest.mark.parametrize(
    ("steps", "values", "options", "words"),
    [
        ([1.0], [1.0, 2.0], {}, "1 steps but 2 values"),
        ([0.0, 1.0], [1.0, 2.0], {}, "must be finite and above 0"),
        ([1.0, math.nan], [1.0, 2.0], {}, "must be finite and above 0"),
        ([2.0, 2.0], [1.0, 2.0], {}, "must rise"),
        (STEPS, law(STEPS), {"skip_fraction": 1.0}, "skip_fraction=1.0"),
        (STEPS, law(STEPS), {"end": 8.0}, "end=8.0 lies before the last step 16"),
        (STEPS, law(STEPS), {"tolerance": 0.0}, "tolerance=0.0"),
    ],
)
def test_arguments_out_of_range(steps, values, options, words):
    with pytest.raises(ValueError, match=words):
        forecast(steps, values, **options)


def test_the_beginning_is_skipped():
    steps = [float(i) for i in range(1, 41)]
    values = [9.0] * 10 + law(steps)[10:]
    curve = fit_power_curve(steps, values, skip_fraction=0.25)
    assert curve.asymptote == pytest.approx(2.0, abs=1e-9) and curve.count == 30
    # Each prefix skips a share of its own: the shorter ones still see the other curve.
    trace = asymptote_trace(steps, values, skip_fraction=0.25)
    assert len(trace) == 36 and trace[-1] == curve and trace[12] is None


def test_the_longest_prefixes_alone():
    steps = [float(i) for i in range(1, 21)]
    whole = asymptote_trace(steps, law(steps))
    assert len(whole) == 16 and asymptote_trace(steps, law(steps), last=3) == whole[-3:]
    assert asymptote_trace(steps[:4], law(steps)[:4]) == []
    with pytest.raises(ValueError, match="last=0"):
        asymptote_trace(steps, law(steps), last=0)


def test_the_range_is_that_of_the_last_five_fits():
    generator = torch.Generator().manual_seed(0)
    steps = [float(10 * i) for i in range(1, 41)]
    noise = (0.01 * torch.randn(40, generator=generator)).tolist()
    values = [y + e for y, e in zip(law(steps, c=0.7), noise, strict=True)]
    found = forecast(steps, values, end=1600)
    recent = asymptote_trace(steps, values, last=5)
    assert found.curve == recent[-1] and found.step == 400
    ends, left = [one(1600) for one in recent], [one(400) - one.asymptote for one in recent]
    assert (found.at_end_low, found.at_end_high) == (min(ends), max(ends))
    assert (found.remaining_low, found.remaining_high) == pytest.approx((min(left), max(left)))
    assert found.at_end == pytest.approx(law([1600.0], c=0.7)[0], abs=0.02)


def test_steady_needs_three_small_moves_and_errors_of_both_signs():
    steps = [2.0**i for i in range(12)]
    exact = law(steps)
    trace = asymptote_trace(steps, exact)
    assert prediction_level(trace, steps, exact, 1e-6) == 3, "the fourth fit is the first with three moves"
    assert prediction_level(trace[:3], steps, exact, 1.0) is None
    with pytest.raises(ValueError, match="tolerance=-1"):
        prediction_level(trace, steps, exact, -1)
    # Two powers: the asymptote of one keeps moving the same way, however slowly.
    steps = [float(10 * i) for i in range(1, 60)]
    values = [2 + 3 * t**-1.5 + 0.3 * t**-0.2 for t in steps]
    trace = asymptote_trace(steps, values)
    moves = [abs(b.asymptote - a.asymptote) for a, b in zip(trace, trace[1:], strict=False)]
    assert max(moves[-3:]) < 0.01 and not forecast(steps, values).is_steady
