"""What hangs on the output of a model: the weights that get a gradient, and the tensors that a cache holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.autograd.function import BackwardCFunction
from torch.utils._pytree import tree_iter
from transformers import PreTrainedConfig


def leaves_of_graph(out: Any) -> tuple[set[int], set[str]]:
    """
    Walk the graph of a loss, or of all outputs where there is none, back to its leaves.

    Args:
        out (`ModelOutput`): Of a forward pass.

    Returns:
        The ids of the tensors that get a gradient, and the names of the functions on the way that are written in
        Python: their backward pass may reach further weights, which no graph shows.
    """
    waiting = [tensor.grad_fn for tensor in _roots(out)]
    seen, leaves, functions = set(waiting), set(), set()
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        if (leaf := getattr(node, "variable", None)) is not None:
            leaves.add(id(leaf))
        if isinstance(node, BackwardCFunction):
            functions.add(type(node).__name__.removesuffix("Backward"))
        new = {following for following, _ in node.next_functions} - seen
        seen |= new
        waiting += new
    return leaves, functions


def backward(out: Any) -> None:
    """Run the backward pass from the loss, or from all outputs where there is none."""
    sum(tensor.sum() for tensor in _roots(out) if tensor.requires_grad).backward()


def _roots(out: Any) -> list[torch.Tensor]:
    loss = getattr(out, "loss", None)
    found = tree_iter(dict(out) if loss is None else loss)
    return [value for value in found if isinstance(value, torch.Tensor)]


def bytes_of_cache(*caches: Any) -> int:
    """
    Return the bytes of the tensors of floats in caches, each storage once: keys, values and states, no counters.

    Args:
        caches: Caches of transformers, or tuples of tensors; `None` holds nothing.

    Example:
    ```python
    >>> keys, values = torch.zeros(2, 8), torch.zeros(2, 8)
    >>> bytes_of_cache(None, [{"layers": (keys, values, keys)}])
    128

    ```
    """
    found: dict[Any, int] = {}
    waiting, seen = list(caches), set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            if value.is_floating_point():
                key = value.untyped_storage()._cdata
                found[key] = max(found.get(key, 0), value.numel() * value.element_size())
        elif isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, (list, tuple)):
            waiting += value
        elif hasattr(value, "__dict__") and not isinstance(value, (torch.nn.Module, PreTrainedConfig, type)):
            waiting += vars(value).values()
    return sum(found.values())
