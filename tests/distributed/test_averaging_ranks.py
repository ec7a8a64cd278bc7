"""
The average of the latest weights at two ranks: that of one process, the same on both, written by the first only; with
evaluations on it, and walks along the updates.
"""

from __future__ import annotations

import os

import pytest
import torch

from hf_effi.callbacks import FastForwardCallback
from hf_effi.callbacks.weight_averaging import WeightAveragingCallback
from hf_effi.recipes import cdma
from tests.helpers import assert_bitwise_equal, lm_dataset, run_distributed, weights_of
from tests.helpers.resume import weights_in
from tests.helpers.sampling import StopAt, sampler_trainer

SCORES = [float((7 * row) % 24) for row in range(24)]


class Writes(WeightAveragingCallback):
    """Counts how often this rank writes."""

    saved = 0

    def _save(self, *args, **kwargs):
        self.saved += 1
        super()._save(*args, **kwargs)


def train(folder: str):
    """CDMA, stopped inside the window and resumed."""
    from transformers import Trainer

    batch = 4 // int(os.environ.get("WORLD_SIZE", "1"))

    def make(*extra):
        average = Writes(3, every_steps=1, swap_in=True, evaluate_on="both")
        callbacks = [*cdma(SCORES, average=average)["callbacks"], *extra]
        over = {"num_train_epochs": 1, "per_device_train_batch_size": batch, "per_device_eval_batch_size": batch}
        over |= {"eval_strategy": "steps", "eval_steps": 3}
        over["eval_dataset"] = lm_dataset(8, length=8, seed=1).add_column("row", list(range(8)))
        return sampler_trainer(folder, Trainer, callbacks=callbacks, **over), average

    make(StopAt(5), FastForwardCallback(2, rows=8, longest=4, limit=3))[0].train()
    walks = FastForwardCallback(2, rows=8, longest=4, limit=3)
    trainer, average = make(walks)
    trainer.train(resume_from_checkpoint=os.path.join(folder, "checkpoint-5"))
    evaluated = [entry for entry in trainer.state.log_history if "eval_averaged_loss" in entry or "eval_loss" in entry]
    losses = [entry.get("eval_averaged_loss", entry.get("eval_loss")) for entry in evaluated]
    return trainer.seen, weights_of(trainer.model), average.saved, losses, walks.walks


def test_two_ranks_average_as_one(tmp_path):
    (seen, weights, saved, *told), (other_seen, other_weights, other_saved, *other_told) = run_distributed(
        train, 2, str(tmp_path / "two")
    )
    alone_seen, alone, _, losses, walks = train(str(tmp_path / "one"))
    assert (saved, other_saved) == (1, 0)
    assert told == other_told and len(told[0]) == 4
    assert told[0] == pytest.approx(losses, rel=1e-4)
    assert [step for step, _ in told[1]] == [step for step, _ in walks] == [2, 4, 6]
    assert seen == other_seen == alone_seen
    assert_bitwise_equal(weights, other_weights)
    found = weights_in(tmp_path / "two" / "averaged")
    assert_bitwise_equal({name: weights[name] for name in found}, found)
    for name in found:
        torch.testing.assert_close(found[name], alone[name], atol=1e-5, rtol=1e-4)
