"""`LRScheduleCallback`: any schedule of this package on a stock `transformers.Trainer`."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..errors import MismatchError, RefusedError
from ..functional.kept_arguments import keeps_arguments
from ..functional.options import refuse_idle
from ..functional.schedules import (
    Followed,
    Schedule,
    ScheduleLR,
    apply_momentum,
    apply_multiplier,
    check_storable,
    classes_in,
    power,
    settle,
)
from ..functional.schedules.adaptive import check_schedule_free
from ..functional.schedules.base import OnMismatch, check_choice
from ..optim.report import innermost
from ..optim.schedule_free import is_schedule_free
from .owners import OwningCallback, Role

#: key of our entry in `TrainerState.stateful_callbacks`, which every checkpoint stores as JSON
STATE_KEY = "hf_effi.lr_schedule"
#: who sets the LR of a run; multipliers of it are no owners
LEARNING_RATE = Role(
    "learning rate",
    "Two schedules want to set the LR",
    "Keep one; join() and scale() make one schedule of several.",
)
#: schedulers that something else owns, by class name: the classes live in optional packages
_DEEPSPEED = ("DeepSpeedSchedulerWrapper", "DummyScheduler")
_METRIC_DRIVEN = ("ReduceLROnPlateau", "GreedyLR")
#: LRs that an optimizer of the user brought, noted before a checkpoint is loaded into it
_BROUGHT: weakref.WeakKeyDictionary[Optimizer, tuple[float, ...]] = weakref.WeakKeyDictionary()
#: the `learning_rate` that the groups' `initial_lr` belong to, for a Trainer that trains again
_MADE_FOR: weakref.WeakKeyDictionary[Optimizer, float] = weakref.WeakKeyDictionary()


class LRScheduleCallback(OwningCallback):
    """
    Make a stock Trainer follow a schedule.

    The LR of every update is `base_lr * schedule(finished updates)` for each parameter group, from the first update
    on, also right after a resume, and the logged `learning_rate` is the LR that was applied. Steps are optimizer
    updates: world size and gradient accumulation do not enter. What was applied is stored in each checkpoint, so a
    resumed run needs no flag. `lr_schedule=` of an Effi trainer is this object too.

    The base LRs are `learning_rate`, or the LRs that an optimizer brings which you pass to the Trainer.

    Args:
        schedule (`Schedule`): For example `wsd(warmup_steps=100)`. Without `total_steps` the length of the run is read
            from the Trainer.
        on_mismatch (`str`, *optional*, defaults to `"error"`): What to do when a checkpoint was trained with another
            schedule, length or learning rate: `"error"` raises, `"stored"` goes on exactly as stored, `"new"` trains
            with what this run asks for from here on. See [`settle`].
        allow_lr_jump (`bool`, *optional*, defaults to `False`): Whether with `on_mismatch="new"` a new schedule may
            lift a run that is already decaying.
        stop_when_decayed (`bool`, *optional*, defaults to `True`): End training when a decay that was started with
            [`~LRScheduleCallback.start_decay`] is finished, instead of going on at the lowest LR.
        counter (`Callable[[], float]`, *optional*): Progress in equivalent steps, for a [`token_indexed`] schedule.

    Attributes:
        followed ([`Followed`]): What the last training followed; `None` before the first.

    Raises:
        RefusedError: the scheduler belongs to DeepSpeed, is driven by a metric or by layer, or the arguments or
            another callback ask for a second schedule.
        ValueError: the run has another length than the schedule, or a schedule of your own that a checkpoint cannot
            hold.
        MismatchError: see `on_mismatch`.

    Example:
    ```python
    from transformers import Trainer
    from hf_effi import LRScheduleCallback
    from hf_effi.schedules import wsd

    trainer = Trainer(..., callbacks=[LRScheduleCallback(wsd(warmup_fraction=0.02, decay_fraction=0.2))])
    trainer.train()
    ```
    """

    role = LEARNING_RATE

    #: what a message calls the argument `on_mismatch`
    option = "on_mismatch"

    @keeps_arguments
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
            raise ValueError(
                f"schedule={schedule!r} is not a Schedule. Pass one of hf_effi.functional.schedules, e.g. wsd()."
            )
        check_choice("on_mismatch", on_mismatch, ("error", "stored", "new"))
        needs = "with on_mismatch='new'"
        refuse_idle("allow_lr_jump", allow_lr_jump, False, on_mismatch == "new", needs)
        needs = "with a schedule whose decay can be started, such as wsd or infinite"
        can_start = hasattr(schedule, "start_decay")
        refuse_idle("stop_when_decayed", stop_when_decayed, True, can_start, needs)
        _check_counter(schedule, counter)
        self.built = schedule
        self.on_mismatch = on_mismatch
        self.allow_lr_jump = allow_lr_jump
        self.stop_when_decayed = stop_when_decayed
        self.counter = counter
        self.followed: Followed | None = None
        self._scheduler: LambdaLR | None = None
        self._state: TrainerState | None = None
        self._tracks_state = False

    @property
    def current(self) -> Schedule | None:
        """The schedule that is followed, with a decay that was started; `None` before training."""
        return None if self.followed is None else self.followed.current

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
            ValueError: training is not running, the schedule has no decay to start, or the decay has begun.
        """
        if self._scheduler is None or self.current is None:
            raise ValueError("start_decay was called while no training runs. Call it from a callback, or use wsd's.")
        if not hasattr(self.current, "start_decay"):
            raise ValueError(f"{type(self.current).__name__} has no decay to start. Use wsd, wsdc or infinite.")
        at = self._scheduler.last_epoch
        decaying = self.current.start_decay(at, decay_steps, **kwargs)
        self.followed = dataclasses.replace(self.followed, current=decaying, decay_asked_at=at)
        self._apply()

    def change_batch(self, tokens_per_step: int) -> None:
        """
        Let a [`~hf_effi.schedules.power`] schedule follow another batch size, from the next update on. Call it on
        every process, from the callback that changes the batch; a checkpoint keeps the change.

        Args:
            tokens_per_step (`int`): Tokens of one update over all processes, from now on.

        Raises:
            ValueError: training is not running, or the schedule does not depend on the batch size.
        """
        if self._scheduler is None or self.current is None:
            raise ValueError("change_batch was called while no training runs. Call it from a callback.")
        if not isinstance(self.current, power):
            raise ValueError(f"{type(self.current).__name__} does not depend on the batch size. Use power.")
        followed = self.current.with_batch(self._scheduler.last_epoch, tokens_per_step)
        self.followed = dataclasses.replace(self.followed, current=followed)
        self._apply()

    # ---- events ----

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_init_end(args, state, control, **kwargs)
        note_optimizer(kwargs.get("optimizer"))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        scheduler = taken_over(kwargs.get("lr_scheduler"), self.name or type(self).__name__)
        if isinstance(scheduler, ScheduleLR):
            raise RefusedError(f"{LEARNING_RATE.problem}: the Trainer's ScheduleLR and this one. {LEARNING_RATE.fix}")
        super().on_train_begin(args, state, control, **kwargs)
        check_arguments(args, self.name or type(self).__name__)
        optimizer = innermost(scheduler.optimizer)
        if is_schedule_free(optimizer):
            check_schedule_free(type(optimizer).__name__, self.built.spec()["kind"], "constant", keeps_average=True)
        bound = self.built.bind(state.max_steps)
        check_storable(bound)
        if state.global_step > 0 and scheduler.last_epoch == 0:
            scheduler.last_epoch = state.global_step  # a checkpoint of weights alone: no scheduler was loaded
        asked = _asked(bound, args, state, scheduler, optimizer)
        self.followed = asked
        if state.global_step > 0:
            self.followed = self._resumed(asked, args, state, scheduler, optimizer)
        if list(self.followed.base_lrs) != scheduler.base_lrs:
            scheduler.base_lrs = list(self.followed.base_lrs)
        _note_asked(asked, self.followed, scheduler.optimizer)
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
        state.stateful_callbacks[STATE_KEY]["step"] = state.global_step
        if self.followed.decay_asked_at is not None and self.stop_when_decayed:
            end = self.current.last_step
            if end is not None and self._scheduler.last_epoch >= end:
                control.should_training_stop = True
                control.should_save = control.should_save or args.save_strategy != "no"
        return control

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # The references belong to one train() call; `current` stays readable.
        self._scheduler = self._state = None

    # ---- helpers ----

    def _resumed(
        self,
        asked: Followed,
        args: TrainingArguments,
        state: TrainerState,
        scheduler: LambdaLR,
        optimizer: Optimizer,
    ) -> Followed:
        # The scheduler of an Effi trainer hands over what a checkpoint of an earlier version holds.
        entry = state.stateful_callbacks.get(STATE_KEY) or getattr(scheduler, "earlier", None)
        until = state.global_step if entry is None else entry.get("step", state.global_step)
        if entry is None or until != state.global_step:
            if self.on_mismatch != "new":
                since = "" if entry is None else f" since update {until}"
                raise MismatchError(
                    f"The checkpoint at step {state.global_step} was trained without LRScheduleCallback or lr_schedule"
                    f"{since}, so its LR followed another schedule. Pass {self.option}='new' to switch to this one "
                    "from here on."
                )
            return asked
        if entry.get("counter") is not None and hasattr(self.counter, "load_state_dict"):
            self.counter.load_state_dict(entry["counter"])
        # Earlier versions stored the learning rate that was asked for, which is not always the one that was applied.
        applied = {float(lr) for lr in scheduler.base_lrs}
        rate = applied.pop() if len(applied) == 1 and _made_from(args, optimizer) else entry.get("learning_rate")
        stored = Followed.from_state(
            entry, classes_in(asked.built), base_lrs=scheduler.base_lrs, learning_rate=rate, optimizer_lrs=None
        )
        return settle(stored, asked, self.on_mismatch, step=scheduler.last_epoch, allow_lr_jump=self.allow_lr_jump)

    def _apply(self) -> None:
        """Write the LR of the next update into the optimizer, and what is followed into the state that gets saved."""
        step = self._scheduler.last_epoch
        apply_multiplier(self._scheduler, self.multiplier(step))
        apply_momentum(self._scheduler.optimizer, self.current, step)
        self._state.stateful_callbacks[STATE_KEY] = {
            **self.followed.state_dict(),
            "counter": self.counter.state_dict() if hasattr(self.counter, "state_dict") else None,
            "step": self._state.global_step,
        }


