"""`LRScheduleCallback`: any schedule of this package on a stock `transformers.Trainer`."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..functional.options import refuse_idle
from ..functional.schedules import (
    Schedule,
    ScheduleError,
    ScheduleLR,
    ScheduleMismatchError,
    apply_momentum,
    apply_multiplier,
    reconcile,
    same_schedule,
)
from ..functional.schedules.adaptive import check_schedule_free
from ..functional.schedules.base import OnMismatch, check_choice

#: key of our entry in `TrainerState.stateful_callbacks`, which every checkpoint stores as JSON
STATE_KEY = "hf_effi.lr_schedule"
#: schedulers that something else owns, by class name: the classes live in optional packages
_DEEPSPEED = ("DeepSpeedSchedulerWrapper", "DummyScheduler")
_METRIC_DRIVEN = ("ReduceLROnPlateau", "GreedyLR")
#: which callback has taken over which scheduler; not an attribute, which LambdaLR would save with its state
_OWNERS: weakref.WeakKeyDictionary[LambdaLR, LRScheduleCallback] = weakref.WeakKeyDictionary()


class LRScheduleCallback(TrainerCallback):
    """
    Make a stock Trainer follow a schedule.

    The LR of every update is `base_lr * schedule(finished updates)` for each parameter group, from the first update
    on, also right after a resume, and the logged `learning_rate` is the LR that was applied. Steps are optimizer
    updates: world size and gradient accumulation do not enter. The schedule is stored in each checkpoint, so a resumed
    run needs no flag.

    Args:
        schedule (`Schedule`): For example `wsd(warmup_steps=100)`. Without `total_steps` the length of the run is read
            from the Trainer.
        on_mismatch (`str`, *optional*, defaults to `"error"`): What to do when a checkpoint was trained with another
            schedule, length or learning rate: `"error"`, `"stored"` or `"new"`.
        allow_lr_jump (`bool`, *optional*, defaults to `False`): Whether `on_mismatch="new"` may lift the LR of a run
            that is already decaying.
        stop_when_decayed (`bool`, *optional*, defaults to `True`): End training when a decay that was started with
            [`~LRScheduleCallback.start_decay`] is finished, instead of going on at the lowest LR.
        counter (`Callable[[], float]`, *optional*): Progress in equivalent steps, for a [`token_indexed`] schedule.

    Raises:
        ScheduleError: DeepSpeed owns the scheduler, the scheduler is driven by a metric or by layer, the run has
            another length than the schedule, or the arguments ask for a second schedule.
        ScheduleMismatchError: see `on_mismatch`.

    Example:
    ```python
    from transformers import Trainer
    from hf_effi import LRScheduleCallback, wsd

    trainer = Trainer(..., callbacks=[LRScheduleCallback(wsd(warmup_fraction=0.02, decay_fraction=0.2))])
    trainer.train()
    ```
    """

    def __init__(
        self,
        schedule: Schedule,
        on_mismatch: OnMismatch = "error",
        *,
        allow_lr_jump: bool = False,
        stop_when_decayed: bool = True,
        counter: Callable[[], float] | None = None,
    ) -> None:
        if not isinstance(schedule, Schedule):
            raise ScheduleError(
                f"schedule={schedule!r} is not a Schedule. Pass one of hf_effi.functional.schedules, e.g. wsd()."
            )
        check_choice("on_mismatch", on_mismatch, ("error", "stored", "new"))
        needs = "with on_mismatch='new'"
        refuse_idle("allow_lr_jump", allow_lr_jump, False, on_mismatch == "new", needs, ScheduleError)
        needs = "with a schedule whose decay can be started, such as wsd or infinite"
        can_start = hasattr(schedule, "start_decay")
        refuse_idle("stop_when_decayed", stop_when_decayed, True, can_start, needs, ScheduleError)
        if schedule.needs_counter and counter is None:
            raise ScheduleError(
                f"{type(schedule).__name__} is indexed by tokens and needs counter=..., a function that returns the "
                "progress in equivalent steps. Without dropped tokens use the plain schedule."
            )
        if counter is not None and not schedule.needs_counter:
            raise ScheduleError(
                f"counter= only acts with a token_indexed schedule, not with {type(schedule).__name__}."
            )
        if counter is not None and not callable(counter):
            raise ScheduleError(
                f"counter={counter!r} is not a function. Pass one that returns the progress in equivalent steps, e.g. a "
                "TokenCounter."
            )
        self.built = schedule
        self.current: Schedule | None = None
        self.on_mismatch = on_mismatch
        self.allow_lr_jump = allow_lr_jump
        self.stop_when_decayed = stop_when_decayed
        self.counter = counter
        self._scheduler: LambdaLR | None = None
        self._state: TrainerState | None = None
        self._decay_asked_at: int | None = None
        self._built_now = schedule
        self._learning_rate = 0.0
        self._tracks_state = False

    def multiplier(self, step: int) -> float:
        """Return the multiplier of the update that follows `step` finished ones."""
        schedule = self.built if self.current is None else self.current
        return schedule(step if self.counter is None else self.counter())

    def start_decay(self, decay_steps: int | None = None, **kwargs: Any) -> None:
        """
        Start the decay of a WSD-like schedule with the next update. Call it on every process.

        Args:
            decay_steps (`int`, *optional*): Its length; the planned one if `None`.
            kwargs: `shape` and `power`, see `wsd.start_decay`.

        Raises:
            ScheduleError: training is not running, the schedule has no decay to start, or the decay has begun.
        """
        if self._scheduler is None or self.current is None:
            raise ScheduleError(
                "start_decay was called while no training runs. Call it from a callback, or use wsd's."
            )
        if not hasattr(self.current, "start_decay"):
            raise ScheduleError(f"{type(self.current).__name__} has no decay to start. Use wsd, wsdc or infinite.")
        at = self._scheduler.last_epoch
        self.current = self.current.start_decay(at, decay_steps, **kwargs)
        self._decay_asked_at = at
        self._apply()

    # ---- events ----

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        scheduler = kwargs.get("lr_scheduler")
        check_scheduler(scheduler)
        check_arguments(args)
        if isinstance(scheduler, ScheduleLR) or _OWNERS.get(scheduler, self) is not self:
            raise ScheduleError(
                "Two schedules want to set the LR: this LRScheduleCallback and another one or lr_schedule in the config. "
                "Keep one; join() and scale() make one schedule of several."
            )
        _OWNERS[scheduler] = self
        inner = getattr(scheduler.optimizer, "optimizer", scheduler.optimizer)
        check_schedule_free(type(inner).__name__, type(self.built).__name__, "constant")
        bound = self.built.bind(state.max_steps)
        stored = state.stateful_callbacks.get(STATE_KEY) if state.global_step > 0 else None
        self._decay_asked_at = None
        self.current = bound
        if stored is not None:
            self._restore(stored, bound, state, args, scheduler)
        elif state.global_step > 0 and self.on_mismatch != "new":
            raise ScheduleMismatchError(
                f"The checkpoint at step {state.global_step} was trained without LRScheduleCallback, so its LR "
                "followed another schedule. Pass on_mismatch='new' to switch to this one from here on."
            )
        self._built_now = bound
        self._learning_rate = args.learning_rate
        self._scheduler, self._state = scheduler, state
        check_reference(self.current, scheduler)
        # Momentum and token counters move with every update; an LR alone is kept by the scheduler.
        self._tracks_state = self.counter is not None or hasattr(self.current, "momentum")
        # Plain closures: LambdaLR pickles the attributes of callable objects and would overwrite ours on load.
        scheduler.lr_lambdas = [lambda step: self.multiplier(step)] * len(scheduler.base_lrs)
        self._apply()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self._tracks_state:
            self._apply()
        if self._decay_asked_at is not None and self.stop_when_decayed:
            end = self.current.last_step
            if end is not None and self._scheduler.last_epoch >= end:
                control.should_training_stop = True
                control.should_save = control.should_save or args.save_strategy != "no"
        return control

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # The references belong to one train() call; `current` stays readable.
        _OWNERS.pop(self._scheduler, None)
        self._scheduler = self._state = None

    # ---- helpers ----

    def _restore(
        self,
        stored: dict[str, Any],
        bound: Schedule,
        state: TrainerState,
        args: TrainingArguments,
        scheduler: LambdaLR,
    ) -> None:
        built, current = Schedule.from_spec(stored["built"]), Schedule.from_spec(stored["current"])
        self._decay_asked_at = stored["decay_asked_at"]
        if same_schedule(built, bound):
            self.current = current
        else:
            step = scheduler.last_epoch
            self.current = reconcile(current, bound, self.on_mismatch, step=step, allow_lr_jump=self.allow_lr_jump)
            if self.on_mismatch == "new":
                self._decay_asked_at = None
        if stored.get("counter") is not None and hasattr(self.counter, "load_state_dict"):
            self.counter.load_state_dict(stored["counter"])
        old = stored["learning_rate"]
        if args.learning_rate != old:
            if self.on_mismatch == "error":
                raise ScheduleMismatchError(
                    f"The checkpoint was trained with learning_rate={old}, this run has {args.learning_rate}, which "
                    "the Trainer alone would ignore. Pass on_mismatch='stored' or on_mismatch='new'."
                )
            if self.on_mismatch == "new":
                scheduler.base_lrs = [lr * args.learning_rate / old for lr in scheduler.base_lrs]

    def _apply(self) -> None:
        """Write the LR of the next update into the optimizer, and the schedule into the state that gets saved."""
        step = self._scheduler.last_epoch
        apply_multiplier(self._scheduler, self.multiplier(step))
        apply_momentum(self._scheduler.optimizer, self.current, step)
        self._state.stateful_callbacks[STATE_KEY] = {
            "built": self._built_now.spec(),
            "current": self.current.spec(),
            "decay_asked_at": self._decay_asked_at,
            "learning_rate": self._learning_rate,
            "counter": self.counter.state_dict() if hasattr(self.counter, "state_dict") else None,
        }


def check_scheduler(scheduler: Any) -> None:
    """
    Refuse a scheduler that cannot be taken over.

    Raises:
        ScheduleError: DeepSpeed owns it, a metric drives it, each layer has its own, or it is not a `LambdaLR`.
    """
    names = [cls.__name__ for cls in type(scheduler).__mro__]
    name = names[0]
    owned = any(known in names for known in _DEEPSPEED) or type(scheduler).__module__.startswith("deepspeed")
    if owned:
        raise ScheduleError(
            f"DeepSpeed owns the LR scheduler ({name}), so a callback cannot set the LR. Use EffiTrainer with "
            "lr_schedule=..., and remove the 'scheduler' section from the DeepSpeed config."
        )
    if any(known in names for known in _METRIC_DRIVEN):
        raise ScheduleError(
            f"The Trainer's scheduler {name} is driven by an evaluation metric and would overwrite the schedule. "
            "Leave lr_scheduler_type at its default."
        )
    if name == "LayerWiseDummyScheduler":
        raise ScheduleError(
            f"{name} only reports an LR: a layer-wise optimizer steps its own schedulers. Use an optimizer that is "
            "not layer-wise."
        )
    if not isinstance(scheduler, LambdaLR):
        raise ScheduleError(
            f"The Trainer's scheduler is {name}, which computes its own LRs. Leave lr_scheduler_type at its default "
            "and do not pass a scheduler in `optimizers`, or drop LRScheduleCallback."
        )


def check_arguments(args: TrainingArguments) -> None:
    """
    Refuse training arguments that ask for a second schedule, which would be ignored in silence.

    Raises:
        ScheduleError: `lr_scheduler_type`, `lr_scheduler_kwargs` or `warmup_steps` is set.
    """
    kind = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    if kind not in ("linear", "constant"):
        raise ScheduleError(
            f"lr_scheduler_type={kind!r} and LRScheduleCallback both set the LR. Leave lr_scheduler_type at its "
            "default ('linear') or say 'constant'."
        )
    if args.warmup_steps:
        raise ScheduleError(
            f"warmup_steps={args.warmup_steps!r} in the training arguments would be ignored. Give the warm-up to the "
            "schedule: wsd(warmup_steps=...) or warmup_fraction=...."
        )
    if args.lr_scheduler_kwargs:
        raise ScheduleError(
            f"lr_scheduler_kwargs={args.lr_scheduler_kwargs!r} would be ignored. Give them to the schedule."
        )


def check_reference(schedule: Schedule, scheduler: LambdaLR) -> None:
    """
    Check that the optimizer's LR is the one an absolute schedule was written for.

    Raises:
        ScheduleError: `learning_rate` differs from the schedule's `reference_lr`.
    """
    if schedule.absolute and abs(scheduler.base_lrs[0] / schedule.reference_lr - 1) > 1e-6:
        raise ScheduleError(
            f"{type(schedule).__name__} states absolute learning rates for an optimizer LR of "
            f"{schedule.reference_lr}, but the optimizer has {scheduler.base_lrs[0]}. Set learning_rate="
            f"{schedule.reference_lr}, or pass reference_lr={scheduler.base_lrs[0]} to the schedule."
        )
