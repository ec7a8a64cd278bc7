"""`hf-effi`: what is installed, which methods there are, and the demo.

Exit codes: 0 done, 1 the command failed, 2 it was called wrongly. Heavy imports happen inside the commands, so that
`hf-effi --help` answers at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib
import inspect
import json
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from ._compat import MissingPackageError
from ._version import __version__

#: `hf-effi plan <name>`: module with `add_arguments(parser)` and `run(args) -> int`. A new planner is one line here.
PLANNERS: dict[str, str] = {"lr": "hf_effi.report.plan_lr", "memory": "hf_effi.report.plan_memory"}

#: Commands of their own module, with the same two functions and their line of help.
MODULES: dict[str, tuple[str, str]] = {
    "preview-order": ("hf_effi.report.preview_order", "what a curriculum would serve, without training"),
    "report": ("hf_effi.report.run_page", "one page that tells a run, or compares runs"),
}

_EXAMPLES = """examples:
  hf-effi describe wsd                          formula, paper and defaults of a method
  hf-effi validate run.yaml                     wrong keys, types and ranges, before a model is loaded
  hf-effi grpo --config run.yaml --max_steps 9  train as `trl grpo` would; options win over the file
  hf-effi report out/                           one page that tells the run
  source <(hf-effi completion bash)             complete commands, options and methods

