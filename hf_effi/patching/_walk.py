"""
Where the state of a model can lie: attributes, containers and plain objects in them, its classes and their files.
"""

from __future__ import annotations

import random
import sys
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

CONTAINERS = (dict, list, set, deque)
#: values that are no state, or whose state has an owner already
_CONSTANTS = (
    *(type(None), bool, int, float, complex, str, bytes, range, slice, Enum, np.generic, PretrainedConfig),
    *(torch.dtype, torch.device, torch.Size, torch.layout, type, ModuleType, FunctionType, BuiltinFunctionType),
)  # fmt: skip
_KNOWN = (*_CONSTANTS, nn.Module, Tensor, MethodType)
#: types of which a value holds nothing and is no state: most of what is looked at
ATOMS = frozenset(
    (*(type(None), bool, int, float, complex, str, bytes, type), ModuleType, FunctionType, BuiltinFunctionType)
)
#: types of which a value that is empty holds nothing, such as the hooks of most modules
_HOLDING = frozenset((dict, OrderedDict, list, set, tuple, nn.Parameter))
GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)
#: most objects that can be one attribute's state
_MOST_OBJECTS = 100


def parts(value: Any) -> Iterator[Any]:
    """Yield a value and, where it is a container, what it holds, at any depth."""
    waiting, seen = [value], set()
    while waiting:
        part = waiting.pop()
        yield part
        if isinstance(part, (*CONTAINERS, tuple)) and id(part) not in seen:
            seen.add(id(part))
            waiting += part.values() if isinstance(part, dict) else part


def holding(space: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the entries that are more than a plain value, an empty container or a weight."""
    for key, value in list(space.items()):
        kind = type(value)
        if kind not in ATOMS and (kind not in _HOLDING or (kind is not nn.Parameter and value)):
            yield key, value


def plain_objects(modules: Iterable[nn.Module]) -> list[Any]:
    """
    Return objects with attributes of their own that modules hold, such as the state of a quantized layer.

    Only those which can be put back as a whole: what holds modules, handles or anything that cannot be looked into (a
    state of FSDP, a hook of accelerate) is left to its owner, since half of it as it was would be worse than none.
    """
    found: dict[int, Any] = {}
    for module in modules:
        for _, value in holding(vars(module)):
            for part in parts(value):
                if type(part) not in ATOMS and id(part) not in found and _has_attributes(part):
                    found |= {id(each): each for each in _whole_state(part)}
    return list(found.values())


def _has_attributes(value: Any) -> bool:
    return not isinstance(value, (*_KNOWN, *CONTAINERS)) and isinstance(getattr(value, "__dict__", None), dict)


def _whole_state(start: Any) -> list[Any]:
    """Return an object with all that it holds, none where something in it has a state that cannot be seen."""
    waiting, found = [start], {id(start): start}
    while waiting:
        for part in (part for value in vars(waiting.pop()).values() for part in parts(value)):
            if (
                isinstance(part, (*_CONSTANTS, Tensor, *CONTAINERS, tuple, frozenset, *GENERATORS))
                or id(part) in found
            ):
                continue
            if not _has_attributes(part) or len(found) == _MOST_OBJECTS:
                return []
            found[id(part)] = part
            waiting.append(part)
    return list(found.values())


def configs_of(config: Any) -> list[PretrainedConfig]:
    """Return a config and those inside of it."""
    if not isinstance(config, PretrainedConfig):
        return []
    return [config, *(part for value in vars(config).values() for part in configs_of(value))]


def shared_spaces(modules: Iterable[nn.Module]) -> dict[str, Mapping[str, Any]]:
    """Return, by name, what the classes of modules and the files that define them hold: state that models share."""
    bases = {base for cls in {type(module) for module in modules} for base in cls.__mro__ if base is not object}
    files = {base.__module__ for base in bases if base.__module__ in sys.modules}
    spaces = {f"{base.__module__}.{base.__qualname__}": vars(base) for base in bases}
    return spaces | {name: vars(sys.modules[name]) for name in files}
