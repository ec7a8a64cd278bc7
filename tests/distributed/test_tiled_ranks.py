"""Tiled and chunked layers at two ranks: gradients under DDP and FSDP2 are those of one process."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import run_distributed
from tests.helpers.long_sequence import assert_equal_gradients


def patch_named(name: str):
    from functools import partial

    from hf_effi.kernels.tiled_mlp import tile_mlp
    from hf_effi.memory.stream_layer import stream_layers
    from hf_effi.memory.tiled_loss import tile_loss

    return {
        "mlp": partial(tile_mlp, num_shards=3),
        "loss": partial(tile_loss, num_shards=3),
        "layers": partial(stream_layers, num_chunks=3),
    }[name]


#: wrapper of the two ranks, activation checkpointing, LoRA
CASES = [("ddp", True, False), ("ddp", False, True), ("fsdp2", True, False), ("fsdp2", False, True)]


def gradients_of_all_cases(patch: str | None):
    import os

    import torch.distributed as dist

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo")
    return [gradients_of_two_micro_batches(patch, *case) for case in CASES]


def gradients_of_two_micro_batches(patch: str | None, wrapper: str, checkpoint: bool, lora: bool):
    """
    Two accumulated micro-batches per rank on halves of the same rows; returns the gradients, whole and by name.

    The first row of the first micro-batch has half of its labels, the second, which is all of rank 1's, none.
    """
    import torch.distributed as dist
    from peft import LoraConfig, get_peft_model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    from tests.helpers import tiny_qwen3
    from tests.helpers.long_sequence import in_double

    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    model = tiny_qwen3(tie_word_embeddings=True).train()
    if lora:
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    model = in_double(model)
    if checkpoint:
        model.activation_checkpointing_enable({"use_reentrant": False})
    late = wrapper == "fsdp2" and lora  # patched after it was sharded, as in a second `train()`
    if patch is not None and not late:
        patch_named(patch)(model)
    run = model
    if world > 1 and wrapper == "ddp":
        run = DistributedDataParallel(model)
    elif world > 1:
        mesh = init_device_mesh("cpu", (world,))
        for layer in [m for m in model.modules() if type(m).__name__ == "Qwen3DecoderLayer"]:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        if late:
            patch_named(patch)(model)
    rows = torch.arange(4 * 13).view(4, 13) * 7 % 50 + 4
    labels = rows.clone()
    labels[0, :6], labels[1] = -100, -100
    items = int((labels[:, 1:] != -100).sum())
    for ids, targets in zip(rows.chunk(2), labels.chunk(2), strict=True):
        mine = {"input_ids": ids.chunk(world)[rank], "labels": targets.chunk(world)[rank]}
        if patch == "loss":
            loss = run(**mine, num_items_in_batch=items, use_cache=False).loss
        else:
            logits, target = run(input_ids=mine["input_ids"], use_cache=False).logits[:, :-1], mine["labels"][:, 1:]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum") / items
        (loss * world).backward()
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in found.items()}


@pytest.fixture(scope="module")
def one_process():
    return run_distributed(gradients_of_all_cases, 1, None)[0]


@pytest.mark.parametrize("patch", ["mlp", "loss", "layers"])
def test_two_ranks_are_one(patch, one_process):
    for ours in run_distributed(gradients_of_all_cases, 2, patch):
        for case, wanted, found in zip(CASES, one_process, ours, strict=True):
            assert len(found) > 5, case
            assert_equal_gradients(wanted, found, 1e-12)