exit codes: 0 done, 1 it failed (the reason is on stderr), 2 it was called wrongly"""

#: Set before the first heavy import, unless the user has set them: one thread, offline, no telemetry.
_DEMO_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


class UsageError(Exception):
    """The command was called wrongly: printed as one line, exit code 2."""


def _env(args: argparse.Namespace) -> int:
    from ._compat import installed_versions
    from ._environment import current_commit, describe_machine

    found = {"machine": describe_machine(), "versions": installed_versions(), "commit": current_commit()}
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
        raise UsageError(f"unknown method {args.method!r}. Nearest known: {', '.join(near)}.") from None
    source = f"{method.paper} (arXiv:{method.paper_id})" if method.paper_id else method.paper
    if args.json:
        print(json.dumps({**dataclasses.asdict(method), "card": method.card}, indent=2))
        return 0
    print(f"{method.title} [{method.kind}, {method.status}]\n{method.summary}\n")
    for label, value in (
        ("source", source),
        ("code", ", ".join(method.entry_points) or "none: the card says why"),
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


def _plan(args: argparse.Namespace) -> int:
    return args.planner(args)


def _demo(args: argparse.Namespace) -> int:
    if args.seeds < 1:
        raise UsageError(f"--seeds must be at least 1, got {args.seeds}.")
    if args.steps is not None and (args.steps < 4 or args.steps % 4):
        # Arms are compared at an evaluation, which comes every 4 steps (DemoSettings.eval_every_steps).
        raise UsageError(f"--steps must be a positive multiple of 4, got {args.steps}.")
    for name, value in _DEMO_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Where it is installed, it warns at import that a kernel is missing that nothing here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from .demo.arms import choose_arms

    arms = None if args.arms is None else [key.strip() for key in args.arms.split(",") if key.strip()]
    try:
        choose_arms(arms)
    except ValueError as error:
        raise UsageError(str(error)) from None
    from ._compat import require

    # Asked for now, not after ten minutes of training.
    for package in ("matplotlib", "jinja2"):
        require(package, "the demo's report page")
    from .demo.command import main as run

    return run(args.output_dir, range(args.seed, args.seed + args.seeds), args.steps, arms, args.quick)


def _accelerate_config(args: argparse.Namespace) -> int:
    from .recipes.launch import accelerate_config

    try:
        print(accelerate_config(args.kind, args.num_gpus))
    except ValueError as error:
        raise UsageError(str(error)) from None
    return 0


def _add_accelerate_config(commands: Any) -> None:
    parser = commands.add_parser("accelerate-config", help="path of a launch file for `accelerate launch`")
    parser.add_argument("kind", metavar="KIND", help="ddp, fsdp2 or deepspeed")
    parser.add_argument("num_gpus", type=int, metavar="GPUS", help="1, 2, 4 or 8")
    parser.set_defaults(run=_accelerate_config)


def _add_demo(commands: Any) -> None:
    parser = commands.add_parser("demo", help="train with TRL's GRPOTrainer and with ours on the same work, compare")
    parser.add_argument("--output-dir", default="demo-output", help="model, report and results go here")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="how many seeds to run")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="the first seed")
    parser.add_argument("--steps", type=int, metavar="N", help="optimizer steps of each arm")
    parser.add_argument("--arms", metavar="A,B", help="arms to run beside the baseline, comma-separated; default: all")
    parser.add_argument("--quick", action="store_true", help="a smoke test of a minute that learns nothing")
    parser.set_defaults(run=_demo)


def _add_plan(commands: Any, chosen: str | None) -> None:
    parser = commands.add_parser("plan", help="plan a run before it starts")
    planners = parser.add_subparsers(dest="planner_name", required=True, metavar="WHAT")
    for name, module_name in PLANNERS.items():
        planner = planners.add_parser(name)
        if name == chosen:
            # Imported only when it is called for: planners may import torch.
            module = importlib.import_module(module_name)
            module.add_arguments(planner)
            planner.set_defaults(planner=module.run)
    parser.set_defaults(run=_plan)


def _add_modules(commands: Any, chosen: str | None) -> None:
    for name, (module_name, text) in MODULES.items():
        parser = commands.add_parser(name, help=text)
        if name == chosen:
            module = importlib.import_module(module_name)
            module.add_arguments(parser)
            parser.set_defaults(run=module.run)


def _add_training(commands: Any) -> None:
    for name in ("grpo", "sft"):
        commands.add_parser(name, help=f"train as `trl {name}` does, with our trainer; `hf-effi {name} --help`")
    validate = commands.add_parser(
        "validate",
        help="check a YAML before a model is loaded",
        description="Check the keys, types and ranges of a YAML for `hf-effi grpo` or `sft`. Exit code 0: valid.",
    )
    validate.add_argument("config", metavar="CONFIG.yaml", help="the file that `--config` would read")
    validate.add_argument("--kind", choices=["grpo", "sft"], help="what it is for; told by its keys without")
    validate.add_argument("--json", action="store_true", help="print JSON")
    validate.set_defaults(run=_validate)


def _validate(args: argparse.Namespace) -> int:
    from .cli_train import run_validate

    return run_validate(args)


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
    parser = argparse.ArgumentParser(
        prog="hf-effi",
        description="Train for less with the Trainer you have.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hf_effi {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, run, text in (("env", _env, "machine and versions"), ("list", _list, "the methods and their status")):
        command = commands.add_parser(name, help=text)
        command.add_argument("--json", action="store_true", help="print JSON")
        command.set_defaults(run=run)
    describe = commands.add_parser("describe", help="one method: paper, code, card, tests, bench")
    describe.add_argument("method", metavar="METHOD")
    describe.add_argument("--json", action="store_true", help="print JSON")
    describe.set_defaults(run=_describe)
    words = [word for word in arguments if not word.startswith("-")]
    _add_plan(commands, words[1] if words[:1] == ["plan"] and len(words) > 1 else None)
    _add_modules(commands, words[0] if words else None)
    _add_accelerate_config(commands)
    _add_demo(commands)
    _add_training(commands)
    completion = commands.add_parser("completion", help="completion for your shell: source <(hf-effi completion bash)")
    completion.add_argument("shell", choices=["bash", "zsh"])
    completion.set_defaults(run=_completion, parser=parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    name = " ".join(["hf-effi", *arguments[:1]])
    try:
        if arguments[:1] in (["grpo"], ["sft"]):
            from .cli_train import train  # the options are TRL's and ours together, which its own parser reads

            return train(arguments[0], arguments[1:])
        args = build_parser(arguments).parse_args(arguments)
        return args.run(args)
    except UsageError as error:
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


if __name__ == "__main__":
    sys.exit(main())
