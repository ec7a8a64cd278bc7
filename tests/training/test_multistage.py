"""Multistage filtering through `trainer.train()`: what is forwarded, what is trained on, and resume in every stage."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset

from hf_effi.data import RowLoss
from hf_effi.samplers import MultistageSampler
from tests.helpers import compare_runs
from tests.helpers.sampling import sampler_trainer, stop_and_resume

ROWS = 64


def rows_to_train_on():
    """Even rows repeat one token, which is learned at once; odd rows are random over ten tokens, never learned."""
    draw = torch.Generator().manual_seed(0)
    rows = [[10] * 8 if row % 2 == 0 else torch.randint(20, 30, (8,), generator=draw).tolist() for row in range(ROWS)]
    return Dataset.from_dict({"input_ids": rows, "labels": rows, "row": list(range(ROWS))})


def collate(batch):
    return {key: torch.tensor([row[key] for row in batch]) for key in ("input_ids", "labels")}


class Counting(RowLoss):
    """Notes which rows are forwarded to be measured."""

    def __call__(self, model, rows):
        self.forwarded.append(list(rows))
        return super().__call__(model, rows)


def sampler_of(data):
    measure = Counting(data, collate)
    measure.forwarded = []
    return MultistageSampler(
        data["input_ids"][:], measure, window=16, num_samples=8, threshold_rows=16, switch_rows=8, switch_loss=0.6
    )


def make(folder, callbacks):
    data = rows_to_train_on()
    return sampler_trainer(
        folder, train_dataset=data, train_sampler=sampler_of(data), num_train_epochs=5, callbacks=callbacks
    )


def test_stages_in_a_trainer(tmp_path):
    trainer = make(tmp_path, [])
    trainer.train()
    sampler = trainer.train_sampler
    assert trainer.state.global_step == 10  # 5 rounds of 8 samples, whatever was filtered
    rounds = [[row for batch in trainer.seen[first : first + 2] for row in batch] for first in range(0, 10, 2)]
    assert sorted(rounds[0]) == sorted(sampler.candidates(0))
    assert [entry["stage"] for entry in sampler.history] == [0, 1, 2, 2, 2]
    measured = sampler.measure.forwarded
    assert sorted(measured[0]) == sorted(sampler.candidates(1))  # round 0 measures nothing
    for rows in measured[1:]:
        assert len(rows) < 16 and all(row % 2 for row in rows)  # easy rows are not even forwarded
    assert all(entry["hard"] > 0 for entry in sampler.history[1:])
    hard = [row % 2 for served in rounds[1:] for row in served]
    assert sum(hard) / len(hard) > 0.8  # a shuffled order: 0.5


@pytest.mark.parametrize("step", [1, 3, 4, 7])
def test_resume_is_the_uninterrupted_run(tmp_path, step):
    """In stage 0, in stage 1, between two rounds, in stage 2."""
    whole, broken, (wanted, seen) = stop_and_resume(tmp_path, make, step=step)
    compare_runs(whole, broken)
    assert seen == wanted
