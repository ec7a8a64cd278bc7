"""Growing sequences, and replay with Reptile steps, at two ranks: the shapes, rows and weights of one process."""

from __future__ import annotations

import os

import torch

from hf_effi.callbacks.reptile import ReptileCallback
from hf_effi.functional.data import root_length
from hf_effi.samplers import ReplaySampler
from hf_effi.trainers.mixins.sequence_length import SequenceLengthMixin
from tests.helpers import lm_dataset, run_distributed, tiny_qwen3, weights_of
from tests.helpers.sampling import sampler_trainer

#: SGD: Adam would blow up the last bits of gradients that are near zero
SETTINGS = {"num_train_epochs": 1, "optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}


def growing(folder: str, batch: int):
    from transformers import Trainer, TrainingArguments

    class Noting(SequenceLengthMixin, Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            self.seen.append((inputs["input_ids"].shape[1], inputs["input_ids"].numel(), int(num_items_in_batch)))
            return super().training_step(model, inputs, num_items_in_batch)

    args = TrainingArguments(
        folder,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        per_device_train_batch_size=batch,
        learning_rate=1e-2,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
        **SETTINGS,
    )
    trainer = Noting(
        tiny_qwen3(num_hidden_layers=1),
        args,
        train_dataset=lm_dataset(24, length=32),
        sequence_length=lambda step, total: root_length(step, total // 2, 32, min_length=8),
    )
    trainer.seen = []
    trainer.train()
    return trainer.seen, weights_of(trainer.model)


def replay(folder: str, batch: int):
    sampler = ReplaySampler([row < 8 for row in range(24)], rate=0.25, block=4, num_samples=20)
    over = {"train_sampler": sampler, "per_device_train_batch_size": batch, **SETTINGS}
    trainer = sampler_trainer(folder, callbacks=[ReptileCallback(2, 0.3)], **over)
    trainer.train()
    return trainer.seen, weights_of(trainer.model)


def both(folder: str):
    batch = 4 // int(os.environ.get("WORLD_SIZE", "1"))
    return growing(folder, batch), replay(folder, batch)


def test_two_ranks_are_one(tmp_path):
    (alone, weights), (alone_rows, replayed) = both(str(tmp_path / "one"))
    two = run_distributed(both, 2, str(tmp_path / "two"))
    assert [length for length, *_ in alone] == [8, 16, 24, 32, 32, 32]
    for (seen, theirs), (rows, theirs_replayed) in two:
        # Half of the tokens per rank (24 does not divide 32: its last piece is filled up), one count of predicted
        # tokens.
        assert [(length, 2 * tokens, items) for length, tokens, items in seen] == alone
        assert rows == alone_rows
        torch.testing.assert_close(theirs, weights, rtol=0, atol=1e-6)
        torch.testing.assert_close(theirs_replayed, replayed, rtol=0, atol=1e-6)
