"""LoRA models on a base of eight bits, for the tests of that patch."""

from __future__ import annotations

import pytest
import torch

from hf_effi.kernels import LowBitLoRALinear
from hf_effi.kernels.low_bit import FORMATS
from tests.helpers import tiny_llama
from tests.helpers.lora import lora_model

EACH_FORMAT = pytest.mark.parametrize("format", FORMATS)


def key(format, **options):
    return {"LoRALinear": LowBitLoRALinear(format, **options)}


def calm_model(**over):
    """A model whose gradients do not depend on every rounding, as those of a trained one do not."""
    model = lora_model(tiny_llama(hidden_size=64, intermediate_size=128, **over))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "base_layer" in name:
                parameter.mul_(0.2)
    return model


def bases_of(model):
    return {n: m.base_layer for n, m in model.named_modules() if hasattr(m, "lora_A")}
