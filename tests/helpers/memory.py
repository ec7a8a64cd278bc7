"""What a model really holds, counted without the planner's code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def bytes_of(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def cache_bytes(model: Any, ids: torch.Tensor) -> int:
    """
    Bytes of keys, values and states after a forward pass over whole rows: all tensors of floats in the cache, once.
    """
    inputs = {"input_ids": ids, "use_cache": True}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    training = model.training
    with torch.no_grad():
        out = model.eval()(**inputs)
    model.train(training)
    tensors: dict[int, torch.Tensor] = {}
    names = ("cache", "past_key_values", "cache_params")
    waiting: list[Any] = [out[name] for name in names if name in out]
    seen: set[int] = set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            tensors[value.untyped_storage().data_ptr()] = value
        elif isinstance(value, (list, tuple)):
            waiting += value
        elif isinstance(value, Mapping):
            waiting += value.values()
        elif type(value).__module__.startswith("transformers.") and not isinstance(value, type):
            if not hasattr(value, "to_dict"):  # a config
                waiting += vars(value).values()
    return sum(bytes_of(tensor) for tensor in tensors.values() if tensor.is_floating_point())
