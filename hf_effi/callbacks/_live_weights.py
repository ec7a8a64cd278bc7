"""The weights of a model that is trained, as a callback reads and lends them; shards where FSDP2 has shards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """
    Return what training changes: trainable parameters, tied ones once, and floating-point buffers.

    Of a parameter that FSDP2 shards it is the shard of this process. Writing into these tensors changes the model.
    """
    gather_nothing(model)
    state = {name: _local(weight) for name, weight in model.named_parameters() if weight.requires_grad}
    return state | {name: _local(buffer) for name, buffer in model.named_buffers() if buffer.is_floating_point()}


def gather_nothing(model: torch.nn.Module) -> None:
    """
    Let FSDP2 free the whole weights that the last forward gathered.

    Else modules would go on with these, whatever is written into the shards.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _local(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_state(model: torch.nn.Module) -> dict[str, Any]:
    """
    Return the whole weights of a model that FSDP2 shards, on the first process; tied ones are one tensor. Every
    process calls it.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    names: dict[int, str] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        first = names.setdefault(id(weight), name)
        if name in state and first in state:
            state[name] = state[first]
    return state


@torch.no_grad()
def overwrite(model: torch.nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Write values into the tensors of [`trained`], in their own dtype."""
    for name, tensor in trained(model).items():
        tensor.copy_(values[name])
    gather_nothing(model)


@contextmanager
def lent(model: torch.nn.Module, values: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """
    A context in which the model holds other values; afterwards its own, to the bit, also after an error.

    Gives the model's own values, on the CPU; what is put into this dict instead is what the model gets back.
    """
    held = {name: tensor.to("cpu", copy=True) for name, tensor in trained(model).items()}
    try:
        overwrite(model, values)
        yield held
    finally:
        overwrite(model, held)
