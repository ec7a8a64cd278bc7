"""Patched modules under DDP: two ranks train as one does, with hooks on every gradient."""

from __future__ import annotations

import torch
from transformers import Trainer

from hf_effi import KernelPatchCallback
from hf_effi.errors import RefusedError
from hf_effi.kernels import FusedLoRALinear
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


def sharded_gradients():
    """
    Return how far the gradients of a patched, then sharded model are from the plain one's, and what comes too late.
    """
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    from hf_effi import patch
    from tests.helpers.patches import IDS

    dist.init_process_group("gloo")
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    layers = {"LoRALinear": FusedLoRALinear(), **LAYERS}

    def gradients(model):
        model(input_ids=IDS, labels=IDS).loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in grads.items()}

    def shard(model):
        for layer in model.base_model.model.model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    expected = gradients(adapted().double())
    model = adapted().double()
    with patch(model, layers):
        found = gradients(shard(model))
    late = ""
    try:
        patch(shard(adapted()), layers)
    except RefusedError as error:
        late = str(error)
    dist.destroy_process_group()
    return {name: (expected[name] - found[name]).abs().max().item() for name in expected}, late


def test_patch_then_shard():
    for gaps, late in run_distributed(sharded_gradients, 2):
        assert gaps and max(gaps.values()) < 1e-6  # HF's RMSNorm computes in fp32
        assert "sharded or offloaded" in late and "Patch before the model is wrapped" in late
