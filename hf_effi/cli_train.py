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
import traceback
import types
import typing
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ._run_record import redact

EXIT_CODES = "exit codes: 0 done, 1 it failed (the reason is on stderr), 2 it was called wrongly"
#: command -> TRL's script, our config, our trainer, the trainer it stands for
TRAININGS = {
    "grpo": (
        "trl.scripts.grpo",
        "hf_effi.trainers.grpo_config:EffiGRPOConfig",
        "hf_effi.trainers.grpo:EffiGRPOTrainer",
    ),
    "sft": ("trl.scripts.sft", "hf_effi.trainers.sft:EffiSFTConfig", "hf_effi.trainers.sft:EffiSFTTrainer"),
}
_CHECK = "hf_effi.trainers._common:check_config"
#: keys that only this kind of training has
_TELLS_GRPO = ("reward_funcs", "reward_model_name_or_path", "num_generations", "max_completion_length", "prune_rate")
#: key -> smallest value that means anything, of those that upstream takes without a look
_LEAST = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), 1),
    **dict.fromkeys(("learning_rate", "weight_decay", "max_grad_norm", "num_train_epochs", "warmup_steps"), 0),
    **dict.fromkeys(("logging_steps", "save_steps", "eval_steps"), 0),
    **dict.fromkeys(("max_length", "max_completion_length", "num_generations"), 1),
    "max_steps": -1,  # no limit
}


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults beside the options, and the lines of the example as they are."""


def load(path: str) -> Any:
    """Import `module:name`."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def make_parser(kind: str) -> Any:
    """Return TRL's parser of this command, with our config in the place of its own, and a help that fits."""
    from trl import TrlParser

    script, config, _ = TRAININGS[kind]
    stock = importlib.import_module(script).make_parser(prog=f"hf-effi {kind}")
    ours = load(config)
    types_ = [ours if issubclass(ours, cls) else cls for cls in stock.dataclass_types]
    return TrlParser(
        types_,
        prog=f"hf-effi {kind}",
        usage=f"hf-effi {kind} [--config FILE.yaml] [--option VALUE ...]",
        description=f"Train as `trl {kind}` does, with our trainer. Options and keys of the YAML are TRL's and ours;\n"
        "an option on the command line wins over the file.",
        epilog=f"example:\n  hf-effi {kind} --config run.yaml --max_steps 100\n"
        f"  accelerate launch -m hf_effi {kind} --config run.yaml\n\n{EXIT_CODES}",
        formatter_class=_Help,
    )


def problems_of(config: Any, kind: str) -> tuple[list[str], list[str]]:
    """
    Check a configuration without a model.

    Args:
        config: What the YAML holds.
        kind (`str`): `"grpo"` or `"sft"`.

    Returns:
        `tuple[list[str], list[str]]`: What is wrong, one sentence each, and what only this machine would refuse.
    """
    parser = make_parser(kind)
    problems = problems_of_keys(parser, config)
    if problems:
        return problems, []
    return _problems_of_values(parser, {key: value for key, value in config.items() if key != "env"}, kind)


def problems_of_keys(parser: Any, config: Any) -> list[str]:
    """Return one sentence for each unknown key and each value of a wrong type."""
    if not isinstance(config, dict):
        held = "is empty" if config is None else f"holds {type(config).__name__}"
        return [f"the file {held}, but must be a mapping: lines of `key: value`."]
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
            found.append(f"{key}: {redact(value, key)!r} is {type(value).__name__}, but must be {wanted}.")
        elif key in _LEAST and value is not None and float(value) < _LEAST[key]:
            found.append(f"{key}: {value!r} must be at least {_LEAST[key]}.")
    return found


def _problems_of_values(parser: Any, known: dict[str, Any], kind: str) -> tuple[list[str], list[str]]:
    """Tell what the configs refuse from what they accept on another machine."""
    problems = _parse(parser, known)
    if not problems or known.get("use_cpu"):
        return problems, []
    without_device = _parse(parser, {**known, "use_cpu": True})
    if without_device == problems:
        return problems, []
    return without_device, [_no_gpu(kind, problems[0])]


def _no_gpu(kind: str, reason: str) -> str:
    return (
        f"this machine has no GPU for these settings, so `hf-effi {kind}` would fail here: set use_cpu: true and "
        f"bf16: false to train on its CPU. (Its reason: {reason})"
    )


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
            _, training, *_ = parser.parse_args_into_dataclasses(args=[])
            load(_CHECK)(training)
        except SystemExit:
            return [complaint.getvalue().strip().splitlines()[-1].partition("error: ")[2]]
        except Exception as error:  # whatever a config raises is what is wrong with it
            return [" ".join(str(error).split())]
    return []


def _read(path: str) -> tuple[Any, str | None]:
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        lines: dict[str, int] = {}
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        for key, _ in root.value if isinstance(root, yaml.MappingNode) else ():
            first = lines.setdefault(str(key.value), key.start_mark.line + 1)
            if first != key.start_mark.line + 1:
                return None, f"{path}: {key.value} is set in line {first} and again in line {key.start_mark.line + 1}."
        return yaml.safe_load(text), None
    except OSError as error:
        return None, f"{path}: {error.strerror}."
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        advice = " Indent with spaces." if "\\t" in error.problem else ""
        return None, f"{path} is not YAML: line {mark.line + 1}, column {mark.column + 1}: {error.problem}.{advice}"
    except (ValueError, yaml.YAMLError) as error:  # not UTF-8, or control characters
        return None, f"{path} is not a YAML file: {' '.join(str(error).split())}."