def _check_counter(schedule: Schedule, counter: Any) -> None:
    name = type(schedule).__name__
    if schedule.needs_counter and counter is None:
        raise ValueError(
            f"{name} is indexed by tokens and needs counter=..., a function that returns the progress in equivalent "
            "steps. Without dropped tokens use the plain schedule."
        )
    if counter is not None and not schedule.needs_counter:
        raise ValueError(f"counter= only acts with a token_indexed schedule, not with {name}.")
    if counter is not None and not callable(counter):
        raise ValueError(
            f"counter={counter!r} is not a function. Pass one that returns the progress in equivalent steps, e.g. a "
            "TokenCounter."
        )


def note_optimizer(optimizer: Any) -> None:
    """Note the LRs of an optimizer that was passed to a Trainer, before a checkpoint is loaded into it."""
    inner = innermost(optimizer)
    if isinstance(inner, Optimizer) and inner not in _BROUGHT:
        groups = inner.param_groups
        if all("lr" in group for group in groups):
            _BROUGHT[inner] = tuple(float(group.get("initial_lr", group["lr"])) for group in groups)


def _made_from(args: TrainingArguments, optimizer: Optimizer) -> bool:
    """Whether the Trainer made the optimizer, from `learning_rate`."""
    return optimizer not in _BROUGHT and getattr(optimizer, "defaults", {}).get("lr") == args.learning_rate


