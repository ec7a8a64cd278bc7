"""LoRA models whose adapters do something, and what their layers keep."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model

from hf_effi.kernels import FusedLoRALinear
from tests.helpers import tiny_llama

KEY = {"LoRALinear": FusedLoRALinear()}


def lora_model(base=None, *, dtype=None, **config):
    """A tiny model with adapters whose `B` is not zero."""
    model = get_peft_model(base or tiny_llama(), LoraConfig(**{"r": 4, "target_modules": "all-linear", **config}))
    randomize(model)
    return model if dtype is None else model.to(dtype)


@torch.no_grad()
def randomize(model):
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def attention_of(model):
    return model.base_model.model.model.layers[0].self_attn


def saved_bytes(model, function):
    """Bytes of distinct storages kept for the backward, without the model's own weights."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function()
    del out
    return sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in own)
