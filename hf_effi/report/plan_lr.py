"""`hf-effi plan lr`: choose, transfer, extend or predict a schedule without training."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from ..functional.schedules import Schedule, ScheduleError, make_schedule
from ..functional.schedules.planner_bound import best_cooldown_fraction, omega, plan_extension
from ..functional.schedules.planner_loss import curve_from_trainer_state, fit_annealing_law
from .schedule_plot import plot_schedules, text_curve


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sub-commands of `hf-effi plan lr` to `parser`; the one chosen lands in `args.plan_lr`."""
    commands = parser.add_subparsers(dest="plan_lr", required=True)
    show = commands.add_parser("show", help="draw schedules")
    transfer = commands.add_parser("transfer", help="carry a tuned peak LR from one schedule to another")
    cooldown = commands.add_parser("cooldown", help="what each cooldown length of WSD is worth by the bound")
    extend = commands.add_parser("extend", help="go on with a WSD run that was planned shorter")
    predict = commands.add_parser("predict", help="predict the loss of schedules from finished runs")
    for command in (show, transfer, cooldown, predict):
        command.add_argument("--steps", type=int, required=True, help="updates of the run")
    for command in (show, predict):
        command.add_argument("--schedule", action="append", required=True, help="e.g. 'wsd {\"decay_fraction\": 0.2}'")
        command.add_argument("--plot", help="picture to write")
    transfer.add_argument("--from", dest="source", required=True, help="schedule the peak LR was tuned for")
    transfer.add_argument("--to", dest="target", required=True, help="schedule it is wanted for")
    transfer.add_argument("--lr", type=float, required=True, help="tuned peak LR")
    extend.add_argument("--old-steps", type=int, required=True, help="updates the run was planned for")
    extend.add_argument("--new-steps", type=int, required=True, help="updates wanted")
    extend.add_argument("--cooldown-fraction", type=float, default=0.2, help="cooldown of the old plan (default 0.2)")
    predict.add_argument("--run", action="append", required=True, help="trainer_state.json of a finished run")
    predict.add_argument("--lr", type=float, required=True, help="peak LR of the predicted runs")
    predict.add_argument("--metric", choices=("loss", "eval_loss"), help="what to fit (default: eval_loss if logged)")


def parse_schedule(text: str, steps: int) -> Schedule:
    """
    Read `NAME` or `NAME {JSON}`.

    Raises:
        ScheduleError: the rest is not a JSON object.

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
        raise ScheduleError(f"{rest!r} is not JSON ({error}). Write e.g. 'wsd {{\"decay_steps\": 10}}'.") from error
    if not isinstance(kwargs, dict):
        raise ScheduleError(f"{rest!r} is not a JSON object. Write e.g. 'wsd {{\"decay_steps\": 10}}'.")
    return make_schedule(name, **kwargs).bind(steps)


def _show(args: argparse.Namespace) -> None:
    schedules = {text: parse_schedule(text, args.steps) for text in args.schedule}
    for text, schedule in schedules.items():
        print(f"{text}\n{text_curve(schedule, args.steps)}\n")
    if args.plot:
        plot_schedules(schedules, args.steps, args.plot)
        print(f"wrote {args.plot}")


def _transfer(args: argparse.Namespace) -> None:
    source = omega(parse_schedule(args.source, args.steps).trace())
    target = omega(parse_schedule(args.target, args.steps).trace())
    factor = target.best_lr / source.best_lr
    print(f"{args.source} at {args.lr:g}  ->  {args.target} at {args.lr * factor:.3g}  (factor {factor:.3f})")
    print(f"bound of the target relative to the source, each at its best LR: {target.best / source.best:.3f}")
    print("The bound is a convex model: a starting point for tuning, not a result.")


def _cooldown(args: argparse.Namespace) -> None:
    rows = []
    for fraction in (0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0):
        schedule = make_schedule("wsd", decay_fraction=fraction, shape="linear").bind(args.steps)
        rows.append((fraction, omega(schedule.trace())))
    reference = rows[2][1]
    print("cooldown  peak LR / that of 20%  bound / that of 20%")
    for fraction, bound in rows:
        print(f"{fraction:8.0%}  {bound.best_lr / reference.best_lr:21.3f}  {bound.best / reference.best:19.3f}")
    fixed = best_cooldown_fraction(args.steps, reference.best_lr)
    print(f"With the peak LR kept at what is best for 20%: the best cooldown is {fixed:.0%} of the run.")


def _extend(args: argparse.Namespace) -> None:
    plan = plan_extension(args.old_steps, args.new_steps, args.cooldown_fraction)
    print(
        f"{plan.old_steps} -> {plan.new_steps} updates at the old peak LR, from a checkpoint before the old cooldown:"
    )
    print(f"  longer cooldown: {plan.cooldown_fraction:.1%} of the new run (bound {plan.gain_cooldown:.3f} of naive)")
    print(f"  or lower plateau: factor {plan.plateau_factor:.3f} (bound {plan.gain_plateau:.3f} of naive)")
    print(f"In code: extend_to(schedule, {plan.new_steps}, at=<step of the checkpoint>, method='cooldown')")


def _predict(args: argparse.Namespace) -> None:
    law = fit_annealing_law([curve_from_trainer_state(path, args.metric) for path in args.run])
    print(
        f"L = {law.floor:.4f} + {law.scale:.4g} S1^-{law.power:.3f} - {law.gain:.4g} S2, memory {law.memory:.4f}, "
        f"residual {law.residual:.4f}"
    )
    predictions: dict[str, Any] = {}
    for text in args.schedule:
        etas = [args.lr * m for m in parse_schedule(text, args.steps).trace()]
        prediction = predictions[text] = law.predict(etas)
        low, high = prediction.low[-1], prediction.high[-1]
        print(f"{text}: final loss {prediction.losses[-1]:.4f}, 90% interval [{low:.4f}, {high:.4f}]")
    if args.plot:
        plot_predictions(predictions, args.plot)
        print(f"wrote {args.plot}")


def plot_predictions(predictions: dict[str, Any], path: str) -> None:
    """Draw predicted loss curves with their intervals."""
    from .._compat import require

    require("matplotlib", "plot_predictions")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for i, (name, prediction) in enumerate(predictions.items()):
        axes.plot(prediction.steps, prediction.losses, color=f"C{i % 10}", label=name)
        axes.fill_between(prediction.steps, prediction.low, prediction.high, color=f"C{i % 10}", alpha=0.2)
    axes.set_xlabel("finished updates")
    axes.set_ylabel("predicted loss")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


_COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "show": _show,
    "transfer": _transfer,
    "cooldown": _cooldown,
    "extend": _extend,
    "predict": _predict,
}


def run(args: argparse.Namespace) -> int:
    """Run the sub-command; return the exit status (2 for a bad value, with the reason on the terminal)."""
    try:
        _COMMANDS[args.plan_lr](args)
    except (ScheduleError, FileNotFoundError) as error:
        print(f"error: {error}")
        return 2
    return 0
