"""Whether the learning rate still moves in a run: measured up to now, and asked of the scheduler for what is left."""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerState

from ..functional.schedules import ScheduleLR
from ..optim.report import innermost
from ._lr_factors import LRFactors
from ._scheduler_plan import MAX_STEPS, scheduler_plan, stepped_plan
from .lr_schedule import LEARNING_RATE, LRScheduleCallback
from .owners import owner_of
from .probing import plan_of

#: what an optimizer applies: its LR, what a schedule-free one makes of it, and the estimate of Prodigy
_RATES = ("lr", "scheduled_lr", "d")
#: relative moves up to this one are rounding
_ROUNDING = 1e-6
#: updates that are all looked at, and how many of the later ones
_NEAR, _FAR = 20_000, 2_000
_OF_LAMBDAS = (LambdaLR.get_lr, LambdaLR.step)
#: the advice that goes with a rate that is going to fall
DECAYING = "schedule still decaying: use `hf-effi plan lr predict`"


def applied_rates(optimizer: Any) -> list[float | None]:
    """Return what every parameter group applies now; `None` where an optimizer chooses its rate by itself."""
    return [
        None if group[name] is None else float(group[name])
        for group in optimizer.param_groups
        for name in _RATES
        if name in group
    ]


def same_rates(one: list[float | None], other: list[float | None]) -> bool:
    """Return whether two readings are equal up to rounding."""
    if len(one) != len(other):
        return False
    return all(_same(left, right) for left, right in zip(one, other, strict=True))


def _same(left: float | None, right: float | None) -> bool:
    if left is None or right is None:
        return left is right
    return math.isclose(left, right, rel_tol=_ROUNDING)


def why_rate_moves(state: TrainerState, scheduler: Any, optimizer: Any, applied: list[float | None]) -> str | None:
    """
    Return why the learning rate is not what it was until the end of the run, or `None` where it stays.

    Args:
        state (`TrainerState`): The run's, between two updates.
        scheduler, optimizer: The run's.
        applied (`list[float | None]`): What the last update applied, from [`applied_rates`].
    """
    if not applied or None in applied:
        return "the optimizer chooses its learning rate by itself, so that nobody knows the coming ones"
    if not any(applied):
        return "the learning rate is 0"
    if names := LRFactors.known(state):
        return f"{', '.join(names)} moves the learning rate by what the run says, so that nobody knows the coming ones"
    probes = plan_of(state)
    if probes.probes(state.max_steps) > probes.probes(state.global_step):
        return "a search is going to try other learning rates"
    now = applied_rates(optimizer)
    if not same_rates(now, applied):
        return _moves(state.global_step + 1, _first_ratio(applied, now))
    inner = getattr(scheduler, "scheduler", scheduler)  # inside the wrappers of accelerate and DeepSpeed
    if needs := _metric_of(inner):
        return f"the scheduler waits for {needs}, so that nobody knows the coming learning rates"
    if innermost(getattr(inner, "optimizer", None)) is not innermost(optimizer):  # layer-wise optimizers have many
        return f"the scheduler {type(inner).__name__} does not move the optimizer of the Trainer"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a schedule that is asked beyond its end says so
        return _why_plan_moves(state, inner)


def _why_plan_moves(state: TrainerState, scheduler: Any) -> str | None:
    for shares, place, reach in _plans(state, scheduler, state.max_steps - state.global_step):
        if shares is None:
            return f"the scheduler {type(scheduler).__name__} does not say which learning rates are coming"
        start = shares(0)
        for ahead in _ahead(reach):
            if not math.isclose(shares(ahead), start, rel_tol=_ROUNDING):
                return _moves(state.global_step + 1 + ahead, shares(ahead) / start if start else math.inf, place)
    return None


def _first_ratio(before: list[float | None], after: list[float | None]) -> float:
    pairs = [(a, b) for a, b in zip(before, after, strict=False) if a is not None and b is not None and a != b]
    return pairs[0][1] / pairs[0][0] if pairs and pairs[0][0] else math.inf


def _moves(update: int, ratio: float, group: int = 0) -> str:
    whose = f" of parameter group {group}" if group else ""
    if ratio < 1:
        return f"{DECAYING} (the learning rate{whose} falls at update {update}, to {ratio:.6g} of today's)"
    return f"the learning rate{whose} still rises (update {update})"


def _metric_of(scheduler: Any) -> str | None:
    """Return the name of what a scheduler's step must be given, if anything."""
    step = getattr(scheduler, "step", None)
    if step is None:
        return None
    needed = [
        one.name
        for one in inspect.signature(step).parameters.values()
        if one.default is one.empty and one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)
    ]
    return needed[0] if needed else None


def _plans(state: TrainerState, scheduler: Any, left: int) -> Iterator[tuple[Callable[[int], float] | None, int, int]]:
    """
    Yield, for each parameter group, a function from updates ahead to a share of the LR, its number, and how many
    updates ahead count.
    """
    owner = owner_of(state, LEARNING_RATE)
    if isinstance(owner, LRScheduleCallback) and owner.current is not None:
        schedule = copy.copy(owner.current)  # a schedule warns once where it is asked beyond its end: not of this
        if owner.counter is None:
            yield _from(schedule, scheduler.last_epoch), 0, left
            return
        # The counter, and not the step, moves along the schedule, as far as its end and as fast as nobody knows.
        progress = owner.counter()
        yield _from(schedule, progress), 0, max(left, math.ceil((schedule.total_steps or 0) - progress))
    elif _only_asks(scheduler):
        for place in range(len(scheduler.lr_lambdas)):
            plan = scheduler_plan(scheduler, group=place)
            yield (None if plan is None else _from(plan, scheduler.last_epoch)), place, left
    else:
        groups = getattr(getattr(scheduler, "optimizer", None), "param_groups", ())
        if not groups or left > MAX_STEPS or not hasattr(scheduler, "step"):
            yield None, 0, left
            return
        for place in range(len(groups)):
            plan = stepped_plan(scheduler, group=place)
            yield (None if plan is None else _from(plan, 0)), place, left


def _only_asks(scheduler: Any) -> bool:
    """Whether the LRs of a scheduler are what its functions say of a step: a `LambdaLR` that nobody has changed."""
    return isinstance(scheduler, LambdaLR) and (
        isinstance(scheduler, ScheduleLR) or (type(scheduler).get_lr, type(scheduler).step) == _OF_LAMBDAS
    )


def _from(plan: Callable[[Any], float], first: float) -> Callable[[int], float]:
    return lambda ahead: plan(first + ahead)


def _ahead(left: int) -> Iterator[int]:
    """Yield the updates ahead to look at: the last first, then all near ones, then a sample of the far ones."""
    if left <= 0:
        return
    yield left - 1
    yield from range(min(left, _NEAR))
    yield from range(_NEAR, left, max(1, (left - _NEAR) // _FAR))
