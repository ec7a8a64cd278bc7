"""
The average of the last checkpoints at two ranks: that of one process, the same on both, written by the first only.
"""

from __future__ import annotations

import os

import torch

from hf_effi.callbacks.weight_averaging import WeightAveragingCallback
from hf_effi.recipes import cdma
from tests.helpers import assert_bitwise_equal, run_distributed, weights_of
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
        average = Writes(3, every_steps=1, swap_in=True)
        callbacks = [*cdma(SCORES, average=average)["callbacks"], *extra]
        over = {"num_train_epochs": 1, "per_device_train_batch_size": batch}
        return sampler_trainer(folder, Trainer, callbacks=callbacks, **over), average

    make(StopAt(5))[0].train()
    trainer, average = make()
    trainer.train(resume_from_checkpoint=os.path.join(folder, "checkpoint-5"))
    return trainer.seen, weights_of(trainer.model), average.saved


def test_two_ranks_average_as_one(tmp_path):
    (seen, weights, saved), (other_seen, other_weights, other_saved) = run_distributed(train, 2, str(tmp_path / "two"))
    alone_seen, alone, _ = train(str(tmp_path / "one"))
    assert (saved, other_saved) == (1, 0)
    assert seen == other_seen == alone_seen
    assert_bitwise_equal(weights, other_weights)
    found = weights_in(tmp_path / "two" / "averaged")
    assert_bitwise_equal({name: weights[name] for name in found}, found)
    for name in found:
        torch.testing.assert_close(found[name], alone[name], atol=1e-5, rtol=1e-4)
