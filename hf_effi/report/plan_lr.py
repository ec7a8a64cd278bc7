"""`hf-effi plan lr`: choose, transfer, extend or predict a schedule without training."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .._plots import as_label
from .._record_check import check_history
from .._untrusted import load_json, one_line
from ..errors import BrokenFileError
from ..functional.schedules import Schedule, make_schedule
from ..functional.schedules.planner_bound import best_cooldown_fraction, omega, plan_extension
from ..functional.schedules.planner_loss import LossCurve, curve_from_trainer_state, fit_annealing_law
from .schedule_plot import plot_schedules, text_curve

#: What a sub-command found: for JSON, and as lines of text.
Result = tuple[dict[str, Any], list[str]]
#: a curve has a value for each update
_LONGEST_RUN = 10_000_000


_EXIT_CODES = "exit codes: 0 done, 1 a file cannot be read or written, 2 it was called wrongly"
#: sub-command -> what it does, arguments of an example
_HELP = {
    "show": (
        "draw schedules in the terminal, or as a picture",
        "--steps 1000 --schedule wsd --schedule 'cosine {\"warmup_steps\": 50}'",
    ),
    "transfer": (
        "carry a tuned peak LR from one schedule to another",
        "--steps 1000 --from cosine --to wsd --lr 3e-4",
    ),
    "cooldown": ("what each cooldown length of WSD is worth by the bound", "--steps 1000"),
    "extend": ("go on with a WSD run that was planned shorter", "--old-steps 1000 --new-steps 2000"),
    "predict": (
        "predict the loss of schedules from finished runs",
        "--run out/checkpoint-1000/trainer_state.json --steps 2000 --lr 3e-4 --schedule wsd",
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sub-commands of `hf-effi plan lr` to `parser`; the one chosen lands in `args.plan_lr`."""
    commands = parser.add_subparsers(dest="plan_lr", required=True, metavar="|".join(_HELP))
    show, transfer, cooldown, extend, predict = (
        commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=f"example:\n  hf-effi plan lr {name} {example}\n\n{_EXIT_CODES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for name, (text, example) in _HELP.items()
    )
    for command in (show, transfer, cooldown, extend, predict):
        command.add_argument("--json", action="store_true", help="print JSON, and nothing else, on stdout")
    for command in (show, transfer, cooldown, predict):
        command.add_argument("--steps", type=_count, required=True, help="updates of the run")
    for command in (show, predict):
        command.add_argument("--schedule", action="append", required=True, help="e.g. 'wsd {\"decay_fraction\": 0.2}'")
        command.add_argument("--plot", type=_picture, help="picture to write: .png, .svg or .pdf")
    transfer.add_argument("--from", dest="source", required=True, help="schedule the peak LR was tuned for")
    transfer.add_argument("--to", dest="target", required=True, help="schedule it is wanted for")
    transfer.add_argument("--lr", type=_learning_rate, required=True, help="tuned peak LR")
    extend.add_argument("--old-steps", type=_count, required=True, help="updates the run was planned for")
    extend.add_argument("--new-steps", type=_count, required=True, help="updates wanted")
    extend.add_argument("--cooldown-fraction", type=float, default=0.2, help="cooldown of the old plan (default 0.2)")
    predict.add_argument(
        "--run", dest="runs", action="append", required=True, help="trainer_state.json of a finished run"
    )
    predict.add_argument("--lr", type=_learning_rate, required=True, help="peak LR of the predicted runs")
    predict.add_argument("--metric", choices=("loss", "eval_loss"), help="what to fit (default: eval_loss if logged)")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def _learning_rate(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} must be a number above 0")


def _picture(text: str) -> str:
    if Path(text).suffix not in (".png", ".svg", ".pdf"):
        raise argparse.ArgumentTypeError(f"{text} must end in .png, .svg or .pdf")
    return text


def parse_schedule(text: str, steps: int) -> Schedule:
    """
    Read `NAME` or `NAME {JSON}`.

    Raises:
        ValueError: the rest is not a JSON object.

    Example:
    ```python
    >>> parse_schedule('wsd {"decay_steps": 10}', 100).decay_begin
    90
    ```
    """
    name, _, rest = text.strip().partition(" ")
    try:
        kwargs = json.loads(rest) if rest.strip() else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{rest!r} is not JSON ({error}). Write e.g. 'wsd {{\"decay_steps\": 10}}'.") from error
    if not isinstance(kwargs, dict):
        raise ValueError(f"{rest!r} is not a JSON object. Write e.g. 'wsd {{\"decay_steps\": 10}}'.")
    return make_schedule(name, **kwargs).bind(steps)


def _show(args: argparse.Namespace) -> Result:
    schedules = {text: parse_schedule(text, args.steps) for text in args.schedule}
    lines = [f"{text}\n{text_curve(schedule, args.steps)}\n" for text, schedule in schedules.items()]
    if args.plot:
        plot_schedules(schedules, args.steps, args.plot)
        lines.append(f"wrote {args.plot}")
    rows = [
        {"schedule": text, **schedule.spec(), "multipliers": schedule.trace(args.steps)}
        for text, schedule in schedules.items()
    ]
    return {"steps": args.steps, "schedules": rows}, lines