def _asked(
    bound: Schedule, args: TrainingArguments, state: TrainerState, scheduler: LambdaLR, optimizer: Optimizer
) -> Followed:
    """Return what a fresh run with these arguments would follow."""
    brought, made_for = _BROUGHT.get(optimizer), _MADE_FOR.get(optimizer)
    lrs = tuple(float(lr) for lr in scheduler.base_lrs)
    if brought is not None:
        # A fresh run starts from what the optimizer has now, a resumed one has the checkpoint's in it.
        lrs = brought = lrs if state.global_step == 0 else brought
        _BROUGHT[optimizer] = brought
    elif state.global_step > 0 and _made_from(args, optimizer) and len(set(lrs)) == 1:
        lrs = (args.learning_rate,) * len(lrs)  # those of the scheduler are the checkpoint's
    elif state.global_step == 0 and made_for and made_for != args.learning_rate:
        lrs = tuple(lr * (args.learning_rate / made_for) for lr in lrs)  # changed between two calls of train()
    return Followed(
        bound,
        bound,
        base_lrs=lrs,
        learning_rate=float(args.learning_rate),
        optimizer_lrs=brought,
        run_steps=state.max_steps,
    )


def _note_asked(asked: Followed, followed: Followed, optimizer: Optimizer) -> None:
    """
    Let the groups' `initial_lr`, from which the next `train()` starts, be what is asked for and not a checkpoint's.
    """
    lrs = asked.base_lrs
    if asked.optimizer_lrs is None and followed.learning_rate:
        lrs = tuple(lr * (asked.learning_rate / followed.learning_rate) for lr in followed.base_lrs)
        _MADE_FOR[innermost(optimizer)] = asked.learning_rate
    for group, lr in zip(optimizer.param_groups, lrs, strict=True):
        if "initial_lr" not in group or float(group["initial_lr"]) != lr:
            group["initial_lr"] = lr


