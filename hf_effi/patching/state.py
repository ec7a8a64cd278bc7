"""A model as it was: what a probe or a self-check leaves in modules, weights, configs and generators is put back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from ._caches import SharedCaches
from ._generators import KeptGenerator, generators_kept, owned_generators
from ._walk import ATOMS, CONTAINERS, configs_of, holding, parts, plain_objects, shared_spaces


class Trace:
    """
    What objects hold before a call: their `__dict__` and the containers in it, at any depth.

    Args:
        owners (`Iterable[tuple[str, Any]]`): Names and objects, such as `model.named_modules()`.
    """

    def __init__(self, owners: Iterable[tuple[str, Any]]) -> None:
        self._before = []
        for name, owner in owners:
            inside = [(key, held, held.copy()) for key, held in _containers(vars(owner))]
            self._before.append((name, owner, dict(vars(owner)), inside))

    def undo(self) -> list[str]:
        """Put everything back; return the names of what was changed."""
        changed = []
        for name, owner, entries, contents in self._before:
            now = vars(owner)
            replaced = [key for key in {**entries, **now} if key not in now or now[key] is not entries.get(key, now)]
            written = [(key, held, was) for key, held, was in contents if _identities(held) != _identities(was)]
            changed += [f"{name}.{key}" for key in dict.fromkeys((*replaced, *(key for key, *_ in written)))]
            for _, held, was in written:
                held.clear()
                (held.update if isinstance(held, (dict, set)) else held.extend)(was)
            if replaced:
                now.clear()
                now.update(entries)
        return changed


def _containers(entries: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the containers among the values and inside of them, each once, with the name of the attribute."""
    seen: set[int] = set()
    for key, value in entries.items():
        for part in parts(value) if type(value) not in ATOMS else ():
            if isinstance(part, CONTAINERS) and id(part) not in seen:
                seen.add(id(part))
                yield key, part


def _identities(container: Any) -> list[Any]:
    items = container.items() if isinstance(container, dict) else ((None, item) for item in container)
    return [(key, id(item)) for key, item in items]


def set_mode(model: nn.Module, training: bool) -> None:
    """
    Put all modules into training or evaluation mode, but for packed 4-bit layers, which stay in training mode.

    In evaluation bitsandbytes repacks their weights on a CPU, for good and in a form that only its own kernel reads;
    they compute the same in both.
    """
    for module in model.modules():
        module.training = training or hasattr(getattr(module, "weight", None), "quant_state")