def _transfer(args: argparse.Namespace) -> Result:
    source = omega(parse_schedule(args.source, args.steps).trace())
    target = omega(parse_schedule(args.target, args.steps).trace())
    factor, bound = target.best_lr / source.best_lr, target.best / source.best
    return {"lr": args.lr * factor, "factor": factor, "bound_ratio": bound}, [
        f"{args.source} at {args.lr:g}  ->  {args.target} at {args.lr * factor:.3g}  (factor {factor:.3f})",
        f"bound of the target relative to the source, each at its best LR: {bound:.3f}",
        "The bound is a convex model: a starting point for tuning, not a result.",
    ]


def _cooldown(args: argparse.Namespace) -> Result:
    bounds = {}
    for fraction in (0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0):
        schedule = make_schedule("wsd", decay_fraction=fraction, shape="linear").bind(args.steps)
        bounds[fraction] = omega(schedule.trace())
    reference = bounds[0.2]
    rows = [
        {"fraction": f, "lr_ratio": bound.best_lr / reference.best_lr, "bound_ratio": bound.best / reference.best}
        for f, bound in bounds.items()
    ]
    fixed = best_cooldown_fraction(args.steps, reference.best_lr)
    return {"rows": rows, "best_fraction_at_fixed_lr": fixed}, [
        "cooldown  peak LR / that of 20%  bound / that of 20%",
        *(f"{row['fraction']:8.0%}  {row['lr_ratio']:21.3f}  {row['bound_ratio']:19.3f}" for row in rows),
        f"With the peak LR kept at what is best for 20%: the best cooldown is {fixed:.0%} of the run.",
    ]


def _extend(args: argparse.Namespace) -> Result:
    plan = plan_extension(args.old_steps, args.new_steps, args.cooldown_fraction)
    return dataclasses.asdict(plan), [
        f"{plan.old_steps} -> {plan.new_steps} updates at the old peak LR, from a checkpoint before the old cooldown:",
        f"  longer cooldown: {plan.cooldown_fraction:.1%} of the new run (bound {plan.gain_cooldown:.3f} of naive)",
        f"  or lower plateau: factor {plan.plateau_factor:.3f} (bound {plan.gain_plateau:.3f} of naive)",
        f"In code: extend_to(schedule, {plan.new_steps}, at=<step of the checkpoint>, method='cooldown')",
    ]


def _predict(args: argparse.Namespace) -> Result:
    law = fit_annealing_law([_read_curve(path, args.metric) for path in args.runs])
    lines = [
        f"L = {law.floor:.4f} + {law.scale:.4g} S1^-{law.power:.3f} - {law.gain:.4g} S2, memory {law.memory:.4f}, "
        f"residual {law.residual:.4f}"
    ]
    rows, predictions = [], {}
    for text in args.schedule:
        etas = [args.lr * m for m in parse_schedule(text, args.steps).trace()]
        prediction = predictions[text] = law.predict(etas)
        final, low, high = prediction.losses[-1], prediction.low[-1], prediction.high[-1]
        rows.append({"schedule": text, "final_loss": final, "low": low, "high": high})
        lines.append(f"{text}: final loss {final:.4f}, 90% interval [{low:.4f}, {high:.4f}]")
    if args.plot:
        plot_predictions(predictions, args.plot)
        lines.append(f"wrote {args.plot}")
    return {"law": dataclasses.asdict(law), "predictions": rows}, lines


def _state_of(file: Path, path: str) -> Any:
    try:
        return check_history(load_json(file), file)
    except BrokenFileError as error:
        raise BrokenFileError(f"{path} is no trainer_state.json: {error}") from error


def _read_curve(path: str, metric: str | None) -> LossCurve:
    file = Path(path) / "trainer_state.json" if Path(path).is_dir() else Path(path)
    try:
        state = _state_of(file, path)
        steps = [entry.get("step", 0) for entry in state["log_history"]]
        if not all(isinstance(step, int) and 0 <= step <= _LONGEST_RUN for step in steps):
            raise BrokenFileError(f"{path} is damaged: a step in its log is no whole number up to {_LONGEST_RUN:,}.")
        return curve_from_trainer_state(path, metric)
    except OSError as error:
        raise BrokenFileError(f"cannot read {error.filename}: {error.strerror}.") from error
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise BrokenFileError(f"{path} is no trainer_state.json: {one_line(repr(error), 200)}.") from error


def plot_predictions(predictions: dict[str, Any], path: str) -> None:
    """Draw predicted loss curves with their intervals."""
    from .._compat import require

    require("matplotlib", "plot_predictions")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for i, (name, prediction) in enumerate(predictions.items()):
        axes.plot(prediction.steps, prediction.losses, color=f"C{i % 10}", label=as_label(name))
        axes.fill_between(prediction.steps, prediction.low, prediction.high, color=f"C{i % 10}", alpha=0.2)
    axes.set_xlabel("finished updates")
    axes.set_ylabel("predicted loss")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


_COMMANDS: dict[str, Callable[[argparse.Namespace], Result]] = {
    "show": _show,
    "transfer": _transfer,
    "cooldown": _cooldown,
    "extend": _extend,
    "predict": _predict,
}


def run(args: argparse.Namespace) -> int:
    """Run the sub-command; return the exit status: 1 for a file that cannot be read or written, 2 for a bad value."""
    try:
        data, lines = _COMMANDS[args.plan_lr](args)
    except BrokenFileError as error:
        print(f"hf-effi plan lr: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"hf-effi plan lr: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"hf-effi plan lr: cannot write {args.plot}: {error.strerror}.", file=sys.stderr)
        return 1
    print(json.dumps(data, indent=2) if args.json else "\n".join(lines))
    return 0
