"""
The signal "this update is a probe": a search makes updates that it undoes, and whoever keeps a state must not see
them.

The plan of probes belongs to one `TrainerState`, so that several trainers in one process do not meet, and an error
inside of a probe leaves nothing behind. Checkpoints carry the probes so far.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from ..errors import RefusedError
from ..functional import metrics
from ..functional.probes import PROBES_KEY, ProbePlan, stored_plan

#: events of the update in progress, which `global_step` does not count yet; the others follow it
_BEFORE_THE_COUNT = ("on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_optimizer_step")
_ATTRIBUTE = "_hf_effi_probes"


@dataclass
class _Search:
    """What one `train()` knows; an attribute of its state, which is saved by fields and so leaves it out."""

    owner: Any
    plan: ProbePlan
    lend: Callable[[], AbstractContextManager[None]] | None = None
    save_is_due: bool = False


def plan_of(state: TrainerState) -> ProbePlan:
    """Return all probes that are known: what was announced in this run, or what its checkpoint stores."""
    search = getattr(state, _ATTRIBUTE, None)
    return stored_plan(state.stateful_callbacks or {}) if search is None else search.plan


def in_probe(state: TrainerState, ahead: int = 0) -> bool:
    """
    Return whether an update is a probe.

    Args:
        ahead (`int`, *optional*, defaults to 0): 0 for the last update that `global_step` counts, which is the one
            that `on_step_end`, `on_log`, `on_evaluate` and `on_save` speak of; 1 for the update in progress, in the
            events from `on_step_begin` to `on_optimizer_step`.
    """
    return plan_of(state).is_probe(state.global_step + ahead)


def trained_steps(state: TrainerState) -> int:
    """Return the finished updates of training: `global_step` without probes."""
    return plan_of(state).trained(state.global_step)


def trained_total(state: TrainerState) -> int:
    """Return the updates of training in the whole run: `max_steps` without probes. Known once training has begun."""
    return plan_of(state).trained(state.max_steps)


def holds_training_weights(state: TrainerState) -> bool:
    """Return whether the model holds the weights of training between two updates, and not those of a probe."""
    return plan_of(state).undone(state.global_step)


def outside_probes(event: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate an event of a callback that must not see probes."""
    ahead = int(event.__name__ in _BEFORE_THE_COUNT)

    @functools.wraps(event)
    def only_training(
        self: Any, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> Any:
        return None if in_probe(state, ahead) else event(self, args, state, control, **kwargs)

    return only_training


# --- for whoever makes the probes ---------------------------------------------------------------------------------


def announce_probes(
    state: TrainerState,
    owner: Any,
    blocks: Iterable[tuple[int, int, int]],
    lend: Callable[[], AbstractContextManager[None]] | None = None,
) -> None:
    """
    Say which updates will be probes. Call it in `on_train_begin`, for the whole run: others plan by the number of
    updates.

    Probes that a resumed checkpoint stores stay known, up to the first of `blocks`.

    Args:
        owner: The callback that makes the probes and undoes each of them in `on_step_end` of its last update.
        blocks (`Iterable[tuple[int, int, int]]`): See [`ProbePlan`].
        lend (`Callable`, *optional*): Returns a context in which the model holds the weights of training, for those
            who must look at them in the middle of a probe.

    Raises:
        RefusedError: another callback makes probes in this run.
        ValueError: blocks overlap.
    """
    search = getattr(state, _ATTRIBUTE, None)
    if search is not None and search.owner is not owner:
        raise RefusedError(
            f"{type(search.owner).__name__} and {type(owner).__name__} both try updates and undo them in one run, "
            "each in the middle of the other's. Keep one of them."
        )
    blocks = tuple(tuple(block) for block in blocks)
    past = stored_plan(state.stateful_callbacks).until(state.global_step)
    kept = tuple(block for block in past.blocks if not blocks or block[0] < blocks[0][0])
    setattr(state, _ATTRIBUTE, _Search(owner, ProbePlan(kept + blocks), lend))


def store_probes(state: TrainerState) -> None:
    """Put the probes so far where checkpoints keep them. Call it in each `on_step_end`."""
    blocks = state.stateful_callbacks.setdefault(PROBES_KEY, {"blocks": []})["blocks"]
    block = plan_of(state).block_of(state.global_step)
    if block is None:
        return
    done = [block[0], state.global_step, block[2]]  # as far as this search got
    if blocks and blocks[-1][0] == done[0]:
        blocks[-1] = done
    else:
        blocks.append(done)


def hold_back(args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
    """
    Keep the Trainer's clock out of the probes. Call it in `on_step_end` and `on_epoch_end`.

    An evaluation that falls due in a search is left out, as it would repeat the last one or measure a probe; so
    neither early stopping nor the best checkpoint sees one. A checkpoint that falls due in the middle of a probe is
    written at its end, with the weights of training. A log entry is written where a search begins and ends, so that
    none averages losses of both kinds.
    """
    search, plan, step = getattr(state, _ATTRIBUTE), plan_of(state), state.global_step
    if plan.is_probe(step):
        control.should_evaluate = False
    if not plan.undone(step) and not control.should_training_stop:
        search.save_is_due |= control.should_save
        control.should_save = False
    elif search.save_is_due:
        control.should_save, search.save_is_due = True, False
    strategy = str(getattr(args.logging_strategy, "value", args.logging_strategy))
    if strategy != "no" and plan.is_probe(step) != plan.is_probe(step + 1):
        control.should_log = True


def mark_log(state: TrainerState, logs: dict[str, Any]) -> None:
    """Mark a log entry of probes with `effi/probe`. Call it in `on_log`; a summary of the run is of no update."""
    if in_probe(state) and any(name == "loss" or name.startswith("eval_") for name in logs):
        logs[metrics.PROBE] = state.log_history[-1][metrics.PROBE] = 1.0


@contextlib.contextmanager
def training_weights(state: TrainerState) -> Iterator[None]:
    """
    A context in which the model holds the weights of training, also in the middle of a probe.

    Raises:
        RefusedError: the callback that makes the probes does not lend them.
    """
    search = getattr(state, _ATTRIBUTE, None)
    if holds_training_weights(state):
        yield
        return
    if search is None or search.lend is None:
        raise RefusedError(
            f"The weights of training are asked for at update {state.global_step}, inside of a probe, and whoever "
            "made the probe is not here or cannot give them. Train on with the callback that made it."
        )
    with search.lend():
        yield
