"""A batch transform at two ranks: the same switch, the same tokens, the same weights as at one."""

from __future__ import annotations

import os

import pytest
import torch

from tests.helpers import run_distributed

META = 3  # no row of the dataset has this token


def train(folder: str, dispatch: bool, dropout: float):
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    from hf_effi import BatchTransformMixin, MetadataCollator, MetadataConditioning
    from tests.helpers import lm_dataset, tiny_qwen3, weights_of

    class Noting(BatchTransformMixin, Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            self.seen.append(((inputs["input_ids"][:, 0] == META).tolist(), int(num_items_in_batch)))
            return super().training_step(model, inputs, num_items_in_batch)

    # Metadata of several lengths, so that the ranks' batches differ in width; a dispatcher needs one width.
    rows = [
        {**row, "metadata_ids": [META] * (1 if dispatch else 1 + i % 3)}
        for i, row in enumerate(lm_dataset(32, length=8))
    ]
    collator = MetadataCollator(0)
    args = TrainingArguments(
        folder,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        per_device_train_batch_size=4 // int(os.environ.get("WORLD_SIZE", "1")),
        learning_rate=1e-3,
        max_grad_norm=0.0,
        optim="sgd",
        max_steps=6,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
        accelerator_config={"dispatch_batches": dispatch},
        seed=3,
    )
    trainer = Noting(
        tiny_qwen3(num_hidden_layers=1),
        args,
        collator,
        Dataset.from_list(rows),
        batch_transform=MetadataConditioning(collator, cooldown_fraction=0.34, dropout=dropout),
    )
    trainer.seen = []
    trainer.train()
    return trainer.seen, weights_of(trainer.model)


@pytest.mark.parametrize("dispatch", [False, True])
def test_two_ranks_are_one(tmp_path, dispatch):
    (alone, weights), *_ = run_distributed(train, 1, str(tmp_path), dispatch, 0.0)
    two = run_distributed(train, 2, str(tmp_path), dispatch, 0.0)
    # 4 updates with metadata, floor(0.34 * 6) = 2 without; all 8 tokens of a row are predicted, then 7.
    assert alone == [([True] * 4, 32)] * 4 + [([False] * 4, 28)] * 2
    for seen, theirs in two:
        assert seen == [([True] * 2, 32)] * 4 + [([False] * 2, 28)] * 2
        torch.testing.assert_close(theirs, weights, rtol=0, atol=1e-6)


def test_ranks_drop_different_rows(tmp_path):
    (first, weights), (second, theirs) = run_distributed(train, 2, str(tmp_path), False, 0.5)
    assert [kept for kept, _ in first] != [kept for kept, _ in second]
    assert [items for _, items in first] == [items for _, items in second]
    torch.testing.assert_close(theirs, weights, rtol=0, atol=0)
