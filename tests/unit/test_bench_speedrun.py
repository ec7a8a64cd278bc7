"""The speed run: who enters it starts where all start, and the clock leaves evaluations out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import Dataset

from bench import speedrun
from bench._schema import RESULTS

LANGUAGE = Path(speedrun.ENTRIES) / "reference.py"


@pytest.fixture
def workload(tmp_path):
    return speedrun.language_model(speedrun.SMOKE, 0, str(tmp_path))


def test_every_part_runs_on_both_workloads():
    rows = speedrun.main(["--smoke"])
    assert [(row["entry"], row["workload"]) for row in rows] == [
        (entry, workload) for workload in speedrun.WORKLOADS for entry in ("reference", "recommended")
    ]
    for row in rows:
        arrived = row["cpu_seconds_to_target"]
        better = (lambda value, goal: value <= goal) if row["workload"] == "language_model" else (lambda v, g: v >= g)
        met = [cost for cost, value in row["curve"] if better(value, row["target"])]
        assert (met[0] if met else None) == arrived


class Clock:
    """Stands still but for the seconds that it is told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_evaluations_are_outside_of_the_clock_and_the_run_ends_at_the_target(workload):
    clock, values, seen = Clock(), iter([5.0, 3.0, 1.0, 0.5]), []

    def measure(model):
        clock.now += 100
        seen.append(model.training)
        return next(values)

    class Entry:
        @staticmethod
        def language_model(workload):
            clock.now += 2  # what a method does before training counts
            trainer = speedrun.load_entry(LANGUAGE).language_model(workload)
            step = trainer.training_step
            trainer.training_step = lambda *args, **kwargs: (
                setattr(clock, "now", clock.now + 1),
                step(*args, **kwargs),
            )[1]
            return trainer

    row = speedrun.run_entry(Entry, replace(workload, measure=measure, target=1.0, evaluate_every=5), clock)
    assert row["curve"] == [[7.0, 5.0], [12.0, 3.0], [17.0, 1.0]]
    assert (row["cpu_seconds_to_target"], row["updates_to_target"]) == (17.0, 15)
    assert seen == [False] * 3


def test_an_entry_that_never_arrives_has_no_time(workload):
    row = speedrun.run_entry(speedrun.load_entry(LANGUAGE), replace(workload, target=0.0, max_updates=10))
    assert row["cpu_seconds_to_target"] is None and row["updates_to_target"] is None and len(row["curve"]) == 2


def _changed(change):
    class Entry:
        @staticmethod
        def language_model(workload):
            trainer = speedrun.load_entry(LANGUAGE).language_model(workload)
            change(trainer)
            return trainer

    return Entry


def _other_weights(trainer):
    next(trainer.model.parameters()).data.add_(1e-3)


def _other_rows(trainer):
    trainer.train_dataset = Dataset.from_dict({"input_ids": [[1, 2, 3]], "labels": [[1, 2, 3]]})


@pytest.mark.parametrize(
    ("change", "message"),
    [(_other_weights, "starts from other weights"), (_other_rows, "1 rows that are not of workload.rows")],
)
def test_who_starts_elsewhere_is_refused(workload, change, message):
    with pytest.raises(ValueError, match=message):
        speedrun.run_entry(_changed(change), workload)


def test_an_entry_that_is_no_trainer_or_no_file_is_refused(workload, tmp_path):
    class Entry:
        @staticmethod
        def language_model(workload):
            return workload.load_model()

    with pytest.raises(ValueError, match="must return a Trainer"):
        speedrun.run_entry(Entry, workload)
    with pytest.raises(ValueError, match="entries here: recommended, reference"):
        speedrun.load_entry(tmp_path / "nothing.py")
    half = tmp_path / "half.py"
    half.write_text("def grpo(workload): ...\n")
    with pytest.raises(ValueError, match=r"half.py has no function language_model"):
        speedrun.load_entry(half)


def test_an_entry_may_choose_order_and_repeat_rows(workload):
    row = speedrun.run_entry(
        _changed(lambda t: setattr(t, "train_dataset", t.train_dataset.select([3, 1, 1, 2] * 16))), workload
    )
    assert row["curve"]


def test_all_entries_were_tuned_over_as_many_settings():
    counts = set()
    for path in speedrun.ENTRIES.glob("*.py"):
        if path.stem != "__init__":
            module = speedrun.load_entry(path)
            counts.add(tuple(len(values) for values in module.TUNED.values()))
            assert all(vars(module)[name] in values for name, values in module.TUNED.items()), path.name
    assert len(counts) == 1


def test_the_headline_follows_from_the_rows():
    result = json.loads((RESULTS / "speedrun.json").read_text())
    assert speedrun.judge(result["rows"]) == result["headline"]
    assert {row["seed"] for row in result["rows"]} == set(result["seeds"]) and len(result["seeds"]) >= 3
