"""`hf-effi`: what is installed, which methods there are, and the demo.

Exit codes: 0 done, 1 the command failed, 2 it was called wrongly. Heavy imports happen inside the commands, so that
`hf-effi --help` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import importlib
import inspect
import json
import logging
import os
import sys
import textwrap
from collections.abc import Sequence
from typing import Any, NoReturn

from ._version import __version__
from .cli_train import EXIT_CODES, run_validate, train, without_upstream_notices
from .errors import MissingPackageError

#: `hf-effi plan <name>`: module with `add_arguments(parser)` and `run(args) -> int`, help, example. A new planner is
#: one line here.
PLANNERS: dict[str, tuple[str, str, str]] = {
    "lr": (
        "hf_effi.report.plan_lr",
        "draw, transfer, extend or predict a learning-rate schedule without training",
        "hf-effi plan lr show --steps 1000 --schedule wsd --schedule 'cosine {\"warmup_steps\": 50}'",
    ),
    "layout": (
        "hf_effi.report.plan_layout",
        "ways to spread a training over devices, ranked by memory and time, with the launch file of the best",
        "hf-effi plan layout Qwen/Qwen3-8B --gpus 8 --gpu-gib 80 --seq-len 8192 --global-batch 64",
    ),
    "memory": (
        "hf_effi.report.plan_memory",
        "what a training step needs, for each set of memory switches, from the model's config alone",
        "hf-effi plan memory Qwen/Qwen3-0.6B --seq-len 8192 --gpu-gib 24",
    ),
    "grpo": (
        "hf_effi.report.plan_grpo",
        "where the time of a GRPO run goes, what filter, pruning, packing and sharing would save, and settings",
        "hf-effi plan grpo Qwen/Qwen3-0.6B --card h100 --prompt-length 128 --completion-length p50=200,p100=1024",
    ),
    "scaling": (
        "hf_effi.report.plan_scaling",
        "fit a scaling law to finished runs: the best size for a compute, with intervals and held-out errors",
        "hf-effi plan scaling runs/ --flops 1e18",
    ),
    "early-eval": (
        "hf_effi.report.plan_early_eval",
        "which logged metric orders the runs of a sweep early as their end does, with rank correlations",
        "hf-effi plan early-eval runs/",
    ),
    "optimizer": (
        "hf_effi.report.plan_optimizer",
        "optimizer settings that were tuned for a model of this size, from a published table",
        "hf-effi plan optimizer --params 300M --tokens 6B",
    ),
}

#: Commands of their own module, with the same two functions, help and example.
MODULES: dict[str, tuple[str, str, str]] = {
    "average": (
        "hf_effi.checkpoint.merge_command",
        "average the checkpoints of a finished run, or several runs; a model between two; an instruction delta",
        "hf-effi average out/ --output averaged/ --weights uniform --last 5",
    ),
    "checkpoint": (
        "hf_effi.checkpoint.command",
        "which checkpoints of a run are whole, which are not and why; repair a folder, convert one; how often to save",
        "hf-effi checkpoint list out/        hf-effi checkpoint verify out/checkpoint-40 --json",
    ),
    "check-reward": (
        "hf_effi.report.reward_check",
        "call a reward function on right, wrong, empty and cut answers, and say what will go wrong in a run",
        "hf-effi check-reward my_rewards.accuracy rows.jsonl --template 'The answer is {answer}.'",
    ),
    "preview-order": (
        "hf_effi.report.preview_order",
        "what a curriculum would serve, without training",
        "hf-effi preview-order quality-ascending rows.jsonl --column quality",
    ),
    "profile": (
        "hf_effi.report.profile",
        "which of several settings reached a target for less, over run records; also `hf-effi report profile`",
        "hf-effi profile --target 2.0 stock=runs/stock ours=runs/ours --baseline stock",
    ),
    "report": (
        "hf_effi.report.run_page",
        "one page that tells a run, or compares runs",
        "hf-effi report out/        hf-effi report --compare stock/ ours/ --output both.html",
    ),
    "tokens": (
        "hf_effi.data.token_command",
        "write a corpus into one flat file of tokens, tell what is in it, check every byte",
        "hf-effi tokens write corpus.jsonl --tokenizer Qwen/Qwen3-0.6B --output corpus",
    ),
}

_EXAMPLES = f"""examples:
  hf-effi describe wsd                          formula, paper and defaults of a method
  hf-effi validate run.yaml                     wrong keys, types and ranges, before a model is loaded
  hf-effi grpo --config run.yaml --max_steps 9  train as `trl grpo` would; options win over the file
  hf-effi report out/                           one page that tells the run
  source <(hf-effi completion bash)             complete commands, options and methods

