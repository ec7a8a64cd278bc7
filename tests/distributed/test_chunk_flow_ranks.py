"""
ChunkFlow at two ranks, whose rows give different numbers of chunks: the run of one process, for Trainer and
SFTTrainer.
"""

from __future__ import annotations

import os

import torch

from tests.helpers import run_distributed


def train(folder: str, chunk_flow: tuple[int, int] | None, sft: bool):
    from transformers import Trainer, TrainingArguments
    from trl import SFTConfig, SFTTrainer

    from hf_effi.memory import ChunkFlow
    from hf_effi.trainers.mixins import ChunkFlowMixin
    from tests.helpers import sft_dataset, tiny_qwen3, tiny_tokenizer, weights_of
    from tests.training.test_chunk_flow import collate, rows

    settings = {
        "output_dir": folder, "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no",
        "disable_tqdm": True, "logging_steps": 1, "learning_rate": 1e-2, "max_steps": 3, "seed": 7, "optim": "sgd",
        "per_device_train_batch_size": 4 // int(os.environ.get("WORLD_SIZE", "1")), "gradient_accumulation_steps": 2,
        "dataloader_pin_memory": False, "ddp_find_unused_parameters": False, "max_grad_norm": 0.5,
    }  # fmt: skip
    flow = None if chunk_flow is None else ChunkFlow(*chunk_flow)
    if sft:
        trainer_class = type("ChunkSFTTrainer", (ChunkFlowMixin, SFTTrainer), {})
        args = SFTConfig(**settings, gradient_checkpointing=False, max_length=None)
        extra = {"train_dataset": sft_dataset(24), "processing_class": tiny_tokenizer()}
    else:
        trainer_class = type("ChunkTrainer", (ChunkFlowMixin, Trainer), {})
        args, extra = TrainingArguments(**settings), {"train_dataset": rows(), "data_collator": collate}
    trainer = trainer_class(tiny_qwen3(), args, chunk_flow=flow, **extra)
    trainer.train()
    logs = [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]
    return torch.tensor(logs), weights_of(trainer.model)


def train_all(folder: str, chunk_flows):
    return [train(folder, chunk_flow, sft) for sft in (False, True) for chunk_flow in chunk_flows]


def test_two_ranks_are_one(tmp_path):
    flows = [(6, 1), (6, 9)]
    plain, plain_sft = run_distributed(train_all, 1, str(tmp_path), [None])[0]
    assert plain[0][:, 0].std() > 0.01
    for rank in run_distributed(train_all, 2, str(tmp_path), flows):
        for wanted, found in zip([plain, plain, plain_sft, plain_sft], rank, strict=True):
            torch.testing.assert_close(found[0], wanted[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found[1], wanted[1], rtol=0, atol=1e-5)
