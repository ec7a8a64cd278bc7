"""
`hf-effi validate`, `grpo` and `sft`: a YAML as `trl` reads it, checked before a model is loaded, and trained by our
trainers.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import functools
import importlib
import io
import json
import logging
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from ._untrusted import one_line
from .cli_resolve import missing_of, resolve
from .cli_yaml import problems_of_keys, read_config
from .errors import HubRefusedError

EXIT_CODES = "exit codes: 0 done, 1 it failed (the reason is on stderr), 2 it was called wrongly"
#: command -> TRL's script, our config, our trainer, the trainer it stands for
TRAININGS = {
    "grpo": (
        "trl.scripts.grpo",
        "hf_effi.trainers.grpo.config:EffiGRPOConfig",
        "hf_effi.trainers.grpo.trainer:EffiGRPOTrainer",
    ),
    "sft": ("trl.scripts.sft", "hf_effi.trainers.sft:EffiSFTConfig", "hf_effi.trainers.sft:EffiSFTTrainer"),
}
_CHECK = "hf_effi.trainers._common:check_config"
#: keys that tell the kind of a file where as many speak for the one as for the other
_TELLS_GRPO = ("reward_funcs", "reward_model_name_or_path", "num_generations", "max_completion_length")


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
    problems = problems_of_keys(parser, config, other_keys(kind))
    if problems:
        return problems, []
    return _problems_of_values(parser, {key: value for key, value in config.items() if key != "env"}, kind)


@functools.cache
def own_keys(kind: str) -> frozenset[str]:
    """Return the keys that only this kind of training has."""
    mine, others = (
        {field.name for cls in make_parser(one).dataclass_types for field in dataclasses.fields(cls) if field.init}
        for one in (kind, _other(kind))
    )
    return frozenset(mine - others)


def other_keys(kind: str) -> dict[str, str]:
    """Return key -> what it is, of the keys that only the other kind of training has."""
    other = _other(kind)
    word = f"a {'GRPO' if other == 'grpo' else 'SFT'} key, which does not act in `hf-effi {kind}`. Remove it"
    return dict.fromkeys(own_keys(other), word)


def _other(kind: str) -> str:
    return "sft" if kind == "grpo" else "grpo"


def kind_of(config: Any) -> str:
    """Return `"grpo"` or `"sft"`: whose keys there are more of, also misspelt ones."""
    keys = [str(key)[:60] for key in config][:200] if isinstance(config, dict) else []
    grpo, sft = (
        sum(bool(difflib.get_close_matches(key, own_keys(kind), 1, 0.9)) for key in keys) for kind in ("grpo", "sft")
    )
    if grpo == sft:
        return "grpo" if any(key in _TELLS_GRPO for key in keys) else "sft"
    return "grpo" if grpo > sft else "sft"


def _problems_of_values(parser: Any, known: dict[str, Any], kind: str) -> tuple[list[str], list[str]]:
    """Tell what the configs refuse from what they accept on another machine."""
    parsed, problems = _parse(parser, known)
    notes: list[str] = []
    if problems and not known.get("use_cpu"):
        parsed, without_device = _parse(parser, {**known, "use_cpu": True})
        if without_device != problems:
            problems, notes = without_device, [_no_gpu(kind, problems[0])]
    if problems:
        return problems, notes
    problems, more = resolve(parsed, kind)
    return problems, [*notes, *more]


def _no_gpu(kind: str, reason: str) -> str:
    return (
        f"this machine has no GPU for these settings, so `hf-effi {kind}` would fail here: set use_cpu: true and "
        f"bf16: false to train on its CPU. (Its reason: {reason})"
    )


def _parse(parser: Any, values: dict[str, Any]) -> tuple[Any, list[str]]:
    """Make the configs as `train` does, which checks ranges and combinations, and tell why not. No model is loaded."""
    parser.set_defaults_with_config(**values)
    complaint = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stderr(complaint):
        warnings.simplefilter("ignore")
        try:
            parsed = parser.parse_args_into_dataclasses(args=[])
            load(_CHECK)(parsed[1])
        except SystemExit:
            return None, [one_line(complaint.getvalue().strip().splitlines()[-1].partition("error: ")[2])]
        except Exception as error:  # whatever a config raises is what is wrong with it
            return None, [one_line(error) or type(error).__name__]
    return parsed, []


def run_validate(args: argparse.Namespace) -> int:
    """Print what is wrong, one line each; exit code 1 if anything is."""
    config, failure = read_config(args.config)
    kind = args.kind or kind_of(config)
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
    with without_upstream_notices(_given_keys(arguments)):
        return _train(kind, arguments)


def _given_keys(arguments: Sequence[str]) -> set[str]:
    """Return the options of a command line and the keys of its file."""
    keys = {word[2:].partition("=")[0] for word in arguments if word.startswith("--")}
    if "--config" in arguments and (path := arguments[arguments.index("--config") + 1 :][:1]):
        config, _ = read_config(path[0])
        keys |= {str(key) for key in config} if isinstance(config, dict) else set()
    return keys


@contextlib.contextmanager
def without_upstream_notices(keys: set[str]) -> Iterator[None]:
    """
    While it lasts, a `FutureWarning` that names none of the keys is not shown: it is for whoever calls a library.

    With `python -W` or `PYTHONWARNINGS` all is as they say.
    """
    if sys.warnoptions:
        yield
        return
    with warnings.catch_warnings():
        show = warnings.showwarning

        def show_what_can_be_acted_on(message: Any, category: Any, *rest: Any, **options: Any) -> None:
            named = set(re.findall(r"\w+", str(message)))
            if not issubclass(category, FutureWarning) or named & keys:
                show(message, category, *rest, **options)

        warnings.showwarning = show_what_can_be_acted_on
        yield


def _train(kind: str, arguments: list[str]) -> int:
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
        config, failure = read_config(path[0])
        problems = [failure] if failure else problems_of_keys(make_parser(kind), config, other_keys(kind))
        if problems:
            return None, problems
    try:
        parsed = make_parser(kind).parse_args_and_config(arguments)
    except ValueError as error:
        reason = one_line(error)
        with contextlib.suppress(ValueError):
            make_parser(kind).parse_args_and_config([*arguments, "--use_cpu", "true"])
            reason = _no_gpu(kind, reason)
        return None, [reason]
    try:
        load(_CHECK)(parsed[1])
    except ValueError as error:
        return None, [one_line(error)]
    return parsed, missing_of(parsed, kind)


def _while_training(error: BaseException) -> bool:
    """Whether it was raised inside `Trainer.train`: then its place matters, before only its reason does."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(f.f_code.co_name == "train" and f.f_globals["__name__"] == "transformers.trainer" for f in frames)


def _reason(error: Exception, script: str, asked: str) -> str | None:
    """Return in one sentence why training did not begin, or `None` where the traceback says more."""

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
