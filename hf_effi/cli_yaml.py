"""
The configuration file of `hf-effi validate`, `grpo` and `sft`: read with limits, and compared with the keys there are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import enum
import functools
import types
import typing
from pathlib import Path
from typing import Any

from ._run_record import redact
from ._untrusted import LARGEST_YAML, check_yaml, is_number, one_line, read_text, shorten
from .errors import BrokenFileError

#: more sentences than this help nobody
_MOST_PROBLEMS = 20
#: key -> smallest value that means anything, of those that upstream takes without a look
_LEAST = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), 1),
    **dict.fromkeys(("learning_rate", "weight_decay", "max_grad_norm", "num_train_epochs", "warmup_steps"), 0),
    **dict.fromkeys(("logging_steps", "save_steps", "eval_steps"), 0),
    **dict.fromkeys(("max_length", "max_completion_length", "num_generations"), 1),
    "max_steps": -1,  # no limit
}


def read_config(path: str) -> tuple[Any, str | None]:
    """Return what a YAML file holds, and in one sentence what is wrong with it."""
    import yaml

    try:
        text = read_text(Path(path), LARGEST_YAML)
        check_yaml(text, path)
        lines: dict[str, int] = {}
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        for key, _ in root.value if isinstance(root, yaml.MappingNode) else ():
            first = lines.setdefault(str(key.value), key.start_mark.line + 1)
            if first != key.start_mark.line + 1:
                name, again = one_line(key.value, 80), key.start_mark.line + 1
                return None, f"{path}: {name} is set in line {first} and again in line {again}."
        return yaml.safe_load(text), None
    except OSError as error:
        return None, f"{path}: {error.strerror}."
    except BrokenFileError as error:
        return None, str(error)
    except yaml.MarkedYAMLError as error:
        mark, problem = error.problem_mark or error.context_mark, one_line(error.problem or error.context, 120)
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        advice = " Indent with spaces." if "\\t" in problem else ""
        return None, f"{path} is not YAML: {place}{problem}.{advice}"
    except (
        ValueError,
        OverflowError,
        yaml.YAMLError,
    ) as error:  # not UTF-8, control characters, a date without a month
        return None, f"{path} is not a YAML file: {one_line(error, 200)}."


def problems_of_keys(parser: Any, config: Any, others: dict[str, str] | None = None) -> list[str]:
    """
    Return one sentence for each unknown key and each value of a wrong type.

    Args:
        others (`dict[str, str]`, *optional*): Key -> what it is, of keys that belong somewhere else, such as "a GRPO
            key".
    """
    if not isinstance(config, dict):
        held = "is empty" if config is None else f"holds {type(config).__name__}"
        return [f"the file {held}, but must be a mapping: lines of `key: value`."]
    fields = {
        field.name: (cls, field) for cls in parser.dataclass_types for field in dataclasses.fields(cls) if field.init
    }
    found = []
    if not isinstance(config.get("env", {}), dict):
        found.append(f"env: {shorten(config['env'])} must be a mapping from variables of the environment to values.")
    for key in config:
        if key not in fields and key != "env":
            found.append(_unknown(key, fields, others or {}))
            if len(found) > _MOST_PROBLEMS:
                break
    hints = {cls: _hints_of(cls) for cls in parser.dataclass_types}
    for key, value in config.items():
        if key in fields and (problem := _problem_of_value(key, value, hints[fields[key][0]][key])):
            found.append(problem)
    if len(found) > _MOST_PROBLEMS:
        found = [*found[:_MOST_PROBLEMS], f"and more than {_MOST_PROBLEMS} problems in all; these are the first."]
    return found


@functools.cache
def _hints_of(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _unknown(key: Any, fields: dict[str, Any], others: dict[str, str]) -> str:
    name = one_line(key, 60)
    if key in others:
        return f"{name}: {others[key]}."
    near = difflib.get_close_matches(name, fields, n=1, cutoff=0.6)
    return f"{name}: unknown key." + (f" Did you mean {near[0]}?" if near else "")


def _problem_of_value(key: str, value: Any, hint: Any) -> str | None:
    if not fits(value, hint):
        wanted = one_line(str(hint).removeprefix("<class '").removesuffix("'>").replace("typing.", ""), 160)
        if isinstance(value, bool) and _takes_text(hint):
            word = "no" if value is False else "yes"
            return f'{key}: YAML reads an unquoted {word} as {str(value).lower()}. Quote it: {key}: "{word}".'
        if isinstance(value, str) and _takes_list(hint):  # upstream would take each letter of it for an item
            return (
                f"{key}: {shorten(redact(value, key))} is text, but must be a list, such as {key}: "
                f"[{one_line(redact(value, key), 60)}]."
            )
        return f"{key}: {shorten(redact(value, key))} is {type(value).__name__}, but must be {wanted}."
    if key in _LEAST and value is not None and float(value) < _LEAST[key]:
        return f"{key}: {shorten(value)} must be at least {_LEAST[key]}."
    return None


def _takes_list(hint: Any) -> bool:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(map(_takes_list, typing.get_args(hint)))
    return hint is list or typing.get_origin(hint) is list


def _takes_text(hint: Any) -> bool:
    """Whether a word can stand for the type: text, one of some words, or an enum of words."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(map(_takes_text, typing.get_args(hint)))
    if typing.get_origin(hint) is typing.Literal:
        return any(isinstance(value, str) for value in typing.get_args(hint))
    return hint is str or (isinstance(hint, type) and issubclass(hint, enum.Enum))


def fits(value: Any, hint: Any) -> bool:
    """Whether a value of YAML can stand for the type. Upstream turns text into numbers, and text into no list."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or isinstance(hint, typing.TypeVar):
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, part) for part in inner)
    if origin is typing.Literal:
        return value in inner
    if origin in (list, tuple):
        return isinstance(value, (list, tuple))
    if hint is type(None):
        return value is None
    if hint is bool:
        return isinstance(value, bool) or str(value).lower() in ("true", "false", "0", "1", "yes", "no")
    if hint in (int, float):
        return _fits_number(value, hint)
    if origin is dict or hint is dict:
        return isinstance(value, (dict, str))
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return isinstance(value, (str, hint))
    if isinstance(hint, type) and hint is not str:
        return True  # configs check themselves when they are made
    return isinstance(value, (str, int, float)) and not isinstance(value, bool)


def _fits_number(value: Any, hint: type) -> bool:
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        number = float(value)
        if isinstance(value, bool) or number != number:
            return False
        return hint is float or (is_number(number) and int(value) == number)
    return False
