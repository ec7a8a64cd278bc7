"""Where replacement layers come from: classes, Liger, the Hub, and groups of our own."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from .._compat import require
from ..errors import RefusedError
from ._layers import LayerGroup, check_contract
from ._targets import GATED_NAMES, LM_HEAD_NAME, LORA_NAME, Key, kernel_name
from .fused_lora import FusedLoRALinear
from .low_bit import FORMATS
from .low_bit_lora import LowBitLoRALinear
from .tiled_mlp import TiledMLP
from .trl_head import FusedLMHead

Candidate = type[nn.Module] | LayerGroup

#: what `"hf_effi"` stands for
_OURS: dict[Key, Callable[[], LayerGroup]] = {
    LORA_NAME: FusedLoRALinear,
    LM_HEAD_NAME: FusedLMHead,
    **dict.fromkeys(GATED_NAMES, TiledMLP),
}


def _from_liger(key: Key) -> list[Candidate]:
    layers = require("liger_kernel", "layer 'liger'") and importlib.import_module("hf_effi.kernels.liger").LAYERS
    if key not in layers:
        raise RefusedError(f"'liger' has no layer for {key!r}. It has: {', '.join(layers)}.")
    return list(layers[key])


def _from_hub(reference: str) -> type[nn.Module]:
    """Load `"organisation/repository:Layer"`, or the same with `@revision`, through the `kernels` package."""
    kernels = require("kernels", f"layer {reference!r}")
    repository, _, layer = reference.partition(":")
    layer, _, revision = layer.partition("@")
    pinned = {"revision": revision} if revision else {}
    return kernels.LayerRepository(repository, layer_name=layer, **pinned).load()


def _named(key: Key, name: str) -> list[Candidate]:
    if name == "liger":
        return _from_liger(key)
    if name == "hf_effi" and key in _OURS:
        return [_OURS[key]()]
    if name in FORMATS:
        return [LowBitLoRALinear(name)]
    if "/" in name and ":" in name:
        return [check_contract(_from_hub(name))]
    raise ValueError(
        f"{name!r} is no source of layers for {key!r}. Give 'liger', 'hf_effi' (for {', '.join(_OURS)}), "
        "'fp8' or 'int8' (LoRA layers), 'organisation/repository:Layer', or a layer class."
    )


def _is_liger(value: Any) -> bool:
    return isinstance(value, type) and value.__module__.startswith("liger_kernel.")


def candidates(key: Key, value: Any) -> list[Candidate]:
    """
    Return what a value of `patch` offers, in the order in which it is tried.

    Raises:
        ValueError: the value is no layer, no group and no source.
        RefusedError: Liger has no layer for the key.
        MissingPackageError: the package that the value needs is not installed.
    """
    if isinstance(value, str):
        return _named(key, value)
    if isinstance(value, Sequence):
        if not value:
            raise ValueError(f"{key!r} has an empty list of layers.")
        return [candidate for item in value for candidate in candidates(key, item)]
    if not isinstance(value, type) and isinstance(value, LayerGroup):
        return [value]
    if _is_liger(value):
        return [importlib.import_module("hf_effi.kernels.liger").stateless(value)]
    if not isinstance(value, type) and callable(getattr(value, "load", None)):
        value = value.load()
    return [check_contract(value)]


def liger_layers(model: nn.Module) -> dict[Key, str]:
    """
    Return `{kernel name: "liger"}` for every kernel name of the model that Liger has a layer for.

    Raises:
        MissingPackageError: Liger is not installed.
        RefusedError: it has no layer for this model.
    """
    require("liger_kernel", "layer 'liger'")
    known = importlib.import_module("hf_effi.kernels.liger").LAYERS
    present = {kernel_name(module) for module in model.modules()}
    found = {key: "liger" for key in known if key in present}
    if not found:
        raise RefusedError(f"Liger has no layer for {type(model).__name__}. It has: {', '.join(known)}.")
    return found
