"""Reads PEFT's linear layers as they are at this moment: adapters may be switched, merged or trained at any time."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..patching import sharded_by_zero3


class Adapter(NamedTuple):
    """
    What LoRA adds to a linear layer: `s B A x`.

    Args:
        a (`Tensor`): `(r, in)`.
        b (`Tensor`): `(out, r)`.
        scale (`float`): `s`: `alpha / r`, or `alpha / sqrt(r)` with rsLoRA.
    """

    a: Tensor
    b: Tensor
    scale: float


def active_adapters(module: Any, reject: Callable[[str], Exception]) -> dict[str, Adapter]:
    """
    Return the adapters that a LoRA layer adds to its base layer now: none where they are merged or switched off.

    Raises:
        What `reject` makes of a reason: a variant such as DoRA, dropout while training, a bias or a hook in the
            adapter.
    """
    if module.disable_adapters or module.merged:
        return {}
    found = {}
    for name in module.active_adapters:
        if name not in module.lora_A:
            continue
        if name in module.lora_variant:
            variant = type(module.lora_variant[name]).__name__
            raise reject(f"adapter {name!r} is a {variant}. Plain LoRA and rsLoRA work; set use_dora=False.")
        dropout = getattr(module.lora_dropout[name], "p", 0.0)
        if dropout and module.training:
            raise reject(f"lora_dropout={dropout} of adapter {name!r}. Set lora_dropout=0.")
        a, b = module.lora_A[name], module.lora_B[name]
        if b.bias is not None:
            raise reject(f"adapter {name!r} has a bias. Set lora_bias=False.")
        if sharded_by_zero3([a.weight, b.weight]):
            raise reject(
                "ZeRO-3 has shards of its weights, whole only while PEFT's own modules are called. Use ZeRO-2 or DDP."
            )
        if has_own_call(a) or has_own_call(b):
            raise reject(f"adapter {name!r} has hooks or a forward of its own, which would be skipped.")
        found[name] = Adapter(a.weight, b.weight, float(module.scaling[name]))
    return found


def has_own_call(module: nn.Module) -> bool:
    """Whether calling a module does more than its class says: who only reads its weights would pass that by."""
    return bool(module._forward_pre_hooks or module._forward_hooks or "forward" in module.__dict__)


def is_repacked(quant_state: Any) -> bool:
    """Whether bitsandbytes repacked 4-bit weights for inference on a CPU: only its own kernel reads those."""
    return getattr(quant_state, "packing_format_for_cpu", False)


def dense_weight(weight: Tensor, quant_state: Any, dtype: torch.dtype) -> Tensor:
    """Return a weight in `dtype`, unpacked by bitsandbytes where it has a `quant_state`."""
    if quant_state is not None:
        weight = _bitsandbytes().dequantize_4bit(weight, quant_state)
    return weight.to(dtype)


@functools.cache
def _bitsandbytes() -> Any:
    return importlib.import_module("bitsandbytes.functional")
