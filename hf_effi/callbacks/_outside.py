"""Seconds that callbacks of this package spend between two updates: no batch is waited for in them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from ..functional.doctor_loader import LoaderClock

_ATTRIBUTE = "_hf_effi_seconds_outside"


def seconds_outside(state: TrainerState) -> float:
    """Return the seconds of this `train()` so far."""
    return getattr(state, _ATTRIBUTE, 0.0)


@contextmanager
def outside(state: TrainerState) -> Iterator[None]:
    """Count what runs inside: a measurement before or after an update that takes as long as an update."""
    begun = time.perf_counter()
    try:
        yield
    finally:
        # An attribute of the state of one `train()`: it is saved by fields, which leaves this out.
        setattr(state, _ATTRIBUTE, seconds_outside(state) + time.perf_counter() - begun)


class TimesTheLoader:
    """What lies between two updates and is no waiting for data, for callbacks with a [`LoaderClock`]."""

    _clock: LoaderClock

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._clock.mark(seconds_outside(state))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._clock.mark(seconds_outside(state))

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._clock.leave_out()  # a pass begins with starting the workers
