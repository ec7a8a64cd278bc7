"""Make a schedule longer than it was built for, without an accidental jump of the LR."""

from __future__ import annotations

from ..options import refuse_idle
from ._checks import check_choice, check_steps
from .base import Schedule
from .closed_forms import linear
from .compose import join, scale
from .planner_bound import plan_extension
from .stable_decay import wsd


def extend_to(
    schedule: Schedule, total_steps: int, *, at: int | None = None, method: str = "cooldown", transition_steps: int = 0
) -> Schedule:
    """
    Return the schedule that goes on to `total_steps` from update `at`.

    A [`wsd`] run that is still on its plateau gets a longer cooldown (`"cooldown"`) or a lower plateau (`"plateau"`)
    by [`plan_extension`]; the two differ from the old schedule only after `at`. Any other schedule, or a WSD that is
    already decaying, holds the LR it has and then falls linearly over the last fifth.
    Paper: Schaipp et al. (2501.18965): at 124M and 210M parameters the longer cooldown beat the lower plateau.

    Args:
        schedule (`Schedule`): The one the run was trained with, bound to its length.
        total_steps (`int`): New length, above the old one.
        at (`int`, *optional*): Finished updates of the checkpoint that goes on; the start of the old decay if `None`.
        method (`str`, *optional*, defaults to `"cooldown"`): `"cooldown"`, `"plateau"`, or `"naive"` (the old cooldown
            share).
        transition_steps (`int`, *optional*, defaults to 0): With `"plateau"`: updates over which it is lowered.

    Raises:
        ValueError: the run is not made longer, `at` is out of range, or the LR at `at` is 0.

    Example:
    ```python
    >>> old = wsd(1000, decay_fraction=0.2, shape="linear")
    >>> new = extend_to(old, 2000)
    >>> new.trace(800) == old.trace(800), new.decay_begin
    (True, 800)
    ```
    """
    if not isinstance(schedule, Schedule):
        raise ValueError(f"schedule={schedule!r} is not a Schedule. Pass the one of the run, e.g. wsd(1000).")
    old_total = schedule.last_step
    if old_total is None:
        raise ValueError(f"{type(schedule).__name__} has no end to extend: bind it to the new length instead.")
    check_choice("method", method, ("cooldown", "plateau", "naive"))
    check_steps("transition_steps", transition_steps)
    refuse_idle("transition_steps", transition_steps, 0, method == "plateau", "with method='plateau'")
    check_steps("total_steps", total_steps, old_total + 1, f"The schedule already has {old_total} updates.")
    begin = schedule.decay_begin if type(schedule) is wsd else None
    if at is None:
        at = old_total - 1 if begin is None else begin
    check_steps("at", at)
    if at >= old_total:
        raise ValueError(
            f"at={at} is the end of the old run, where the decay is over. Go on from a checkpoint before update "
            f"{old_total if begin is None else begin}."
        )
    if type(schedule) is wsd and begin is not None and at <= begin:
        return _extend_plateau(schedule, begin, total_steps, at=at, method=method, transition=transition_steps)
    refuse_idle("method", method, "cooldown", False, "for a wsd that is still on its plateau")
    return _hold_then_fall(schedule, total_steps, at)


def _extend_plateau(schedule: wsd, begin: int, total: int, *, at: int, method: str, transition: int) -> Schedule:
    old_total = begin + schedule.decay_length
    share = schedule.decay_length / old_total
    open_end = schedule.replace(total_steps=total, decay_start=None, decay_steps=None, decay_fraction=None)
    # The warm-up keeps its length in updates, whatever share of the old run it was.
    open_end = open_end.replace(warmup_steps=schedule.warmup, warmup_fraction=None)
    if share == 0:
        return open_end.replace(decay_steps=0)
    plan = plan_extension(old_total, total, share)
    if method != "plateau":
        fraction = plan.cooldown_fraction if method == "cooldown" else share
        # The decay cannot begin before the checkpoint, nor inside the warm-up.
        length = min(round(fraction * total), total - max(at, schedule.warmup))
        return open_end.replace(decay_steps=length)
    length = round(share * total)
    lowered = scale(
        schedule=wsd(
            total - begin - transition,
            decay_steps=length,
            shape=schedule.shape,
            power=schedule.power,
            floor=schedule.floor,
            half_life_steps=schedule.half_life_steps,
            decay_offset=schedule.decay_offset,
        ),
        factor=plan.plateau_factor,
    )
    before = open_end.replace(total_steps=begin, open_ended=True)
    if transition == 0:
        return join(total, schedules=(before, lowered), boundaries=(begin,))
    slope = linear(transition, floor=plan.plateau_factor)
    return join(total, schedules=(before, slope, lowered), boundaries=(begin, begin + transition))


def _hold_then_fall(schedule: Schedule, total: int, at: int) -> Schedule:
    level = schedule(at)
    if level <= 0:
        raise ValueError(
            f"The LR at update {at} is 0, so there is nothing to hold. Go on from an earlier checkpoint, or re-warm "
            "with rewarm_redecay."
        )
    rest = total - at
    tail = scale(schedule=wsd(rest, decay_steps=max(1, rest // 5), shape="linear"), factor=level)
    return tail if at == 0 else join(total, schedules=(schedule, tail), boundaries=(at,))
