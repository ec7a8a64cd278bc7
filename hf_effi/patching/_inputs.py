"""What the runs of a probe are made of: tokens for a model, and the main one of its results."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class _CannotLook(Exception):
    """Raised by a run that finds out that its question cannot be asked of this model; the message says why."""


def tiny_tokens(model: nn.Module, rows: int, length: int, seed: int = 0) -> Tensor:
    """
    Return token ids `(rows, length)` for a probe: any of the vocabulary but the special ones, on the model's device.

    Args:
        model (`nn.Module`): Gives the vocabulary by its input embeddings, else by its config.
        rows, length (`int`): Shape.
        seed (`int`, *optional*, defaults to 0): Other tokens for another seed.

    Raises:
        _CannotLook: the model has no vocabulary.
    """
    size = vocabulary_of(model)
    special = _special_ids(model)
    usable = [i for i in range(min(size, 4096)) if i not in special] or list(range(size))
    # Scattered by a multiplication: a generator's numbers would be pinned inside of a run.
    places = torch.arange(1, rows * length + 1).view(rows, length) + 7919 * seed
    picked = places * 2654435761 % 2**32 // 2**12 % len(usable)
    return torch.tensor(usable)[picked].to(device_of(model))


def vocabulary_of(model: nn.Module) -> int:
    """Return the number of token ids that a model takes."""
    sizes = []
    with contextlib.suppress(Exception):  # some models raise NotImplementedError, wrappers have no such method
        wanted: Any = model  # modules of transformers have this method
        embeddings = wanted.get_input_embeddings()
        sizes.append(getattr(embeddings, "num_embeddings", None) or embeddings.weight.shape[0])
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    sizes.append(getattr(text, "vocab_size", None))  # the table may have more rows than there are tokens
    sizes = [size for size in sizes if isinstance(size, int) and size > 0]
    if not sizes:
        raise _CannotLook(f"{type(model).__name__} has no vocabulary to make tokens from")
    return min(sizes)


def _special_ids(model: nn.Module) -> set[int]:
    """Return ids with a meaning of their own, such as padding or the place of an image."""
    found: set[int] = set()
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    for owner in (config, text, getattr(model, "generation_config", None)):
        for name, value in (vars(owner) if owner is not None else {}).items():
            if name.endswith(("token_id", "token_index", "token_ids")):
                found |= {v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, int)}
    return found


def device_of(model: nn.Module) -> torch.device:
    """
    Return where the tokens of a model belong: on the device of its first weights that are not on the meta device.
    """
    with contextlib.suppress(Exception):
        wanted: Any = model
        weight = wanted.get_input_embeddings().weight
        if weight.device.type != "meta":
            return weight.device
    return next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))


def output_of(outputs: Any) -> Tensor:
    """Return the main result of a model's forward: logits, else the last hidden states, else the first floats."""
    for name in ("logits", "last_hidden_state", "log_probs", "prediction_logits"):
        if isinstance(found := getattr(outputs, name, None), Tensor):
            return found
    if isinstance(outputs, Tensor):
        return outputs
    values = (
        outputs.values() if isinstance(outputs, Mapping) else outputs if isinstance(outputs, (tuple, list)) else ()
    )
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise _CannotLook(f"the forward returns a {type(outputs).__name__} without logits or hidden states")
