"""Patched modules under DDP: two ranks train as one does, with hooks on every gradient."""

from __future__ import annotations

import torch
from transformers import Trainer

from hf_effi import FusedLoRALinear, KernelPatchCallback
from tests.helpers import lm_dataset, record_run, run_distributed
from tests.training.test_fused_lora import adapted
from tests.training.test_kernel_patch import LAYERS, arguments


def train(folder, patched, batch):
    callbacks = [KernelPatchCallback({"LoRALinear": FusedLoRALinear(), **LAYERS})] if patched else []
    trainer = Trainer(
        adapted(),
        arguments(folder, max_steps=4, per_device_train_batch_size=batch, ddp_find_unused_parameters=False),
        train_dataset=lm_dataset(32),
        callbacks=callbacks,
    )
    trainer.train()
    return record_run(trainer)


def test_two_ranks_train_as_one(tmp_path):
    first, second = run_distributed(train, 2, str(tmp_path / "two"), True, 2)
    assert all(torch.equal(first.weights[name], second.weights[name]) for name in first.weights)
    one = train(str(tmp_path / "one"), False, 4)
    for name, weight in one.weights.items():
        torch.testing.assert_close(first.weights[name], weight, rtol=0, atol=1e-4)
