"""`hf-effi report profile` over records of real runs: costs without evaluations, resumed runs, what it refuses."""

import json

import pytest

from hf_effi import EffiTrainer, EffiTrainingArguments
from hf_effi.cli import main
from hf_effi.errors import BrokenFileError
from hf_effi.report.profile import compare_settings, costs_and_values
from hf_effi.report.run_data import load_run
from tests.helpers import lm_dataset, tiny_llama
from tests.helpers.optimizers import settings


def train(out, rate, resume=None, **over):
    over = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 6, "learning_rate": rate, **over}
    args = EffiTrainingArguments(**settings(out, **over))
    trainer = EffiTrainer(tiny_llama(), args, train_dataset=lm_dataset(), eval_dataset=lm_dataset(8))
    trainer.train(resume_from_checkpoint=resume)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    place = tmp_path_factory.mktemp("runs")
    for seed in (1, 2, 3):
        train(place / "fast" / f"seed{seed}", 1e-2, seed=seed)
        train(place / "slow" / f"seed{seed}", 1e-3, seed=seed)
    return place


def test_costs_leave_evaluations_out_and_a_resume_adds_up(tmp_path):
    train(tmp_path / "run", 1e-2, save_strategy="steps", save_steps=4)
    once = costs_and_values(load_run(tmp_path / "run"), "eval_loss", "updates")
    assert [cost for cost, _ in once] == [2, 4, 6]
    train(tmp_path / "run", 1e-2, resume=str(tmp_path / "run" / "checkpoint-4"), save_strategy="steps", save_steps=4)
    run = load_run(tmp_path / "run")
    again = costs_and_values(run, "eval_loss", "updates")
    assert [cost for cost, _ in again] == [2, 4, 6, 8]  # the last two updates were done twice, and are paid twice
    seconds = costs_and_values(run, "eval_loss", "seconds")
    totals = {event["segment"]: event["totals"]["seconds"] for event in run["events"] if "totals" in event}
    whole = sum(value for part in totals.values() for value in part.values())
    evaluating = sum(part["evaluate"] for part in totals.values())
    assert evaluating > 0 and seconds[-1][0] <= whole - evaluating
    tokens = costs_and_values(run, "eval_loss", "tokens")
    assert tokens[0][0] == 2 * 4 * 12


def test_the_faster_setting_wins(runs, capsys):
    slow = [load_run(runs / "slow" / f"seed{seed}") for seed in (1, 2, 3)]
    target = max(costs_and_values(run, "eval_loss", "updates")[-1][1] for run in slow)
    call = ["report", "profile", f"stock={runs / 'slow'}", str(runs / "fast"), "--target", str(target)]
    assert main([*call, "--unit", "updates", "--baseline", "stock", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"]["fast"]["score"] == 1.0 > found["settings"]["stock"]["score"]
    assert found["settings"]["stock"]["costs"] == [4.0] and found["settings"]["fast"]["costs"] == [2.0]
    assert found["settings"]["stock"]["ratios"] == [2.0] and found["notes"] == []
    assert found["settings"]["fast"]["compute_equivalent_gains"] == [None]  # beyond the baseline's curve
    assert main([*call, "--unit", "updates", "--baseline", "stock"]) == 0
    text = capsys.readouterr().out
    assert "2 (1.00x)" in text and "4 (2.00x)" in text and "beyond the baseline's curve" in text
    assert "Each setting had the same tuning budget" in text


def test_several_workloads_and_too_few_seeds(runs, capsys):
    call = [
        "profile",
        f"a={runs / 'fast'}",
        f"b={runs / 'slow'}",
        "--workload",
        "seed1=100",
        "--workload",
        "seed2=100",
    ]
    assert main([*call, "--unit", "tokens", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["workloads"] == {"seed1": 100.0, "seed2": 100.0} and "Only 1 seed in a cell" in found["notes"][0]
    assert found["settings"]["a"]["ratios"] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ([], 2, "give --target VALUE for one workload"),
        (["--target", "1", "--workload", "a=1"], 2, "give --target VALUE for one workload"),
        (["--workload", "a"], 2, "is not NAME=TARGET"),
        (["--target", "-5"], 2, "No submission reaches the target"),
        (["--target", "1", "--metric", "eval_bleu"], 1, "never logged 'eval_bleu'. It has eval_loss"),
        (["--target", "1", "--baseline", "x"], 2, "--baseline x: the settings are"),
        (["--target", "1", "--baseline", "fast", "--higher"], 2, "needs a metric of which lower"),
        (["--target", "1", "--patience", "0"], 2, "patience=0"),
    ],
)
def test_what_cannot_be_compared(runs, capsys, options, code, message):
    assert main(["report", "profile", str(runs / "fast"), str(runs / "slow"), *options]) == code
    assert message in capsys.readouterr().err


def test_folders_and_machines_that_cannot_be_compared(runs, tmp_path, capsys):
    assert main(["report", "profile", str(tmp_path), "--target", "1"]) == 1
    assert "has no effi/effi_run.json" in capsys.readouterr().err
    assert main(["report", "profile", str(runs / "fast"), str(runs / "fast"), "--target", "1"]) == 2
    assert "two settings are called 'fast'" in capsys.readouterr().err
    run = load_run(runs / "fast" / "seed1")
    other = {**run, "machine": {"cpu": "another"}}
    with pytest.raises(ValueError, match="The runs are of 2 machines, whose seconds cannot be compared"):
        compare_settings({"a": {"": [run]}, "b": {"": [other]}}, {"": 100.0})
    with pytest.raises(BrokenFileError, match="has no record of what it cost"):
        costs_and_values({**run, "events": []}, "eval_loss", "seconds")
