"""`hf-effi validate`, `grpo` and `sft`: a YAML as `trl` reads it, checked before a model is loaded, and trained by our trainers."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import importlib
import io
import json
import logging
import sys
import types
import typing
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .hub.uploads import HubRefusedError

#: command -> TRL's script, our config, our trainer, the trainer it stands for
TRAININGS = {
    "grpo": (
        "trl.scripts.grpo",
        "hf_effi.trainers.grpo_config:EffiGRPOConfig",
        "hf_effi.trainers.grpo:EffiGRPOTrainer",
    ),
    "sft": ("trl.scripts.sft", "hf_effi.trainers.sft:EffiSFTConfig", "hf_effi.trainers.sft:EffiSFTTrainer"),
}
#: keys that only this kind of training has
_TELLS_GRPO = ("reward_funcs", "reward_model_name_or_path", "num_generations", "max_completion_length", "prune_rate")


def load(path: str) -> Any:
    """Import `module:name`."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def make_parser(kind: str) -> Any:
    """Return TRL's parser of this command, with our config in the place of its own."""
    from trl import TrlParser

    script, config, _ = TRAININGS[kind]
    stock = importlib.import_module(script).make_parser(prog=f"hf-effi {kind}")
    ours = load(config)
    types_ = [ours if issubclass(ours, cls) else cls for cls in stock.dataclass_types]
    return TrlParser(types_, prog=f"hf-effi {kind}")


def problems_of(config: Any, kind: str) -> list[str]:
    """
    Return what is wrong with a configuration, one sentence each; empty if nothing is.

    Args:
        config: What the YAML holds.
        kind (`str`): `"grpo"` or `"sft"`.
    """
    if not isinstance(config, dict):
        return [f"the file must be a mapping of `key: value` lines, not {type(config).__name__}."]
    parser = make_parser(kind)
    fields = {
        field.name: (cls, field) for cls in parser.dataclass_types for field in dataclasses.fields(cls) if field.init
    }
    found = []
    for key in config:
        if key not in fields and key != "env":
            near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.6)
            found.append(f"{key}: unknown key." + (f" Did you mean {near[0]}?" if near else ""))
    hints = {cls: typing.get_type_hints(cls) for cls in parser.dataclass_types}
    known = {key: value for key, value in config.items() if key in fields}
    for key, value in known.items():
        cls, _ = fields[key]
        if not _fits(value, hints[cls][key]):
            wanted = str(hints[cls][key]).removeprefix("<class '").removesuffix("'>").replace("typing.", "")
            found.append(f"{key}: {value!r} is {type(value).__name__}, but must be {wanted}.")
    return found or _parse(parser, known)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of YAML can stand for the type; argparse turns text into numbers, so such text is taken too."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or isinstance(hint, typing.TypeVar):
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in inner)
    if origin is typing.Literal:
        return value in inner
    if origin in (list, tuple):
        return isinstance(value, (list, tuple, str))
    if hint is type(None):
        return value is None
    if hint is bool:
        return isinstance(value, bool) or str(value).lower() in ("true", "false", "0", "1", "yes", "no")
    if hint in (int, float):
        with contextlib.suppress(TypeError, ValueError):
            return (
                not isinstance(value, bool)
                and float(value) == float(value)
                and (hint is float or int(value) == float(value))
            )
        return False
    if origin is dict or hint is dict:
        return isinstance(value, (dict, str))
    if isinstance(hint, type) and hint is not str:
        return True  # enums and configs check themselves when they are made
    return isinstance(value, (str, int, float)) and not isinstance(value, bool)


def _parse(parser: Any, values: dict[str, Any]) -> list[str]:
    """Make the configs as `train` does, which checks ranges and combinations. No model is loaded."""
    parser.set_defaults_with_config(**values)
    complaint = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stderr(complaint):
        warnings.simplefilter("ignore")
        try:
            parser.parse_args_into_dataclasses(args=[])
        except SystemExit:
            return [complaint.getvalue().strip().splitlines()[-1].partition("error: ")[2]]
        except Exception as error:  # whatever a config raises is what is wrong with it
            return [" ".join(str(error).split())]
    return []


def _read(path: str) -> tuple[Any, str | None]:
    import yaml

    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8")), None
    except OSError as error:
        return None, f"{path}: {error.strerror}."
    except yaml.YAMLError as error:
        return None, f"{path} is not YAML: {' '.join(str(error).split())}"


def run_validate(args: argparse.Namespace) -> int:
    """Print what is wrong, one line each; exit code 1 if anything is."""
    config, failure = _read(args.config)
    kind = args.kind or ("grpo" if any(key in (config or {}) for key in _TELLS_GRPO) else "sft")
    logging.disable(logging.WARNING)  # what the libraries warn about while a config is made is not about the file
    try:
        problems = [failure] if failure else problems_of(config, kind)
    finally:
        logging.disable(logging.NOTSET)
    if args.json:
        print(json.dumps({"config": args.config, "kind": kind, "valid": not problems, "problems": problems}, indent=2))
    elif problems:
        print("\n".join(problems), file=sys.stderr)
    else:
        print(f"{args.config}: valid for `hf-effi {kind}`.")
    return 1 if problems else 0


@contextlib.contextmanager
def _trainer_in_place(kind: str) -> Iterator[None]:
    """While it lasts, `from trl import GRPOTrainer` in TRL's script gives ours, which is a subclass."""
    import trl

    ours = load(TRAININGS[kind][2])
    name = ours.__name__.removeprefix("Effi")
    stock = getattr(trl, name)
    setattr(trl, name, ours)
    try:
        yield
    finally:
        setattr(trl, name, stock)


def train(kind: str, arguments: Sequence[str]) -> int:
    """Run TRL's training script with our config and trainer. `arguments` are those after `hf-effi grpo`."""
    arguments = list(arguments)
    if "--config" in arguments[:-1]:
        config, failure = _read(arguments[arguments.index("--config") + 1])
        problems = [failure] if failure else [line for line in problems_of(config, kind) if "unknown key" in line]
        if problems:
            print("\n".join(f"hf-effi {kind}: {problem}" for problem in problems), file=sys.stderr)
            return 2
    parsed = make_parser(kind).parse_args_and_config(arguments)
    try:
        with _trainer_in_place(kind):
            importlib.import_module(TRAININGS[kind][0]).main(*parsed)
    except HubRefusedError as error:
        print(f"hf-effi {kind}: {error}", file=sys.stderr)
        return 1
    return 0
