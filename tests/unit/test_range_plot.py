"""The picture of a range test."""

import math

import pytest

from hf_effi.functional.schedules.range_curve import RangeCurve
from hf_effi.report import plot_range_test
from hf_effi.schedules.range_test import _judge


def judged(*losses):
    curves = []
    for series in losses:
        curves.append(RangeCurve(4.0, 0.0))
        for power, loss in enumerate(series):
            curves[-1].push(10.0 ** (power - 5), loss)
    return _judge(curves, 0.0)


def test_what_is_drawn(tmp_path):
    report = judged([4.0, 3.0, 1.0, 9.0], [4.0, 3.5, 1.0, 2.0])
    axes = plot_range_test(report, tmp_path / "a" / "range.png").axes[0]
    assert (tmp_path / "a" / "range.png").stat().st_size > 1000
    assert axes.get_xscale() == "log" and axes.get_xlabel() == "learning rate"
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["sweep 1, smoothed", "sweep 2, smoothed", "0.0001 to 0.001 (confidence high)"]
    low, high = axes.get_ylim()
    assert low < 1 and 4 < high < 9, "the end of a broken sweep does not flatten the rest"
    assert len(axes.lines) == 4 and [*axes.lines[0].get_ydata()] == [4, 3, 1, 9]


def test_what_cannot_be_drawn_is_named():
    assert len(plot_range_test(judged([2.0])).axes[0].get_legend().get_texts()) == 1
    with pytest.raises(ValueError, match="no finite loss"):
        plot_range_test(judged([math.nan]))
    with pytest.raises(ValueError, match="test is list, not a RangeTest"):
        plot_range_test([])