def taken_over(scheduler: Any, name: str = "LRScheduleCallback") -> LambdaLR:
    """
    Return the scheduler to take over: the Trainer's, or the Trainer's inside DeepSpeed's wrapper.

    Raises:
        ValueError: see [`check_scheduler`].
    """
    inner = getattr(scheduler, "scheduler", None)
    if type(scheduler).__name__ in _DEEPSPEED and isinstance(inner, LambdaLR):
        return inner  # DeepSpeed steps it, the Trainer made it
    check_scheduler(scheduler, name)
    return scheduler


def check_scheduler(scheduler: Any, asker: str = "LRScheduleCallback") -> None:
    """
    Refuse a scheduler that cannot be taken over.

    Args:
        asker (`str`): What wants to set the LR, as the user wrote it: a callback, or a field of the config.

    Raises:
        RefusedError: DeepSpeed owns it, a metric drives it, each layer has its own, or it is not a `LambdaLR`.
    """
    names = [cls.__name__ for cls in type(scheduler).__mro__]
    name = names[0]
    owned = any(known in names for known in _DEEPSPEED) or type(scheduler).__module__.startswith("deepspeed")
    if owned:
        raise RefusedError(
            f"DeepSpeed owns the LR scheduler ({name}), so {asker} cannot set the LR. Remove the 'scheduler' section "
            "from the DeepSpeed config."
        )
    if any(known in names for known in _METRIC_DRIVEN):
        raise RefusedError(
            f"The Trainer's scheduler {name} is driven by an evaluation metric and would overwrite the schedule. "
            "Leave lr_scheduler_type at its default."
        )
    if name == "LayerWiseDummyScheduler":
        raise RefusedError(
            f"{name} only reports an LR: a layer-wise optimizer steps its own schedulers. Use an optimizer that is "
            "not layer-wise."
        )
    if not isinstance(scheduler, LambdaLR):
        raise RefusedError(
            f"The Trainer's scheduler is {name}, which computes its own LRs. Leave lr_scheduler_type at its default "
            f"and do not pass a scheduler in `optimizers`, or drop {asker}."
        )


def check_arguments(args: TrainingArguments, asker: str = "LRScheduleCallback") -> None:
    """
    Refuse training arguments that ask for a second schedule, which would be ignored in silence.

    Args:
        asker (`str`): What sets the LR, as the user wrote it: a callback, or a field of the config.

    Raises:
        RefusedError: `lr_scheduler_type`, `lr_scheduler_kwargs` or `warmup_steps` is set.
    """
    kind = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    if kind not in ("linear", "constant"):
        raise RefusedError(
            f"lr_scheduler_type={kind!r} and {asker} both set the LR. Leave lr_scheduler_type at its "
            "default ('linear') or say 'constant'."
        )
    if args.warmup_steps:
        raise RefusedError(
            f"warmup_steps={args.warmup_steps!r} in the training arguments would be ignored. Give the warm-up to the "
            "schedule: wsd(warmup_steps=...) or warmup_fraction=...."
        )
    if args.lr_scheduler_kwargs:
        raise RefusedError(
            f"lr_scheduler_kwargs={args.lr_scheduler_kwargs!r} would be ignored. Give them to the schedule."
        )


def check_reference(schedule: Schedule, scheduler: LambdaLR) -> None:
    """
    Check that the optimizer's LR is the one an absolute schedule was written for.

    Raises:
        ValueError: `learning_rate` differs from the schedule's `reference_lr`.
    """
    if schedule.absolute and abs(scheduler.base_lrs[0] / schedule.reference_lr - 1) > 1e-6:
        raise ValueError(
            f"{type(schedule).__name__} states absolute learning rates for an optimizer LR of "
            f"{schedule.reference_lr}, but the optimizer has {scheduler.base_lrs[0]}. Set learning_rate="
            f"{schedule.reference_lr}, or pass reference_lr={scheduler.base_lrs[0]} to the schedule."
        )
