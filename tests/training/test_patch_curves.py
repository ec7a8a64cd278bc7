"""Fifty steps with and without each patch: the same curve, within what the dtype's rounding leaves open."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from trl import SFTConfig, SFTTrainer

import hf_effi.kernels.lm_head as lm_head
from hf_effi import KernelPatchCallback, PatchCallback, patch
from hf_effi.kernels import FusedLMHead, FusedLoRALinear, TiledMLP, tile_mlp
from hf_effi.memory import stream_layers, tile_loss
from tests.helpers import sft_dataset, tiny_llama, tiny_tokenizer
from tests.training.test_fused_lora import adapted
from tests.training.test_kernel_patch import ReorderedNorm, arguments, losses_of, trainer_of


def stock_run(folder, model, *callbacks):
    trainer = trainer_of(folder, model, *callbacks, max_steps=50, learning_rate=2e-3)
    trainer.train()
    return losses_of(trainer)


def sft_run(folder, model, head=None):
    """TRL's head is what `FusedLMHead` replaces, and is there once the trainer is built."""
    args = arguments(folder, SFTConfig, max_steps=50, learning_rate=2e-3)
    trainer = SFTTrainer(model, args, train_dataset=sft_dataset(16), processing_class=tiny_tokenizer())
    with patch(trainer.model, {"LMHead": head}) if head else nullcontext():
        trainer.train()
    return losses_of(trainer)


def kernel(key, value):
    return lambda: KernelPatchCallback({key: value})


PATCHES = {
    "a norm of another order": (stock_run, tiny_llama, kernel("RMSNorm", ReorderedNorm)),
    "TiledMLP": (stock_run, tiny_llama, kernel("SwiGLUMLP", TiledMLP(num_shards=3))),
    "FusedLoRALinear": (stock_run, adapted, kernel("LoRALinear", FusedLoRALinear())),
    "FusedLMHead": (sft_run, tiny_llama, FusedLMHead),
    "FusedLMHead, gradient in the forward": (sft_run, tiny_llama, partial(FusedLMHead, grad_in_forward=True)),
    "tile_mlp": (stock_run, tiny_llama, lambda: PatchCallback(partial(tile_mlp, num_shards=3))),
    "tile_loss": (stock_run, tiny_llama, lambda: PatchCallback(partial(tile_loss, num_shards=3))),
    "stream_layers": (stock_run, tiny_llama, lambda: PatchCallback(partial(stream_layers, num_chunks=3))),
}


def nudged(model):
    """Move every weight by one rounding."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + torch.finfo(torch.float32).eps)
    return model


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """Return the unpatched curve and the noise of one rounding, for each pair of a run and a model."""
    folder = tmp_path_factory.mktemp("runs")
    found = {}
    for run, make, _ in PATCHES.values():
        if (run, make) not in found:
            stock = run(folder / "stock", make())
            found[run, make] = stock, (run(folder / "nudged", nudged(make())) - stock).abs().max()
    return found


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(lm_head, "ROW_CHUNK", 16)
    monkeypatch.setattr(lm_head, "VOCABULARY_TILE", 32)


@pytest.mark.parametrize("name", PATCHES)
def test_fifty_steps_give_the_same_curve(tmp_path, references, name):
    run, make, patched_by = PATCHES[name]
    stock, noise = references[run, make]
    off = (run(tmp_path, make(), patched_by()) - stock).abs().max()
    assert len(stock) == 50 and stock[-1] < 0.9 * stock[0], "it learns"
    assert 0 < off, "the patch did run: it rounds otherwise"
    assert off < 5 * noise < 1e-4
