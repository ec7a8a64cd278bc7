"""A model as it was: what a probe or a self-check leaves in modules, weights, configs and generators is put back."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PretrainedConfig


class Trace:
    """
    What objects hold before a call: their `__dict__` and the containers in it.

    Args:
        owners (`Iterable[tuple[str, Any]]`): Names and objects, such as `model.named_modules()`.
    """

    def __init__(self, owners: Iterable[tuple[str, Any]]) -> None:
        self._before = [
            (name, owner, dict(vars(owner)), {k: v.copy() for k, v in vars(owner).items() if _is_container(v)})
            for name, owner in owners
        ]

    def undo(self) -> list[str]:
        """Put everything back; return the names of what was changed."""
        changed = []
        for name, owner, entries, contents in self._before:
            now = vars(owner)
            replaced = [key for key in {**entries, **now} if key not in now or now[key] is not entries.get(key, now)]
            written = [key for key, was in contents.items() if _identities(entries[key]) != _identities(was)]
            changed += [f"{name}.{key}" for key in (*replaced, *written)]
            for key in written:
                entries[key].clear()
                (entries[key].extend if isinstance(entries[key], list) else entries[key].update)(contents[key])
            if replaced:
                now.clear()
                now.update(entries)
        return changed


def _is_container(value: Any) -> bool:
    return isinstance(value, (dict, list, set))


def _identities(container: Any) -> list[Any]:
    items = container.items() if isinstance(container, dict) else ((None, item) for item in container)
    return [(key, id(item)) for key, item in items]


def set_mode(model: nn.Module, training: bool) -> None:
    """
    Put all modules into training or evaluation mode, but for packed 4-bit layers, which stay in training mode.

    In evaluation bitsandbytes repacks their weights on a CPU, for good and in a form that only its own kernel reads; they
    compute the same in both.
    """
    for module in model.modules():
        module.training = training or hasattr(getattr(module, "weight", None), "quant_state")


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """
    Leave a block of code with the model and all random generators as they were before it.

    Restored are the attributes of all modules and their configs (training flags, hooks, caches), the values of buffers and
    of tensors that are attributes, which tensor each parameter holds, the state of Python's, numpy's and torch's generators
    and of generators that modules own. Weights are not copied: nothing in the block may write to them.

    Args:
        model (`nn.Module`): Any model.
    """
    modules = list(model.named_modules())
    configs = {id(c): c for _, m in modules for c in _configs(getattr(m, "config", None))}
    trace = Trace([*modules, *((f"config.{type(c).__name__}", c) for c in configs.values())])
    weights = [(p, p.data, dict(p.__dict__)) for p in model.parameters()]
    loose = {id(t): t for _, m in modules for t in _loose_tensors(m)}
    values = [(t, t.detach().clone(), _version(t)) for t in loose.values()]
    generators = [_Generator(g) for _, m in modules for g in vars(m).values() if isinstance(g, _GENERATORS)]
    states = _global_states()
    try:
        yield
    finally:
        for _, module in modules:
            if isinstance(module, FSDPModule):
                module.reshard()  # the root keeps its weights whole after a forward
        trace.undo()
        for parameter, data, entries in weights:
            if (
                parameter.data_ptr() != data.data_ptr()
                or parameter.dtype != data.dtype
                or parameter.shape != data.shape
            ):
                parameter.data = data
            if parameter.__dict__ != entries:
                parameter.__dict__.clear()
                parameter.__dict__.update(entries)
        with torch.no_grad():
            for tensor, value, version in values:
                if version is None or _version(tensor) != version:  # a graph may hold what nobody wrote to
                    tensor.copy_(value)
        for generator in generators:
            generator.restore()
        _restore_global(states)


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _configs(config: Any) -> list[Any]:
    if not isinstance(config, PretrainedConfig):
        return []
    return [config, *(part for value in vars(config).values() for part in _configs(value))]


def _loose_tensors(module: nn.Module) -> list[Tensor]:
    """Buffers and plain attributes: what a forward may write to. Sharded and empty ones are their owner's business."""
    found = [*module._buffers.values(), *(value for value in vars(module).values() if isinstance(value, Tensor))]
    return [t for t in found if t is not None and type(t) in (Tensor, nn.Buffer) and t.device.type != "meta"]


_GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)


class _Generator:
    def __init__(self, generator: Any) -> None:
        self.generator = generator
        if isinstance(generator, np.random.Generator):
            self.state = generator.bit_generator.state
        else:
            self.state = (getattr(generator, "getstate", None) or generator.get_state)()

    def restore(self) -> None:
        if isinstance(self.generator, np.random.Generator):
            self.generator.bit_generator.state = self.state
        else:
            (getattr(self.generator, "setstate", None) or self.generator.set_state)(self.state)


def _devices() -> Any:
    """Return the module of the accelerator's generators, where one is in use."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    module = getattr(torch, found.type, None) if found is not None else None
    if module is None or not getattr(module, "is_initialized", lambda: False)():
        return None
    return module if hasattr(module, "get_rng_state_all") else None


def _global_states() -> tuple[Any, ...]:
    devices = _devices()
    on_device = devices.get_rng_state_all() if devices else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), devices, on_device


def _restore_global(states: tuple[Any, ...]) -> None:
    python, numpy, cpu, devices, on_device = states
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if devices:
        devices.set_rng_state_all(on_device)
