"""An 8-bit base under DDP: two ranks train as one does, and each gives its wide weights back."""

from __future__ import annotations

import torch
from transformers import Trainer

from hf_effi import KernelPatchCallback
from hf_effi.kernels import LowBitLoRALinear
from tests.helpers import lm_dataset, record_run, run_distributed
from tests.training.test_fused_lora import adapted
from tests.training.test_kernel_patch import arguments


def train(folder, format, batch):
    trainer = Trainer(
        adapted(),
        arguments(folder, max_steps=4, per_device_train_batch_size=batch, ddp_find_unused_parameters=False),
        train_dataset=lm_dataset(32),
        callbacks=[KernelPatchCallback({"LoRALinear": LowBitLoRALinear(format)})],
    )
    trainer.train()
    return record_run(trainer)


def train_both(folder, batch):
    return {format: train(f"{folder}/{format}", format, batch) for format in ("fp8", "int8")}


def test_two_ranks_train_as_one(tmp_path):
    first, second = run_distributed(train_both, 2, str(tmp_path / "two"), 2)
    for format, one in train_both(str(tmp_path / "one"), 4).items():
        ours, theirs = first[format].weights, second[format].weights
        assert all(torch.equal(ours[name], theirs[name]) for name in one.weights)
        for name, weight in one.weights.items():
            if "lora_" in name:
                torch.testing.assert_close(ours[name], weight, rtol=0, atol=2e-3)
            else:
                assert torch.equal(ours[name], weight), name