def reshard(model: nn.Module) -> None:
    """
    Let FSDP2 free the weights that its root keeps whole after a forward, and have the shards as parameters again.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextlib.contextmanager
def untouched(model: nn.Module, watch_writes: bool = True) -> Iterator[None]:
    """
    Leave a block of code with the model and all random generators as they were before it, to the bit.

    Restored are the attributes of all modules, of their configs and of plain objects that are attributes (training
    flags, hooks, caches, states of quantized layers), the containers in them, the values of buffers and of other
    tensors there, tensors that a forward put into a cache of its class or file, and of each parameter which tensor it
    holds, its gradient, its flags, and its values where the block wrote to them; the state of Python's, numpy's and
    torch's generators and of generators that modules, their classes or files own. Weights are copied only when
    something is about to write to them.

    Args:
        model (`nn.Module`): Any model.
        watch_writes (`bool`, *optional*, defaults to `True`): Whether to look at each operation for writes to weights,
            which takes time; without it, nothing in the block may write to them.
    """
    reshard(model)
    modules = list(model.named_modules())
    configs = {id(c): c for _, m in modules for c in configs_of(getattr(m, "config", None))}
    objects = plain_objects(module for _, module in modules)
    owners = [*modules, *((f"config.{type(c).__name__}", c) for c in configs.values())]
    trace = Trace([*owners, *((type(o).__name__, o) for o in objects)])
    weights = [_KeptWeight(p) for p in model.parameters()]
    # Batch norm writes to its buffers without saying so to anybody: these are copied at once.
    loose = {id(t): t for _, m in modules for t in (*m._buffers.values(), *vars(m).values()) if _is_loose(t)}
    values = [(t, t.detach().clone()) for t in loose.values()]
    inside = (t for o in (*(m for _, m in modules), *objects) for _, v in holding(vars(o)) for t in parts(v))
    writes = _KeepWritten([t for w in weights for t in (w.data, w.grad)] + list(filter(_is_loose, inside)))
    generators = [KeptGenerator(g) for g in owned_generators(model).values()]
    caches = SharedCaches(shared_spaces(model.modules()).values())
    with generators_kept():
        try:
            with writes if watch_writes else contextlib.nullcontext():
                yield
        finally:
            reshard(model)
            trace.undo()
            for weight in weights:
                weight.restore()
            writes.undo()
            for tensor, value in values:
                if not _same_bits(tensor, value):  # a graph may hold what nobody wrote to
                    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                        tensor.copy_(value)
            for generator in generators:
                generator.restore()
            caches.undo()


class _KeptWeight:
    """Which tensor a parameter holds, and all about it but its values."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter, self.data, self.grad = parameter, parameter.data, parameter.grad
        self.requires_grad, self.entries = parameter.requires_grad, dict(parameter.__dict__)

    def restore(self) -> None:
        parameter, data = self.parameter, self.data
        if (parameter.data_ptr(), parameter.dtype, parameter.shape) != (data.data_ptr(), data.dtype, data.shape):
            parameter.data = data
        if parameter.grad is not self.grad:
            parameter.grad = self.grad
        if parameter.requires_grad != self.requires_grad and parameter.is_leaf:
            parameter.requires_grad_(self.requires_grad)
        now = parameter.__dict__
        if now.keys() != self.entries.keys() or any(now[key] is not value for key, value in self.entries.items()):
            now.clear()
            now.update(self.entries)


class _KeepWritten(TorchDispatchMode):
    """
    Copy a weight, or another tensor that is there, before the first operation that writes to it.

    Some models do so in a forward: an embedding with `max_norm`, weights that are normalised or clipped in place.
    """

    def __init__(self, tensors: Iterable[Tensor | None]) -> None:
        super().__init__()
        self._held: dict[int, list[Tensor]] = {}
        for tensor in tensors:
            if tensor is not None and (address := _address(tensor)):
                self._held.setdefault(address, []).append(tensor.detach())
        self._kept: dict[int, list[Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            with torch._C.DisableTorchFunction():
                for argument, value in zip(func._schema.arguments, args, strict=False):
                    self._look_at(argument, value)
                for argument in func._schema.arguments:
                    self._look_at(argument, kwargs.get(argument.name))
        return func(*args, **kwargs)

    def _look_at(self, argument: Any, value: Any) -> None:
        if argument.alias_info is None or not argument.alias_info.is_write:
            return
        for tensor in value if isinstance(value, (list, tuple)) else [value]:
            address = _address(tensor) if isinstance(tensor, Tensor) else 0
            if address in self._held and address not in self._kept:
                self._kept[address] = [held.clone() for held in self._held[address]]

    def undo(self) -> None:
        """Put the values back, at the end."""
        with torch.no_grad():
            for address, values in self._kept.items():
                for held, value in zip(self._held[address], values, strict=True):
                    held.copy_(value)


def _address(tensor: Tensor) -> int:
    """Return where the numbers lie, 0 for those of another owner (sharded, packed by a wrapper) and for none."""
    if tensor.device.type == "meta" or tensor.layout != torch.strided or is_traceable_wrapper_subclass(tensor):
        return 0
    return tensor.untyped_storage().data_ptr()


def _same_bits(tensor: Tensor, value: Tensor) -> bool:
    if tensor.layout != torch.strided:
        return False
    now, was = (t.detach().reshape(-1).view(torch.uint8) for t in (tensor, value))
    return torch.equal(now, was)


def _is_loose(value: Any) -> bool:
    """Whether this is a tensor that a forward may write to. Sharded and empty ones are their owner's business."""
    return type(value) in (Tensor, nn.Buffer) and value.device.type != "meta"
