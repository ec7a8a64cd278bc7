"""A dataset that sleeps on purpose is named by the doctor and stands in the log; a healthy one is not."""

from __future__ import annotations

import json
import time

import pytest
from torch.utils.data import Dataset

from hf_effi import RunRecordCallback, read_run
from hf_effi.callbacks import LoaderWaitCallback
from hf_effi.functional import metrics
from hf_effi.functional.doctor_loader import LoaderClock
from tests.helpers import compare_runs, lm_dataset, record_run
from tests.training._doctor_runs import rules, silent, train


class Sleeping(Dataset):
    """Tokenises in every row, so to speak."""

    def __init__(self, seconds: float) -> None:
        self.rows, self.seconds = list(lm_dataset(32, length=8)), seconds

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int):
        time.sleep(self.seconds)
        return self.rows[index]


def fractions(trainer) -> list[float]:
    logs = trainer.state.log_history
    return [entry[metrics.DATA_WAIT_FRACTION] for entry in logs if metrics.DATA_WAIT_FRACTION in entry]


@pytest.fixture(scope="module")
def waiting(tmp_path_factory):
    """Seven updates, four rows of a tenth of a second in each."""
    folder = tmp_path_factory.mktemp("waiting")
    doctor = silent()
    callbacks = (LoaderWaitCallback(), doctor, RunRecordCallback())
    return folder, doctor, train(folder, *callbacks, rows=Sleeping(0.1), max_steps=7)


def test_the_doctor_names_a_loader_that_the_steps_wait_for(waiting):
    _, doctor, _ = waiting
    assert rules(doctor) == ["loader_waits"]
    assert doctor.findings[0].step == 6  # the first update has no begin, and five entries are needed
    assert "TokenBlocks" in doctor.findings[0].advice and "dataloader_num_workers" in doctor.findings[0].advice


def test_the_share_stands_in_the_log_and_in_the_record(waiting):
    folder, _, trainer = waiting
    assert len(fractions(trainer)) == 6 and all(0 < value <= 1 for value in fractions(trainer))
    assert metrics.DATA_WAIT_SECONDS in trainer.state.log_history[1]
    logged = [entry for entry in read_run(folder)["log_history"] if metrics.DATA_WAIT_FRACTION in entry]
    assert len(logged) == 6
    json.dumps(logged)


def test_a_healthy_run_is_the_one_without_the_callback_and_has_no_finding(tmp_path):
    doctor = silent()
    watched = train(tmp_path, LoaderWaitCallback(), doctor, eval_strategy="no")
    compare_runs(record_run(train(tmp_path)), record_run(watched))
    assert rules(doctor) == [] and len(fractions(watched)) == 7


def test_saves_do_not_count_and_a_resume_goes_on(tmp_path):
    class Slow(LoaderWaitCallback):
        """On a clock that goes on in saves alone."""

        at = 0.0

        def on_train_begin(self, *args, **kwargs):
            super().on_train_begin(*args, **kwargs)
            self._clock = LoaderClock(now=lambda: self.at)

        def on_save(self, *args, **kwargs):
            self.at += 100.0
            super().on_save(*args, **kwargs)

    first = train(tmp_path, Slow(), silent(), max_steps=7, save_strategy="steps", save_steps=1)
    assert fractions(first) == [0.0] * 6
    resumed = train(tmp_path, LoaderWaitCallback(), resume=str(tmp_path / "checkpoint-4"), max_steps=7)
    assert len(fractions(resumed)) == 3 + 2  # three of the checkpoint, and all but the first of the resumed run


def test_a_failure_ends_nothing(tmp_path, monkeypatch, caplog):
    callback = LoaderWaitCallback()
    monkeypatch.setattr("hf_effi.callbacks.loader_wait.LoaderClock.take", lambda self: 1 / 0)
    assert train(tmp_path, callback, max_steps=2).state.global_step == 2
    assert "adds nothing to this log entry, and the run goes on: ZeroDivisionError" in caplog.text
