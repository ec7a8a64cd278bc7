"""The curve of a range test: when it ends, what it suggests, and how the two forms are told apart."""

import math

import pytest
import torch

from hf_effi.functional.schedules.range_curve import RangeCurve, smooth_losses
from hf_effi.schedules import lr_range_test
from hf_effi.schedules.range_test import _judge


def pushed(losses, **settings):
    curve = RangeCurve(**settings)
    going = [curve.push(10.0**i, loss) for i, loss in enumerate(losses)]
    return curve, going


def test_smoothing_by_hand():
    assert smooth_losses([]) == [] and smooth_losses([3.0, 1.0], 0.0) == [3, 1]
    assert smooth_losses([4.0, 2.0, 1.0], 0.5) == pytest.approx([4, 8 / 3, 12 / 7])
    assert smooth_losses([2.0] * 5, 0.98) == pytest.approx([2] * 5)


def test_a_sweep_ends_above_the_factor_and_at_what_is_no_number():
    curve, going = pushed([3.0, 1.0, 3.9, 4.1], smoothing=0.0)
    assert going == [True, True, True, False] and curve.losses[-1] == 4.1
    assert curve.stopped == "at 1e+03 the smoothed loss was 4.1 times its lowest"
    for bad in (math.nan, math.inf):
        curve, going = pushed([3.0, bad])
        assert going == [True, False] and curve.losses == [3.0] and f"the loss was {bad}" in curve.stopped
    assert pushed([0.0, 5.0, -1.0])[1] == [True] * 3  # no factor of a loss that is not above 0
    assert pushed([2.0] * 4)[0].stopped is None


def test_the_report_says_why():
    falling = [5.0, 5.0, 4.0, 2.0, 1.0, 1.5, 9.0]
    report = _judge([pushed(falling, smoothing=0.0)[0] for _ in range(2)], 0.0)
    # The fastest fall is from 1e2 to 1e3, the lowest loss at 1e4.
    assert (report.low, report.high, report.spread) == (1000.0, 1000.0, 1.0)
    assert report.confidence == "low"  # two equal sweeps confirm nothing
    assert report.reason == (
        "the loss fell fastest at 1e+03, and a tenth of the rate of the lowest loss is 1e+03; 2 of 2 sweeps ended "
        "early (at 1e+06 the smoothed loss was 9 times its lowest)"
    )
    assert str(report).startswith("1e+03 to 1e+03 (confidence low): the loss fell fastest")
    assert report.curve[3] == (1000.0, 2.0, 2.0)
    other = pushed([5.0, 5.0, 4.0, 2.1, 1.0, 1.5, 9.0], smoothing=0.0)[0]
    assert _judge([pushed(falling, smoothing=0.0)[0], other], 0.0).confidence == "high"
    flat = _judge([pushed([2.0] * 12)[0]], 0.9)
    assert flat.high is None and flat.confidence == "none"
    assert (
        str(flat) == "no range found (confidence none): the smoothed loss fell in 0 of 1 sweeps; no sweep ended early"
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"stop_factor": 1.0}, "stop_factor=1.0"), ({"smoothing": 1.0}, "smoothing=1.0"), ({"steps": 50}, "steps=50")],
)
def test_the_form_with_batches_names_what_it_refuses(settings, words):
    model = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match=words):
        lr_range_test(model, torch.optim.SGD(model.parameters(), 0.1), [torch.zeros(1, 1)] * 10, **settings)


def test_smoothing_moves_the_suggestion():
    losses = [5.0, 5.0, 4.0, 2.0, 1.0, 3.0, 1.2, 3.0]
    lazy, plain = (_judge([pushed(losses, smoothing=s)[0]], s) for s in (0.9, 0.0))
    assert plain.high == 1e3 and lazy.high == 1e5
