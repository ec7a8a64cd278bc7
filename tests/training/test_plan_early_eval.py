"""`hf-effi plan early-eval` over runs on disk."""

import json

import pytest

from hf_effi.cli import main
from hf_effi.report.plan_early_eval import curves_of
from hf_effi.report.run_data import load_run
from tests.training.test_report_profile import train

STEPS = 20


def write(folder, number, steps=STEPS, planned=STEPS, **more):
    """A run whose loss and gradient norm are the lower the higher its number, from the start."""
    history = []
    for step in range(1, steps + 1):
        norm = 5.0 - number + 0.1 * (step % 2)
        entry = {"step": step, "epoch": step / 10, "learning_rate": 1e-3, "grad_norm": norm}
        history.append({**entry, "loss": 3 - 0.1 * number - step / 50})
        cloze = 0.25 if step < STEPS // 2 else 0.25 + 0.01 * number * step
        measured = {"eval_loss": 3 - 0.1 * number - step / 50 + 0.01 * (step % 3), "eval_cloze": cloze}
        history.append({"step": step, "eval_runtime": 1.0, **measured, **more})
    folder.mkdir(parents=True)
    state = {"log_history": history, "global_step": steps, "max_steps": planned, "stateful_callbacks": {}}
    (folder / "trainer_state.json").write_text(json.dumps(state))


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    place = tmp_path_factory.mktemp("sweep")
    for number in range(6):
        write(place / f"run{number}", number)
    return place


def test_what_says_something_early(sweep, capsys):
    assert main(["plan", "early-eval", str(sweep), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in found["metrics"]}
    assert set(rows) == {"loss", "grad_norm", "eval_loss", "eval_cloze"} and len(found["runs"]) == 6
    assert rows["eval_loss"]["ranking"]["value"] == 1 and rows["eval_loss"]["earliest"] == 0.05
    assert rows["loss"]["noiseless"] and rows["loss"]["signal_to_noise"] is None
    assert rows["eval_cloze"]["ranking"]["value"] is None and rows["eval_cloze"]["earliest"] == 0.5
    assert found["gradient_norm"]["value"] == 1, "a smaller norm, a smaller loss"
    assert found["left_out"] == []
    assert main(["plan", "early-eval", *map(str, sorted(sweep.iterdir()))]) == 0
    text = capsys.readouterr().out
    assert text.startswith("6 runs at 10%, and at their end by eval_loss\n")
    assert "Norm of the gradient at 10% against the final eval_loss: tau 1.00 [1.00, 1.00]." in text
    assert "E2LM's third part (domain compliance, 0.4) cannot be computed" in text and "stops nothing" in text


def test_few_unequal_unfinished_runs_are_named(tmp_path, capsys):
    write(tmp_path / "a", 0, bonus=1.0)
    write(tmp_path / "b", 1, steps=10)
    write(tmp_path / "c", 2, eval_flat=0.5)
    assert main(["plan", "early-eval", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "3 runs have 3 pairs: a tau of so few is meaningless, and none is printed" in text
    assert "1 of the runs are not finished" in text and "different lengths" in text
    assert "Left out, too seldom logged or not in every run: bonus, eval_flat." in text
    assert "Norm of the gradient" not in text


def test_a_metric_that_never_moves(tmp_path, capsys):
    for number in range(5):
        write(tmp_path / str(number), number, eval_flat=0.5)
    assert main(["plan", "early-eval", str(tmp_path)]) == 0
    assert "no signal: it never moves" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--early", "1"], 2, "early=1.0 must lie between 0 and 1"),
        (["--target", "eval_bleu"], 2, "never logged 'eval_bleu'"),
        (["--draws", "2"], 2, "draws=2"),
    ],
)
def test_what_is_refused(sweep, capsys, options, code, words):
    assert main(["plan", "early-eval", str(sweep), *options]) == code
    assert words in capsys.readouterr().err


def test_no_runs(tmp_path, capsys):
    assert main(["plan", "early-eval", str(tmp_path)]) == 1
    assert "has no effi/effi_run.json" in capsys.readouterr().err


def test_a_recorded_run_is_read(tmp_path):
    train(tmp_path / "run", 1e-2, logging_steps=1)
    curves = curves_of(load_run(tmp_path / "run"))
    assert set(curves) == {"loss", "grad_norm", "eval_loss"} and len(curves["loss"]) == 6