{EXIT_CODES}"""

#: Set before the first heavy import, unless the user has set them: one thread, offline, no telemetry.
_DEMO_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


class _UsageError(Exception):
    """The command was called wrongly: printed as one line, exit code 2."""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, which the usage in front of it would hide."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message.rstrip('.')}. `{self.prog} --help` lists what it takes.\n")


def _env(args: argparse.Namespace) -> int:
    from ._compat import installed_versions
    from ._environment import current_commit, describe_machine

    found: dict[str, Any] = {
        "machine": describe_machine(),
        "versions": installed_versions(),
        "commit": current_commit(),
    }
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    for section in ("machine", "versions"):
        print(section)
        for name, value in found[section].items():
            print(f"  {name:<14} {value}")
    return 0


def _list(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from .methods import METHODS

    if args.json:
        print(json.dumps([asdict(method) for method in METHODS], indent=2))
        return 0
    width = max(len(method.key) for method in METHODS)
    for method in METHODS:
        print(f"{method.key:<{width}}  {method.status:<12}  {method.summary}")
    return 0


def _describe(args: argparse.Namespace) -> int:
    from .methods import METHODS, find_method

    try:
        method = find_method(args.method)
    except KeyError:
        known = [method.key for method in METHODS]
        near = difflib.get_close_matches(args.method, known, n=3, cutoff=0.4) or sorted(known)
        raise _UsageError(f"unknown method {args.method!r}. Nearest known: {', '.join(near)}.") from None
    source = f"{method.paper} (arXiv:{method.paper_id})" if method.paper_id else method.paper
    if args.json:
        print(json.dumps({**dataclasses.asdict(method), "card": method.card}, indent=2))
        return 0
    print(f"{method.title} [{method.kind}, {method.status}]\n{method.summary}\n")
    for label, value in (
        ("source", source),
        ("code", ", ".join(method.code) or "no code to import: the card says why"),
        ("card", method.card),
        ("tests", ", ".join(method.tests)),
        ("bench", method.bench),
    ):
        print(f"  {label:<7} {value}")
    if not method.entry_points:
        return 0
    module, _, attribute = method.entry_points[0].partition(":")
    entry = getattr(importlib.import_module(module), attribute)
    print("\n" + (inspect.getdoc(entry) or "").split("\nArgs:")[0].split("\nExample:")[0].rstrip())
    if isinstance(entry, type) and dataclasses.is_dataclass(entry) and method.kind == "schedule":
        _draw_schedule(entry)
    return 0


def _draw_schedule(schedule_class: type) -> None:
    """Print the defaults of a schedule and its curve over a run of 60 updates."""
    from .functional.schedules import gallery
    from .report.schedule_plot import text_curve

    defaults = [
        f"{f.name}={f.default!r}" for f in dataclasses.fields(schedule_class) if f.default is not dataclasses.MISSING
    ]
    print("\ndefaults: " + ", ".join(defaults))
    # The gallery has instances of every schedule, also of those that cannot do without arguments; take one that moves.
    examples = [schedule for schedule in gallery(60) if type(schedule) is schedule_class]
    moving = [schedule for schedule in examples if len({round(value, 2) for value in schedule.trace(60)}) > 2]
    if examples:
        print("\n" + text_curve((moving or examples)[-1], 60))


def _demo(args: argparse.Namespace) -> int:
    if args.seeds < 1:
        raise _UsageError(f"--seeds must be at least 1, got {args.seeds}.")
    if args.steps is not None and (args.steps < 4 or args.steps % 4):
        # Arms are compared at an evaluation, which comes every 4 steps (DemoSettings.eval_every_steps).
        raise _UsageError(f"--steps must be a positive multiple of 4, got {args.steps}.")
    _check_own_model(args)
    from ._compat import require

    # Asked for now, not after ten minutes of training.
    for package in ("matplotlib", "jinja2") if args.model is None else ():
        require(package, "the demo's report page")
    for name, value in _DEMO_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Where it is installed, it warns at import that a kernel is missing that nothing here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from .demo.arms import choose_arms

    arms = None if args.arms is None else [key.strip() for key in args.arms.split(",") if key.strip()]
    try:
        choose_arms(arms)
    except ValueError as error:
        raise _UsageError(str(error)) from None
    from .demo.command import main as run

    try:
        os.makedirs(args.output_dir, exist_ok=True)
    except OSError as error:
        print(f"hf-effi demo: cannot write to {args.output_dir}: {error.strerror}.", file=sys.stderr)
        return 1
    if args.model is not None:
        return _demo_on_own_model(args, arms)
    return run(
        args.output_dir,
        seeds=range(args.seed, args.seed + args.seeds),
        steps=args.steps,
        arms=arms,
        quick=args.quick,
        as_json=args.json,
    )


#: options of the demo that act on a model of the user's only
_OF_OWN_MODEL = {"data": "--data", "learning_rate": "--learning-rate", "max_completion": "--max-completion"}


def _check_own_model(args: argparse.Namespace) -> None:
    for name, option in _OF_OWN_MODEL.items():
        if args.model is None and getattr(args, name) is not None:
            raise _UsageError(f"{option} acts only with --model FOLDER, which is not given. Add it, or drop {option}.")
    if args.model is not None and args.quick and args.steps is not None:
        raise _UsageError("--quick with --model runs 4 steps. Drop --quick or --steps.")
    if args.learning_rate is not None and not 0 < args.learning_rate < 1:
        raise _UsageError(f"--learning-rate must lie between 0 and 1, got {args.learning_rate}.")
    if args.max_completion is not None and args.max_completion < 1:
        raise _UsageError(f"--max-completion must be at least 1, got {args.max_completion}.")


def _demo_on_own_model(args: argparse.Namespace, arms: list[str] | None) -> int:
    from pathlib import Path

    from .demo.arms import choose_arms
    from .demo.own_model import DEFAULT_ARMS, OwnSettings, main, prepare

    chosen = choose_arms(DEFAULT_ARMS if arms is None else arms)
    names = ("steps", "learning_rate", "max_completion")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    data = None if args.data is None else Path(args.data)
    own = OwnSettings(Path(args.model), data, quick=args.quick, **given)
    seeds = range(args.seed, args.seed + args.seeds)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what imports say
            work, text = prepare(own, len(chosen))
    except ValueError as error:  # before anything is trained
        raise _UsageError(str(error)) from None
    return main(own, work, text, args.output_dir, seeds=seeds, arms=chosen, as_json=args.json)


def _accelerate_config(args: argparse.Namespace) -> int:
    from .recipes.launch import accelerate_config

    try:
        path = accelerate_config(args.kind, args.num_gpus)
    except ValueError as error:
        raise _UsageError(str(error)) from None
    print(json.dumps({"kind": args.kind, "num_gpus": args.num_gpus, "path": path}) if args.json else path)
    return 0


def _command(commands: Any, name: str, text: str, example: str, *, more: str = "", has_json: bool = False) -> Any:
    """Return the parser of one command, whose help says what it does, shows an example and tells the exit codes."""
    parser = commands.add_parser(
        name,
        help=text,
        description=textwrap.fill(f"{text[0].upper()}{text[1:]}. {more}", 100),
        epilog=f"example:\n  {example}\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if has_json:
        parser.add_argument("--json", action="store_true", help="print JSON, and nothing else, on stdout")
    return parser


def _add_accelerate_config(commands: Any) -> None:
    parser = _command(
        commands,
        "accelerate-config",
        "path of a launch file for `accelerate launch`",
        'accelerate launch --config_file "$(hf-effi accelerate-config fsdp2 4)" train.py',
        has_json=True,
    )
    parser.add_argument("kind", metavar="KIND", help="ddp, fsdp2 or deepspeed")
    parser.add_argument("num_gpus", type=int, metavar="GPUS", help="1, 2, 4 or 8")
    parser.set_defaults(run=_accelerate_config)


def _add_demo(commands: Any) -> None:
    parser = _command(
        commands,
        "demo",
        "train with TRL's GRPOTrainer and with ours on the same work, compare",
        "hf-effi demo --quick",
        more="Runs on a CPU without a download, and leaves a model, a report page and results.json.",
        has_json=True,
    )
    parser.add_argument("--output-dir", default="demo-output", help="model, report and results go here")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="how many seeds to run")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="the first seed")
    parser.add_argument("--steps", type=int, metavar="N", help="optimizer steps of each arm")
    parser.add_argument("--arms", metavar="A,B", help="arms to run beside the baseline, comma-separated; default: all")
    parser.add_argument("--quick", action="store_true", help="a smoke test of seconds that learns nothing")
    own = parser.add_argument_group("on a model of your own, for a few steps")
    own.add_argument("--model", metavar="FOLDER", help="a local folder with a model and its tokenizer")
    own.add_argument(
        "--data",
        metavar="PATH",
        help="JSONL file or `save_to_disk` folder: columns prompt and answer; default: additions",
    )
    own.add_argument("--learning-rate", type=float, metavar="LR", help="of all arms; default: 1e-5")
    own.add_argument("--max-completion", type=int, metavar="N", help="most tokens of a completion; default: 32")
    parser.set_defaults(run=_demo)


def _add_plan(commands: Any, chosen: str | None) -> None:
    parser = _command(commands, "plan", "plan a run before it starts", PLANNERS["memory"][2])
    planners = parser.add_subparsers(dest="planner_name", required=True, metavar="|".join(PLANNERS))
    for name, (module, text, example) in PLANNERS.items():
        planner = _command(planners, name, text, example)
        if name == chosen:
            _fill(planner, "planner", module)
    parser.set_defaults(run=lambda args: args.planner(args))


def _add_modules(commands: Any, chosen: str | None) -> None:
    for name, (module, text, example) in MODULES.items():
        parser = _command(commands, name, text, example)
        if name == chosen:
            _fill(parser, "run", module)


def _fill(parser: Any, attribute: str, module_name: str) -> None:
    """Add the options of a command that has a module, which may import torch: only when it is called for."""
    module = importlib.import_module(module_name)
    module.add_arguments(parser)
    parser.set_defaults(**{attribute: module.run})


def _add_training(commands: Any) -> None:
    for name in ("grpo", "sft"):
        commands.add_parser(name, help=f"train as `trl {name}` does, with our trainer; `hf-effi {name} --help`")
    validate = _command(
        commands,
        "validate",
        "check a YAML before a model is loaded",
        "hf-effi validate run.yaml --kind grpo",
        more="Keys, types, ranges and combinations, as `hf-effi grpo` or `sft` will read them; then whether model, "
        "data, reward functions and packages are there. Nothing of it is loaded or imported. Exit code 0: valid; what "
        "only this machine would refuse is a note.",
        has_json=True,
    )
    validate.add_argument("config", metavar="CONFIG.yaml", help="the file that `--config` would read")
    validate.add_argument("--kind", choices=["grpo", "sft"], help="what it is for; told by its keys without")
    validate.set_defaults(run=run_validate)


def _completion(args: argparse.Namespace) -> int:
    """Print a script; `source <(hf-effi completion bash)` completes commands, options and method keys."""
    from .methods import METHODS

    actions = {action.dest: action for action in args.parser._actions}
    commands = list(actions["command"].choices)
    keys = " ".join(method.key for method in METHODS)
    further = {"describe": keys, "plan": " ".join(PLANNERS)}
    words = []
    for name, sub in actions["command"].choices.items():
        options = [option for action in sub._actions for option in action.option_strings]
        words.append(f'    {name}) words="{" ".join([*options, further.get(name, "")])}" ;;')
    zsh = "autoload -U +X bashcompinit && bashcompinit\n" if args.shell == "zsh" else ""
    print(
        f'{zsh}_hf_effi() {{\n  local words="{" ".join(commands)}"\n  if [ $COMP_CWORD -gt 1 ]; then\n'
        '    case "${COMP_WORDS[1]}" in\n' + "\n".join(words) + "\n    esac\n  fi\n"
        '  COMPREPLY=($(compgen -W "$words" -- "${COMP_WORDS[COMP_CWORD]}"))\n'
        '  [ ${#COMPREPLY[@]} -eq 0 ] && COMPREPLY=($(compgen -f -- "${COMP_WORDS[COMP_CWORD]}"))\n}\n'
        "complete -F _hf_effi hf-effi"
    )
    return 0


def build_parser(arguments: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Return the parser; `arguments` tells which planner's options have to be loaded."""
    parser = _Parser(
        prog="hf-effi",
        description="Train for less with the Trainer you have.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hf_effi {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    env = _command(commands, "env", "machine and versions, for a bug report", "hf-effi env --json", has_json=True)
    env.set_defaults(run=_env)
    listing = _command(commands, "list", "the methods and their status", "hf-effi list", has_json=True)
    listing.set_defaults(run=_list)
    text = "one method: formula, paper, code, card, tests, bench"
    describe = _command(commands, "describe", text, "hf-effi describe wsd", has_json=True)
    describe.add_argument("method", metavar="METHOD", help="a key that `hf-effi list` prints")
    describe.set_defaults(run=_describe)
    words = [word for word in arguments if not word.startswith("-")]
    _add_plan(commands, words[1] if words[:1] == ["plan"] and len(words) > 1 else None)
    _add_modules(commands, words[0] if words else None)
    _add_accelerate_config(commands)
    _add_demo(commands)
    _add_training(commands)
    completion = _command(
        commands, "completion", "completion of commands, options and methods", "source <(hf-effi completion bash)"
    )
    completion.add_argument("shell", choices=["bash", "zsh"], help="the shell to print the script for")
    completion.set_defaults(run=_completion, parser=parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:2] == ["report", "profile"]:
        arguments = arguments[1:]
    name = " ".join(["hf-effi", *arguments[:1]])
    try:
        if arguments[:1] in (["grpo"], ["sft"]):
            # The options are TRL's and ours together, which its own parser reads.
            return train(arguments[0], arguments[1:])
        args, unknown = build_parser(arguments).parse_known_args(arguments)
        if unknown:
            raise _UsageError(f"unknown argument {unknown[0]}. `{name} --help` lists what it takes.")
        with without_upstream_notices(set()):
            return args.run(args)
    except _UsageError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except MissingPackageError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader, such as `| head`, has seen enough; without this, Python complains once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(f"\n{name}: stopped.", file=sys.stderr)
        return 130
