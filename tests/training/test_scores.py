"""Scores in a column decide what `trainer.train()` serves, and a run that scores anew resumes exactly."""

from __future__ import annotations

import pytest
import torch

from hf_effi.data import ColumnScore, ModelScore, add_score
from hf_effi.functional.data import instruct_mining, keep_by_judge, learnability, row_lengths
from hf_effi.samplers import QualityAscendingSampler
from tests.helpers import compare_runs, lm_dataset, tiny_qwen3
from tests.helpers.sampling import sampler_trainer, stop_and_resume

#: these tests look at the order; what it is worth under a decay is the business of tests/training/test_recipes.py
pytestmark = pytest.mark.filterwarnings("ignore::hf_effi.errors.DecayToZeroWarning")

ROWS = 24
INDICATORS = ("reward", "understandability", "naturalness", "coherence")


def dataset_of_rows():
    dataset = lm_dataset(ROWS, length=8).add_column("row", list(range(ROWS)))
    draw = torch.Generator().manual_seed(3)
    for name in (*INDICATORS, "rate"):
        dataset = dataset.add_column(name, torch.rand(ROWS, generator=draw).tolist())
    return dataset.add_column("rating", [(row * 7 % 11) / 2 for row in range(ROWS)])


def scored(kind, folder):
    scorers = {
        "loss": lambda: ModelScore(tiny_qwen3(5)),
        "perplexity": lambda: ModelScore(tiny_qwen3(5), "perplexity"),
        "length": lambda: ColumnScore(row_lengths, ["input_ids"]),
        "learnability": lambda: ColumnScore(learnability, ["rate"]),
        "instruct_mining": lambda: ColumnScore(instruct_mining, {name: name for name in INDICATORS}),
    }
    return add_score(dataset_of_rows(), "score", scorers[kind](), cache_dir=folder, shard_size=5, progress=False)


@pytest.mark.parametrize("kind", ["loss", "perplexity", "length", "learnability", "instruct_mining"])
@pytest.mark.parametrize("descending", [False, True])
def test_rows_come_in_the_order_of_the_column(tmp_path, kind, descending):
    dataset = scored(kind, tmp_path / "scores")
    sampler = QualityAscendingSampler(dataset["score"][:], descending=descending)
    trainer = sampler_trainer(tmp_path, train_dataset=dataset, train_sampler=sampler, num_train_epochs=1)
    trainer.train()
    served = [row for batch in trainer.seen for row in batch]
    assert sorted(served) == list(range(ROWS))
    along = [dataset["score"][row] for row in served]
    assert along == sorted(along, reverse=descending)


def test_a_broken_run_scores_from_the_cache_and_ends_in_the_same_weights(tmp_path, monkeypatch):
    forwarded = []
    call = ModelScore.__call__
    monkeypatch.setattr(ModelScore, "__call__", lambda self, batch: forwarded.append(batch) or call(self, batch))

    def make(folder, callbacks):
        dataset = scored("loss", tmp_path / "scores")  # as in a script that is started again
        sampler = QualityAscendingSampler(dataset["score"][:], buckets=3)
        return sampler_trainer(
            folder, train_dataset=dataset, train_sampler=sampler, num_train_epochs=2, callbacks=callbacks
        )

    whole, broken, (wanted, seen) = stop_and_resume(tmp_path / "runs", make, step=8)
    compare_runs(whole, broken)
    assert seen == wanted
    # Three starts, one scoring: shards of 5 rows and a last one of 4, each one batch.
    assert [len(batch["input_ids"]) for batch in forwarded] == [5, 5, 5, 5, 4]


def test_adding_a_column_changes_nothing_by_itself(tmp_path):
    runs = []
    for name, dataset in (("stock", dataset_of_rows()), ("column", scored("loss", tmp_path / "scores"))):
        trainer = sampler_trainer(tmp_path / name, train_dataset=dataset, num_train_epochs=1)
        trainer.train()
        runs.append((trainer.seen, [weight.clone() for weight in trainer.model.parameters()]))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


def test_training_on_what_the_judge_kept(tmp_path):
    dataset = dataset_of_rows()
    kept = keep_by_judge(dataset["rating"][:]).nonzero().flatten().tolist()
    assert 0 < len(kept) < ROWS
    chosen = dataset.select(kept)
    sampler = QualityAscendingSampler(chosen["rating"][:])
    trainer = sampler_trainer(tmp_path, train_dataset=chosen, train_sampler=sampler, num_train_epochs=1)
    trainer.train()
    served = [row for batch in trainer.seen for row in batch]
    assert sorted(served) == kept
    ratings = [dataset["rating"][row] for row in served]
    assert ratings == sorted(ratings) and min(ratings) >= 4.5
