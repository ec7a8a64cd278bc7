"""Two ranks share the blocks of a token file as they share any dataset: each row once, in the order of one process."""

from __future__ import annotations

import os

import torch

from hf_effi.data import TokenBlocks, TokenFile, write_token_file
from tests.helpers import run_distributed, sft_dataset, tiny_tokenizer
from tests.helpers.sampling import StopAt, sampler_trainer


class Numbered(TokenBlocks):
    """Blocks that carry the number of their row, which the trainer of these tests notes."""

    def __getitem__(self, index):
        return {**super().__getitem__(index), "row": torch.tensor(index)}


def collate(rows):
    return {key: torch.stack([row[key] for row in rows]) for key in ("input_ids", "labels", "row")}


def train(folder: str, corpus: str, resume: bool):
    from transformers import Trainer

    world = int(os.environ.get("WORLD_SIZE", "1"))
    blocks = Numbered(TokenFile(corpus), 32, shuffle=1, passes=2)

    def make(*callbacks):
        over = {"per_device_train_batch_size": 4 // world, "max_steps": 8, "train_sampling_strategy": "sequential"}
        trainer = sampler_trainer(folder, Trainer, callbacks=list(callbacks), train_dataset=blocks, **over)
        trainer.data_collator = collate
        return trainer

    if not resume:
        trainer = make()
        trainer.train()
        return trainer.seen
    first, second = make(StopAt(3)), make()
    first.train()
    second.train(resume_from_checkpoint=os.path.join(folder, "checkpoint-3"))
    return first.seen + second.seen


def both(folder: str, corpus: str):
    return [train(f"{folder}{resume}", corpus, resume) for resume in (False, True)]


def test_ranks_serve_the_order_of_the_dataset_also_after_a_resume(tmp_path):
    write_token_file(sft_dataset(40), tiny_tokenizer(), tmp_path / "corpus")
    expected = [list(range(4 * step, 4 * step + 4)) for step in range(8)]
    for orders in run_distributed(both, 2, str(tmp_path / "run"), str(tmp_path / "corpus")):
        assert orders == [expected, expected]
