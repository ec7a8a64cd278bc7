"""The script of the merging bench runs to its end, and its figures are the means that they say they are."""

import json

import pytest

from bench import merging


def test_smoke(tmp_path, capsys):
    merging.main(["--smoke", "--output", str(tmp_path)])
    result = json.loads((tmp_path / "merging.json").read_text())
    rows = [row for row in result["rows"] if row["part"] == "merge"]
    assert {row["arm"] for row in rows} == {*merging.ARMS, merging.SEARCHED}
    assert {row["schedule"] for row in rows} == set(merging.SCHEDULES)
    last = {row["schedule"]: row["loss"] for row in rows if row["arm"] == "last"}
    assert all(row["minus_last"] == pytest.approx(row["loss"] - last[row["schedule"]], abs=2e-5) for row in rows)
    ends = [row for row in result["rows"] if row["part"] == "interpolation" and row["alpha"] == 1]
    assert [row["new_loss"] for row in ends] == [pytest.approx(last[row["schedule"]], abs=1e-4) for row in ends]
    assert {row["lr_ratio"] for row in rows if row["schedule"] == "constant" and "lr_ratio" in row} == {1.0}
    models = {row["model"]: row for row in result["rows"] if row["part"] == "delta"}
    assert len(models) == 6 and models["trained on + 1 delta"]["tuned_loss"] != models["trained on"]["tuned_loss"]
    with pytest.raises(SystemExit):
        merging.main(["--smoke"])
    assert "no result" in capsys.readouterr().err


def test_figures_are_paired_means():
    rows = [
        {"part": "merge", "schedule": "constant", "arm": arm, "seed": seed, "loss": loss, "minus_last": loss - 2.0}
        for arm, losses in (("last", (2.0, 2.0)), ("trend 10", (1.9, 1.7)))
        for seed, loss in enumerate(losses)
    ]
    rows += [{"part": "runs", "schedule": "constant", "loss": 1.5}]
    rows += [
        {
            "part": "interpolation",
            "schedule": schedule,
            "alpha": alpha,
            "seed": 0,
            "old_loss": alpha,
            "new_loss": 1 - alpha,
        }
        for schedule in merging.SCHEDULES
        for alpha in (0, 0.5, 1.0)
    ]
    rows += [{"part": "merge", "schedule": "linear", "arm": "last", "seed": 0, "loss": 1.0, "minus_last": 0.0}]
    models = {"trained on": 3.0, "tuned, then trained on": 2.5, "trained on + 1 delta": 2.0}
    rows += [
        {"part": "delta", "model": name, "learning_rate": 1e-3, "tuned_loss": loss, "other_loss": -loss}
        for name, loss in models.items()
    ]
    found = {figure["name"]: figure["value"] for figure in merging.summary(rows)}
    assert found["delta_0.001_tuned_loss_minus_trained_on"] == -1
    assert found["delta_0.001_other_loss_minus_tuned_then_trained_on"] == 0.5
    assert found["constant_trend_10_minus_last"] == -0.2
    assert found["constant_trend_10_minus_last_standard_error"] == 0.1
    assert found["constant_mean_of_runs_minus_one_run"] == -0.5
    assert found["linear_old_loss_at_0.5_minus_base"] == 0.5 and found["linear_new_loss_at_1_minus_base"] == -1
