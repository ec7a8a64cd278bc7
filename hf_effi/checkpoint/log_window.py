"""The loss that a Trainer has summed up since it last logged: part of a checkpoint, so that the next log is exact."""

from __future__ import annotations

from typing import Any

from accelerate.utils import gather_object
from transformers import Trainer

#: key of our entry in `TrainerState.stateful_callbacks`, which every checkpoint stores as JSON
KEY = "hf_effi.log_window"


def store_log_window(trainer: Trainer) -> None:
    """
    Write into the state that gets saved the loss since the last log, of each process. Every process calls it.

    A stock Trainer begins a new sum when it resumes: where an update that is saved is not one that is logged, the
    first loss after a resume lacks the updates before it.
    """
    state: Any = trainer.state
    stored = state.stateful_callbacks.get(KEY)
    if isinstance(stored, dict) and stored.get("step") == state.global_step:
        return  # stored already, by the other way of saving
    mine = float(trainer._tr_loss)
    losses = gather_object([mine]) if trainer.args.world_size > 1 else [mine]
    since = trainer._globalstep_last_logged
    state.stateful_callbacks[KEY] = {"step": state.global_step, "since": since, "losses": losses}


def restore_log_window(trainer: Trainer) -> None:
    """
    Go on with the sum that a checkpoint stored, before the first update after a resume.

    With another number of processes each begins with the mean, which is what is logged. `train_loss` at the end stays
    the mean over the updates of this `train()`.
    """
    state: Any = trainer.state
    if (losses := _losses(state)) is None:
        return
    since = state.stateful_callbacks[KEY].get("since")
    if type(since) is not int or not 0 <= since <= state.global_step:
        return
    mean = sum(losses) / len(losses)
    trainer._tr_loss.fill_(losses[trainer.args.process_index] if len(losses) == trainer.args.world_size else mean)
    trainer._total_loss_scalar = -mean
    trainer._globalstep_last_logged = since


def processes_of(state: Any) -> int | None:
    """Return how many processes wrote the checkpoint whose state this is; `None` where it does not say."""
    losses = _losses(state)
    return None if losses is None else len(losses)


def _losses(state: Any) -> list[float] | None:
    """Return the losses of a checkpoint of ours, by process; a stock Trainer may have carried along another's."""
    entry = (state.stateful_callbacks or {}).get(KEY)
    if not isinstance(entry, dict) or entry.get("step") != state.global_step:
        return None
    losses = entry.get("losses")
    known = isinstance(losses, list) and losses and all(type(loss) in (int, float) for loss in losses)
    return losses if known else None
