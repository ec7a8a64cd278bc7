"""Method objects (schedules, callbacks, samplers, adapters) as plain data, and back."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import math
from collections.abc import Mapping
from typing import Any

from ..errors import RecipeError
from ..functional.kept_arguments import LARGEST_LIST, NotKept, arguments_of
from .admitted import (
    CLASSES,
    FUNCTIONS,
    _NotAdmittedError,
    check_object,
    check_value,
    find,
    kinds_of,
    public_path,
)

#: fields without which a config cannot be made, though they have a default
_PEFT_NEEDED = ("total_step",)
_PEFT_INTERNAL = ("peft_version", "auto_mapping", "runtime_config", "base_model_name_or_path", "inference_mode")


class _NotPlainError(RecipeError):
    """A value that cannot be written as data; the message says which and why."""


def to_plain(value: Any) -> Any:
    """
    Return a value as JSON data from which [`from_plain`] makes an equal one.

    Objects of this package that remember what they were made with ([`keeps_arguments`]), its dataclasses, and PEFT
    configs become `{"class": "module:name", "arguments": {...}}`; functions of this package and `trl.rewards` become
    `{"function": "module:name"}`. Scores that were given as a tensor or an array are a list.

    Raises:
        _NotPlainError: the value, or a part of it, is something else or is too long.
    """
    if isinstance(value, enum.Enum):
        return to_plain(value.value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise _NotPlainError("a mapping with keys that are not text")
        return {key: to_plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        if len(value) > LARGEST_LIST:
            raise _NotPlainError(f"a list of {len(value)} values")
        items = sorted(value) if isinstance(value, (set, frozenset)) else value
        return [to_plain(item) for item in items]
    if inspect.isfunction(value):
        path = public_path(value, FUNCTIONS)
        if path is None:
            raise _NotPlainError(f"your own code: {path_of(value)!r} is nothing that a card may name")
        return {"function": path}
    path = public_path(type(value), CLASSES)
    if path is None:
        raise _NotPlainError(f"your own code: {path_of(type(value))!r} is nothing that a card may name")
    return {"class": path, "arguments": _constructor_arguments(value, kinds_of(path))}


def path_of(thing: Any) -> str:
    """Return `module:name` of a class or function, for a message."""
    return f"{thing.__module__}:{thing.__qualname__}"


def from_plain(value: Any) -> Any:
    """
    Return what [`to_plain`] described: an object, a function, or a list of them. See `hf_effi.hub.admitted`.

    Raises:
        _NotAdmittedError: it names something that a card may not name, or that this version does not have.
    """
    if isinstance(value, list):
        if len(value) > LARGEST_LIST:
            raise _NotAdmittedError(f"a list of {len(value)} objects, where at most {LARGEST_LIST} are allowed")
        return [from_plain(item) for item in value]
    if isinstance(value, dict) and set(value) == {"function"}:
        return find(value["function"], FUNCTIONS)
    if isinstance(value, dict) and set(value) == {"class", "arguments"} and isinstance(value["arguments"], dict):
        cls = find(value["class"], CLASSES)
        kinds = kinds_of(value["class"])
        arguments = {name: _argument(name, inner, kinds) for name, inner in value["arguments"].items()}
        try:
            return cls(**arguments)
        except Exception as error:  # whatever a constructor says of numbers and words that do not fit
            raise _NotAdmittedError(f"{value['class']}: {str(error)[:300]}") from None
    raise _NotAdmittedError("it is neither an object nor a function of a card")


def _argument(name: str, value: Any, kinds: Mapping[str, str]) -> Any:
    if not isinstance(name, str) or name not in kinds:
        raise _NotAdmittedError(f"{str(name)[:80]!r} is no argument that a card may set there")
    if _is_object(value):
        check_object(name, value["class"], kinds[name])
        return from_plain(value)
    if isinstance(value, list) and any(map(_is_object, value)):
        for item in value:
            check_object(name, item.get("class") if isinstance(item, dict) else item, kinds[name])
        return tuple(from_plain(item) for item in value)
    check_value(name, value, kinds[name])
    if kinds[name] in ("number", "numbers"):
        return [_as_number(item) for item in value] if isinstance(value, list) else _as_number(value)
    return value


def _as_number(value: Any) -> Any:
    return float(value) if value in ("inf", "-inf", "nan") else value


def _is_object(value: Any) -> bool:
    return isinstance(value, dict) and "class" in value


def _constructor_arguments(thing: Any, kinds: Mapping[str, str]) -> dict[str, Any]:
    """Return the arguments that differ from their defaults."""
    found = _peft_arguments(thing) if hasattr(thing, "peft_type") else _own_arguments(thing)
    for name, value in found.items():
        try:  # write nothing that reading would refuse
            _argument(name, value, kinds)
        except _NotAdmittedError as error:
            raise _NotPlainError(f"a value that a card may not hold: {error}") from None
    return found


def _own_arguments(thing: Any) -> dict[str, Any]:
    """Return what differs from the defaults, of the fields of a dataclass or of what a constructor was given."""
    name_of_class, parameters = type(thing).__name__, inspect.signature(type(thing)).parameters
    if dataclasses.is_dataclass(thing):
        given: dict[str, Any] | None = {f.name: getattr(thing, f.name) for f in dataclasses.fields(thing) if f.init}
    else:
        given = arguments_of(thing)
    if given is None:
        raise _NotPlainError(f"{name_of_class}, which does not remember what it was made with")
    found = {}
    for name, value in given.items():
        default = parameters[name].default if name in parameters else inspect.Parameter.empty
        if value is default:
            continue
        if isinstance(value, NotKept):
            raise _NotPlainError(
                f"{name}: {value.reason}. Make the {name_of_class} again from your data, and pass it to "
                "Recipe.make_trainer"
            )
        plain = to_plain(value)
        if default is inspect.Parameter.empty or plain != _plain_or_none(default):
            found[name] = plain
    return found


def _peft_arguments(config: Any) -> dict[str, Any]:
    """Return the fields that differ from a new config's, without those that PEFT fills in or does not save."""
    fields = [field for field in dataclasses.fields(config) if field.init and field.name not in _PEFT_INTERNAL]
    needed = {name: getattr(config, name) for name in _PEFT_NEEDED if hasattr(config, name)}
    unset, found = type(config)(**needed), {}
    for field in fields:
        value = getattr(config, field.name)
        if field.name in needed or value != getattr(unset, field.name):
            found[field.name] = to_plain(value)
    return found


def _plain_or_none(value: Any) -> Any:
    try:
        return to_plain(value)
    except _NotPlainError:
        return None
