"""The attention of a loaded model changed for some calls, and put back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from . import shared_prefix as _branches  # noqa: F401 - computes rows that share a prompt for `hf_effi_varlen`
from .varlen import register_varlen_attention

_FIELD = "_attn_implementation_internal"


@contextlib.contextmanager
def switched_attention(model: nn.Module, name: str | None = None) -> Iterator[None]:
    """
    Let a model compute its attention by another implementation, and put back the one that it had.

    What is computed again for a backward (gradient checkpointing) has to happen inside as well. A model looks its
    attention up at each call, so that nothing else of it changes.

    Args:
        model (`nn.Module`): Transformers models in it, adapters and wrappers included.
        name (`str`, *optional*): Name of the implementation; `hf_effi_varlen` by default.

    Example:
    ```python
    with switched_attention(model):
        loss = model(input_ids=row, position_ids=positions, labels=row, use_cache=False).loss
        loss.backward()
    ```
    """
    name = register_varlen_attention() if name is None else name
    configs: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and _FIELD in getattr(config, "__dict__", {}):
            configs[id(config)] = config
    before = [(config, vars(config)[_FIELD]) for config in configs.values()]
    for config, _ in before:
        vars(config)[_FIELD] = name
    try:
        yield
    finally:
        for config, value in before:
            vars(config)[_FIELD] = value
