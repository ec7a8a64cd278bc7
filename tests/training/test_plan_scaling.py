"""`hf-effi plan scaling` over tables and records of real runs."""

import json

import pytest

from hf_effi.cli import main
from hf_effi.errors import BrokenFileError
from hf_effi.functional.scaling import ScalingLaw
from hf_effi.report.plan_scaling import points_of_runs
from hf_effi.report.run_data import load_run
from tests.training.test_report_profile import train

LAW = ScalingLaw(1.8, 400.0, 1500.0, 0.35, 0.36)
ROWS = [
    {"parameters": n, "tokens": d, "loss": LAW.predict(n, d)}
    for n in (1e6, 3e6, 1e7, 3e7, 1e8)
    for d in (2e7, 2e8, 2e9)
]


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "points.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return str(path)


def test_a_table_gives_the_law_and_the_best_size(table, capsys):
    call = ["plan", "scaling", table, "--flops", "1e19", "--parameters", "1e9", "--tokens", "1e11", "--bootstrap", "5"]
    assert main([*call, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["law"]["alpha"] == pytest.approx(0.35, rel=1e-2) and found["points"] == 15
    assert found["held_out"]["relative_error"] < 1e-3 and len(found["held_out"]["leave_one_out"]) == 5
    size, tokens, loss = LAW.optimal(1e19)
    assert found["optimal"]["parameters"] == pytest.approx(size, rel=0.05)
    assert found["optimal"]["loss"] == pytest.approx(loss, rel=1e-3) and found["predicted"]["extrapolated"]
    low, high = found["optimal"]["interval_80"]
    assert low <= high
    assert main(call) == 0
    text = capsys.readouterr().out
    assert "L(N, D) = 1.8" in text and "% off, good" in text and "an extrapolation" in text


def test_runs_tell_their_points(tmp_path):
    train(tmp_path / "run", 1e-2)
    run = load_run(tmp_path / "run")
    ((size, tokens, loss),) = points_of_runs([run])
    assert size == run["model"]["parameters"] and tokens == 6 * 4 * 12 and loss > 0
    along = points_of_runs([run], along=True)
    assert [point[1] for point in along] == [2 * 48, 4 * 48, 6 * 48] and along[-1] == (size, tokens, loss)
    with pytest.raises(BrokenFileError, match="does not tell its size"):
        points_of_runs([{**run, "model": {}}])
    with pytest.raises(BrokenFileError, match="does not tell eval_bleu and tokens"):
        points_of_runs([run], "eval_bleu")


@pytest.mark.parametrize(
    ("rows", "options", "code", "message"),
    [
        (ROWS[:3], [], 2, "3 points are fewer than the 6"),
        (ROWS, ["--parameters", "1e9"], 2, "--parameters and --tokens go together"),
        ([{**ROWS[0], "loss": "x"}], [], 2, "row 0: parameters, tokens and loss must be numbers"),
        ([{"parameters": 1}], [], 2, "no column 'tokens'"),
        (ROWS, ["--flops", "-1"], 2, "must be above 0 FLOPs"),
    ],
)
def test_what_cannot_be_fitted(tmp_path, capsys, rows, options, code, message):
    path = tmp_path / "points.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert main(["plan", "scaling", str(path), *options]) == code
    assert message in capsys.readouterr().err


def test_a_folder_without_a_run(tmp_path, capsys):
    assert main(["plan", "scaling", str(tmp_path)]) == 1
    assert "has no effi/effi_run.json" in capsys.readouterr().err