def run_validate(args: argparse.Namespace) -> int:
    """Print what is wrong, one line each; exit code 1 if anything is."""
    config, failure = _read(args.config)
    keys = config if isinstance(config, dict) else ()
    kind = args.kind or (
        "grpo" if any(difflib.get_close_matches(str(key), _TELLS_GRPO, 1, 0.9) for key in keys) else "sft"
    )
    logging.disable(logging.WARNING)  # what the libraries warn about while a config is made is not about the file
    try:
        problems, notes = ([failure], []) if failure else problems_of(config, kind)
    finally:
        logging.disable(logging.NOTSET)
    if args.json:
        found = {"config": args.config, "kind": kind, "valid": not problems, "problems": problems, "notes": notes}
        print(json.dumps(found, indent=2))
        return 1 if problems else 0
    for problem in problems:
        print(f"hf-effi validate: {problem}", file=sys.stderr)
    if not problems:
        print(f"{args.config}: valid for `hf-effi {kind}`.")
    for note in notes:
        print(f"note: {note}", file=sys.stderr if problems else sys.stdout)
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
    arguments = [part for word in arguments for part in _split_config(word)]
    parsed, problems = _parse_command(kind, arguments)
    if problems:
        print("\n".join(f"hf-effi {kind}: {problem}" for problem in problems), file=sys.stderr)
        return 2
    script = TRAININGS[kind][0]
    try:
        with _trainer_in_place(kind):
            importlib.import_module(script).main(*parsed)
    except Exception as error:
        asked = f"model {parsed[2].model_name_or_path!r}, data {parsed[0].dataset_name!r}"
        reason = None if _while_training(error) else _reason(error, script, asked)
        if reason is None:
            raise
        print(f"hf-effi {kind}: {reason}", file=sys.stderr)
        return 1
    return 0


def _split_config(word: str) -> list[str]:
    return word.split("=", 1) if word.startswith("--config=") else [word]  # TRL reads the two-word form only


def _parse_command(kind: str, arguments: list[str]) -> tuple[Any, list[str]]:
    """Return the configs, and what is wrong with options and file, one sentence each."""
    if not arguments:
        return None, [f"nothing to train: give --config FILE.yaml or options; `hf-effi {kind} --help` lists them."]
    if "--config" in arguments:
        path = arguments[arguments.index("--config") + 1 :][:1]
        if not path:
            return None, ["--config needs a file, such as --config run.yaml."]
        config, failure = _read(path[0])
        problems = [failure] if failure else problems_of_keys(make_parser(kind), config)
        if problems:
            return None, problems
    try:
        parsed = make_parser(kind).parse_args_and_config(arguments)
    except ValueError as error:
        reason = " ".join(str(error).split())
        with contextlib.suppress(ValueError):
            make_parser(kind).parse_args_and_config([*arguments, "--use_cpu", "true"])
            reason = _no_gpu(kind, reason)
        return None, [reason]
    try:
        load(_CHECK)(parsed[1])
    except ValueError as error:
        return None, [" ".join(str(error).split())]
    script, model, data = parsed[0], parsed[2], parsed[3]
    missing = []
    if not model.model_name_or_path:
        missing.append("no model: give model_name_or_path in the file or on the command line.")
    if not script.dataset_name and not data.datasets:
        missing.append("no data: give dataset_name (or datasets) in the file or on the command line.")
    if kind == "grpo" and not script.reward_funcs and not script.reward_model_name_or_path:
        missing.append(
            "no reward: give reward_funcs (or reward_model_name_or_path) in the file or on the command line."
        )
    return parsed, missing


def _while_training(error: BaseException) -> bool:
    """Whether it was raised inside `Trainer.train`: then its place matters, before only its reason does."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(f.f_code.co_name == "train" and f.f_globals["__name__"] == "transformers.trainer" for f in frames)


def _reason(error: Exception, script: str, asked: str) -> str | None:
    """Return in one sentence why training did not begin, or `None` where the traceback says more."""
    from .hub.uploads import HubRefusedError

    text = " ".join(str(error).split())
    if isinstance(error, (OSError, HubRefusedError)):
        return f"{text} (Asked for: {asked}.)"
    names = [frame.f_globals["__name__"] for frame, _ in traceback.walk_tb(error.__traceback__)]
    # An import that finds nothing ends in the frames of importlib.
    raised_by = [name for name in names if not name.startswith(("importlib", "_frozen_importlib"))][-1]
    if isinstance(error, ValueError) and raised_by.startswith((script, "hf_effi.")):
        return text
    if isinstance(error, (AttributeError, ModuleNotFoundError)) and raised_by == script:
        return f"reward_funcs: {text}. Give module.function of a module that is installed, or in this folder."
    return None
