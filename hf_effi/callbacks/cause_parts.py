"""What can be plugged into [`CausesCallback`]: a part says when it is due, and measures at the begin of an update."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from transformers import TrainerState, TrainingArguments

from ..checkpoint.snapshot import restore_rng, take_rng
from ..functional import metrics
from ..functional.probes import probing_model


@dataclass(frozen=True)
class CauseMoment:
    """
    What a part is given: the run at the begin of an update, with the weights that the update starts from.

    Args:
        step (`int`): Finished updates of training, without those that a search tried and undid.
        args (`TrainingArguments`): Of the run.
        state (`TrainerState`): Of the run.
        model (`torch.nn.Module`): The Trainer's own, not wrapped by DDP; sharded under FSDP2. There are no gradients.
        optimizer, lr_scheduler (`Any`): As the Trainer hands them over: perhaps wrapped by accelerate.
        trainer (`Any`): The Trainer, for its loss, collator and data sets; `None` where it did not call.
    """

    step: int
    args: TrainingArguments
    state: TrainerState
    model: torch.nn.Module
    optimizer: Any
    lr_scheduler: Any
    trainer: Any


@runtime_checkable
class CausePart(Protocol):
    """
    One more thing that [`CausesCallback`] measures, in its `parts=`.

    All ranks call it in the same updates, and it may communicate. Random numbers, gradients and the mode of each
    module are put back after it; weights, buffers and optimizer must be as before when it returns. An exception ends
    the observation with a warning, and the run goes on. A part that cannot work in every run may have a
    `check(args, model)` too, which is called when training begins and raises.

    Example:
    ```python
    class LargestWeight:
        def due(self, step: int) -> bool:
            return step % 100 == 0

        def measure(self, moment: CauseMoment) -> dict[str, float]:
            return {"effi/causes/largest_weight": max(float(p.abs().max()) for p in moment.model.parameters())}
    ```
    """

    def due(self, step: int) -> bool:
        """Return whether to measure after `step` finished updates: 0 is before the first one. Equal on all ranks."""

    def measure(self, moment: CauseMoment) -> dict[str, float]:
        """Return name -> number for the log; names begin with `effi/`. What is not finite is left out of it."""


def measure_part(part: CausePart, moment: CauseMoment) -> dict[str, float]:
    """
    Call a part, put back what it may have changed, and return what can be logged.

    Raises:
        ValueError: it returns something else than names that begin with `effi/` and numbers.
    """
    with _left_as_it_was(moment.model):
        found = part.measure(moment)
    name = type(part).__name__
    if not isinstance(found, Mapping):
        raise ValueError(f"{name}.measure returned {type(found).__name__}. Return a dict from names to numbers.")
    for key, value in found.items():
        if not isinstance(key, str) or not key.startswith(metrics.PREFIX):
            raise ValueError(f"{name}.measure returned the name {key!r}. Begin it with {metrics.PREFIX!r}.")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{name}.measure returned {key}={value!r}. Return a number, such as tensor.item().")
    return {key: float(value) for key, value in found.items() if math.isfinite(value)}


@contextlib.contextmanager
def _left_as_it_was(model: torch.nn.Module) -> Iterator[None]:
    rng, modes = take_rng(), {module: module.training for module in model.modules()}
    gradients = [(p, p.grad) for p in model.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None  # what is accumulated must not go into the gradient of the update
    try:
        with probing_model(model):
            yield
    finally:
        restore_rng(rng)
        for module, training in modes.items():
            module.training = training
        for parameter, gradient in gradients:
            parameter.grad = gradient
