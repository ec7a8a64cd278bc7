"""Method objects (schedules, callbacks, samplers, adapters) as plain data, and back."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from .._compat import import_module_or_none

#: A card comes from the Internet. These are the only classes that are made from it (and PEFT's configs), ...
_CLASS_MODULES = ("hf_effi.callbacks.", "hf_effi.samplers.", "hf_effi.functional.", "hf_effi.trainers.")
#: ... the only functions that are taken from it ...
_FUNCTION_MODULES = ("hf_effi.functional.", "trl.rewards.")
#: ... and the packages whose trainers and arguments it may name.
TRAINER_PACKAGES = ("hf_effi.", "trl.", "transformers.")
#: class -> constructor argument -> attribute that holds it, where the two differ
_STORED_AS = {"LRScheduleCallback": {"schedule": "built"}}
#: Values of an object that are kept in a card; a sampler's scores of a whole corpus are data, not a recipe.
_LARGEST_LIST = 256


_PEFT_INTERNAL = ("peft_version", "auto_mapping", "runtime_config", "base_model_name_or_path", "inference_mode")


class NotPlainError(ValueError):
    """A value that cannot be written as data; the message says which and why."""


def to_plain(value: Any) -> Any:
    """
    Return a value as JSON data from which [`from_plain`] makes an equal one.

    Objects of this package whose constructor arguments can be read off them, and PEFT configs, become
    `{"class": "module:name", "arguments": {...}}`; functions of this package and `trl.rewards` become
    `{"function": "module:name"}`.

    Raises:
        NotPlainError: the value, or a part of it, is something else or is too long.
    """
    if isinstance(value, enum.Enum):
        return to_plain(value.value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise NotPlainError("a mapping with keys that are not text")
        return {key: to_plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        if len(value) > _LARGEST_LIST:
            raise NotPlainError(f"a list of {len(value)} values")
        items = sorted(value) if isinstance(value, (set, frozenset)) else value
        return [to_plain(item) for item in items]
    if inspect.isfunction(value):
        path = path_of(value)
        _readable(find, path, _FUNCTION_MODULES)
        return {"function": path}
    path = path_of(type(value))
    _readable(_find_class, path)
    return {"class": path, "arguments": _constructor_arguments(value)}


def path_of(thing: Any) -> str:
    """Return `module:name` of a class or function."""
    return f"{thing.__module__}:{thing.__qualname__}"


def _readable(read: Callable[..., Any], *arguments: Any) -> None:
    """Write nothing that reading would refuse."""
    try:
        read(*arguments)
    except ValueError as error:
        raise NotPlainError(f"your own code: {error}") from None


def from_plain(value: Any) -> Any:
    """
    Return what [`to_plain`] described.

    Raises:
        ValueError: it names something that a card may not name, or that this version does not have.
    """
    if isinstance(value, list):
        return [from_plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {"function"}:
        return find(value["function"], _FUNCTION_MODULES)
    if set(value) == {"class", "arguments"}:
        arguments = {name: from_plain(inner) for name, inner in value["arguments"].items()}
        try:
            return _find_class(value["class"])(**arguments)
        except TypeError as error:
            raise ValueError(f"{value['class']}: {error}") from error
    return {key: from_plain(inner) for key, inner in value.items()}


def find(path: str, modules: tuple[str, ...]) -> Any:
    """
    Import `module:name` from a module whose name begins with one of `modules`.

    Raises:
        ValueError: it is elsewhere, or not there.
    """
    module, _, name = path.partition(":")
    if not f"{module}.".startswith(modules) or not name.isidentifier():
        raise ValueError(f"{path!r} is not part of {', '.join(m.rstrip('.') for m in modules)}")
    found = getattr(import_module_or_none(module), name, None)
    if found is None:
        raise ValueError(f"{path!r} is not in the installed version")
    # A module also holds what it imports; a name must not reach further than it seems.
    if getattr(found, "__module__", None) != module:
        raise ValueError(f"{path!r} is not defined there")
    return found


def _find_class(path: str) -> type:
    if path.startswith("peft."):
        from peft import PeftConfig

        found = find(path, ("peft.",))
        if not (isinstance(found, type) and issubclass(found, PeftConfig)):
            raise ValueError(f"{path!r} is not a PEFT config")
        return found
    found = find(path, _CLASS_MODULES)
    if not isinstance(found, type):
        raise ValueError(f"{path!r} is not a class")
    return found


def _constructor_arguments(thing: Any) -> dict[str, Any]:
    """Read the arguments that differ from their defaults off the attributes of the same names."""
    if hasattr(thing, "peft_type"):
        return _peft_arguments(thing)
    name_of, found = _STORED_AS.get(type(thing).__name__, {}), {}
    for name, parameter in inspect.signature(type(thing)).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        attribute = name_of.get(name, name)
        if not hasattr(thing, attribute):
            raise NotPlainError(f"{type(thing).__name__}, which does not keep its argument {name!r}")
        value = getattr(thing, attribute)
        if parameter.default is parameter.empty or value is not parameter.default:
            plain = to_plain(value)
            if parameter.default is parameter.empty or plain != _plain_or_none(parameter.default):
                found[name] = plain
    return found


def _peft_arguments(config: Any) -> dict[str, Any]:
    """Return the fields that differ from a new config's, without those that PEFT fills in or does not save."""
    fields = [field for field in dataclasses.fields(config) if field.init and field.name not in _PEFT_INTERNAL]
    unset, found = type(config)(), {}
    for field in fields:
        value = getattr(config, field.name)
        if value != getattr(unset, field.name):
            found[field.name] = to_plain(value)
    return found


def _plain_or_none(value: Any) -> Any:
    try:
        return to_plain(value)
    except NotPlainError:
        return None
