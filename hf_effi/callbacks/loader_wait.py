"""`LoaderWaitCallback`: logs how long updates wait for their batches."""

from __future__ import annotations

import logging
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from ..functional import metrics
from ..functional.doctor_loader import LoaderClock
from ._outside import TimesTheLoader, seconds_outside
from ._turns import WRITE, TurnCallback, in_turn
from .observer import describe, only_observes
from .owners import Role

logger = logging.getLogger(__name__)


class LoaderWaitCallback(TimesTheLoader, TurnCallback):
    """
    Adds to each log entry how long the updates since the last one have waited for their batches.

    `effi/data_wait/fraction` is the share of the time that passes between the end of an update and the begin of the
    next, and `effi/data_wait/seconds` how long that is for each update. Logging, evaluating and saving are left out,
    and so is the first update of each pass, which starts the workers. Trackers and the run record have both. Where the
    share is large, [`TrainDoctor`] says so and what to do; it measures by itself and does not need this callback.

    It is the time of the first process, on the host: where `logging_nan_inf_filter` is off, a GPU may still work on
    the update before. What callbacks behind this one in the list do after an update counts as waiting.

    It only observes, and costs two readings of a clock for each update.

    Example:
    ```python
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[LoaderWaitCallback()])
    trainer.train()
    print(trainer.state.log_history[0]["effi/data_wait/fraction"])
    ```
    """

    role = Role("waiting for data", "Two callbacks log how long updates wait for data", "Keep one.")
    in_recipe = False

    def __init__(self) -> None:
        self._clock = LoaderClock()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self._clock = LoaderClock()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_step_begin(args, state, control, **kwargs)
        self._clock.begin_step(seconds_outside(state))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._clock.end_step(seconds_outside(state))

    @in_turn(WRITE)
    @only_observes
    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        waited = self._clock.take() if "loss" in logs else None
        if waited is not None:
            found = {metrics.DATA_WAIT_FRACTION: waited.fraction, metrics.DATA_WAIT_SECONDS: waited.seconds}
            logs.update(found)
            state.log_history[-1].update(found)
        self._clock.mark(seconds_outside(state))

    def stop_observing(self, error: Exception) -> None:
        """Say that an entry has no waiting time; the run goes on."""
        logger.warning("LoaderWaitCallback adds nothing to this log entry, and the run goes on: %s", describe(error))
