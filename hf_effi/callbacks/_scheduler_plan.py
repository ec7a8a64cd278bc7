"""`scheduler_plan`: the LR that a torch scheduler will give after any number of updates, without touching it."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.optim.lr_scheduler import LambdaLR

#: Steps that a copy of a scheduler is taken; at some 10 microseconds each, 2 seconds.
MAX_STEPS = 200_000


class Plan(Protocol):
    """Finished updates to the share of the base LR."""

    #: the last step that can be asked for; `None` without such
    reach: int | None

    def __call__(self, step: int) -> float: ...


def scheduler_plan(scheduler: Any, done_steps: int = 0, max_steps: int = MAX_STEPS, group: int = 0) -> Plan | None:
    """
    Return a function from finished updates to the share of the base LR, for one parameter group.

    A `LambdaLR` (all schedulers of transformers, all schedules of this package) is asked. Of any other a copy, on an
    optimizer without weights, is stepped on from where the scheduler is: chained, sequential and own ones too. Before
    that step the plan says what holds there, and where a scheduler refuses to go on (`OneCycleLR`) its last LR holds.

    Args:
        scheduler: A torch scheduler.
        done_steps (`int`, *optional*, defaults to 0): Finished updates, where it stands now.
        max_steps (`int`, *optional*): Steps that a copy may be taken.
        group (`int`, *optional*, defaults to 0): The parameter group.

    Returns:
        `None` where the base LR is 0 or the scheduler has no optimizer.

    Example:
    ```python
    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    >>> plan = scheduler_plan(torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10, eta_min=0.05))
    >>> [round(plan(step), 6) for step in (0, 5, 10)]
    [1.0, 0.55, 0.1]
    ```
    """
    if isinstance(scheduler, LambdaLR):
        return _LambdaPlan(scheduler.lr_lambdas[group])
    return stepped_plan(scheduler, done_steps, max_steps, group)


def stepped_plan(scheduler: Any, done_steps: int = 0, max_steps: int = MAX_STEPS, group: int = 0) -> Plan | None:
    """Return the plan of [`scheduler_plan`] by the steps of a copy, whatever the scheduler is."""
    groups = getattr(getattr(scheduler, "optimizer", None), "param_groups", [{}])
    base = float(groups[min(group, len(groups) - 1)].get("initial_lr", 0.0))
    return _SteppedPlan(scheduler, base, done_steps, max_steps, group) if base else None


class _LambdaPlan:
    reach = None

    def __init__(self, multiplier: Callable[[int], float]) -> None:
        self._multiplier, self._last = multiplier, 0.0

    def __call__(self, step: int) -> float:
        with contextlib.suppress(ValueError, ZeroDivisionError):  # what a formula may raise beyond its end
            self._last = float(self._multiplier(step))
        return self._last


class _SteppedPlan:
    """LRs of a copy, stepped as far as somebody asked for."""

    def __init__(self, scheduler: Any, base: float, done_steps: int, max_steps: int, place: int) -> None:
        optimizer = scheduler.optimizer
        settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        empty = [{**copy.deepcopy(group), "params": [torch.zeros(())]} for group in settings]
        stand_in = torch.optim.SGD([{"params": group["params"]} for group in empty], lr=0.0)
        for own, group in zip(stand_in.param_groups, empty, strict=True):
            own.update(group)
        inner = getattr(optimizer, "optimizer", optimizer)
        self._copy = copy.deepcopy(scheduler, {id(optimizer): stand_in, id(inner): stand_in})
        self._group, self._base = stand_in.param_groups[place], base
        self._first, self._ended = done_steps, False
        self.reach: int | None = self._first + max_steps
        self._shares = [self._share()]

    def _share(self) -> float:
        return float(self._group["lr"]) / self._base

    def __call__(self, step: int) -> float:
        place = max(step - self._first, 0)
        while len(self._shares) <= place and not self._ended:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    self._copy.step()
            except ValueError:  # OneCycleLR beyond its total_steps
                self._ended = True
            else:
                self._shares.append(self._share())
        return self._shares[min(place, len(self._shares) - 1)]
