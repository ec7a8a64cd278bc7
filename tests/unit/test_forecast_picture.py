"""The report draws what was forecast at each step, where a run has it."""

import pytest

from hf_effi.functional import metrics
from hf_effi.report.run_data import forecast_lines
from hf_effi.report.run_page import curves

CAPTION = "Forecast of the end, as it was at each step"


def a_run(steps, rises=False, shift=0.0):
    sign = -1.0 if rises else 1.0
    history = [{"step": step, "loss": 1.0} for step in (1, 2)]
    for step in steps:
        values = {
            "asymptote": 2.0 + shift,
            "remaining": 3.0 / step,
            "at_end": 2.0 + shift + sign * 0.25,
            "at_end_low": 2.0 + shift + sign * 0.25 - 1.0 / step,
            "at_end_high": 2.0 + shift + sign * 0.25 + 0.5 / step,
        }
        history.append({"step": step, **{metrics.FORECAST + name: value for name, value in values.items()}})
    return {"title": "run", "log_history": history, "events": [], "totals": {}}


def test_one_run_has_its_own_range_and_several_have_theirs():
    lines = forecast_lines({"a": [a_run([4, 8])]})
    assert lines["fitted curve"] == [(4, 2.75, 0.0), (8, 2.375, 0.0)]
    band = lines["its end, with the range of the forecast"]
    assert band == [
        (4, pytest.approx(2.1875), pytest.approx(0.1875)),
        (8, pytest.approx(2.21875), pytest.approx(0.09375)),
    ]
    assert forecast_lines({"a": [a_run([4], rises=True)]})["fitted curve"] == [(4, 1.25, 0.0)]
    both = forecast_lines({"a": [a_run([4]), a_run([4], shift=1.0)], "b": [a_run([])]})
    assert list(both) == ["a, fitted curve", "a, its end, with the range of the forecast"]
    assert both["a, its end, with the range of the forecast"][0][1] == pytest.approx(2.75)


def test_only_a_run_with_forecasts_has_the_picture():
    assert CAPTION in curves({"a": [a_run([4, 8])]}) and CAPTION not in curves({"a": [a_run([])]})
