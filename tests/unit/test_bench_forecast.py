"""The benches of forecasts and of early signals run in all their parts, and judge by the rates themselves."""

import pytest

from bench import early_eval, forecast


def test_every_part_of_the_forecast_runs(monkeypatch):
    monkeypatch.setattr(forecast, "SMOKE", forecast.Size(seen=10, every=1, seeds=(0,), schedules=21, standing=4))
    rows = forecast.main(["--smoke"])
    assert {row["part"] for row in rows} == {"end", "falls", "stands"}
    found = {figure["name"]: figure["value"] for figure in forecast.figures(rows)}
    assert found["false_stops_on_falling_schedules"] == found["forecasts_before_a_fall"] == 0
    assert found["falling_schedules"] == 21 and found["stops_on_standing_schedules"] == 1.0


def test_every_part_of_the_sweep_runs():
    rows = early_eval.main(["--smoke"])
    assert [row["part"] for row in rows] == ["run"] * 6 + ["metric"] * 4
    assert {figure["name"] for figure in early_eval.figures(rows)} >= {"tau_at_a_tenth_eval_loss"}


@pytest.mark.parametrize(
    ("rates", "step", "expected"),
    [([[1.0], [1.0], [0.5]], 2, True), ([[1.0], [0.5], [0.5]], 2, False), ([[1.0, 1.0], [1.0, 0.9]], 1, True)],
)
def test_a_later_fall_of_any_group_is_seen(rates, step, expected):
    assert forecast.falls_after(rates, step) == expected
