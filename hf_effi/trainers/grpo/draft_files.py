"""The drafts of rollouts in a checkpoint: one file for each process, read by as many processes as there are now."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers.utils import logging

from ..._files import load_state, missing_file
from ...errors import BrokenFileError

logger = logging.get_logger(__name__)


def drafts_name(rank: int) -> str:
    """Return the name of the file of a process."""
    return f"effi_drafts_{rank}.pt"


def load_drafts(trainer: Any, checkpoint: Path, state: dict[str, Any]) -> None:
    """
    Give the drafts of a checkpoint to the trainer that resumes it; every process comes here.

    Args:
        trainer: With its `reuse_turn`, which may be `None`.
        checkpoint (`Path`): The folder.
        state (`dict`): Of `effi_state.json`.

    Raises:
        BrokenFileError: a file is missing or damaged.
        MismatchError: the drafts were kept for another rule.
    """
    stored, turn, accelerator = state.get("drafts", False), trainer.reuse_turn, trainer.accelerator
    if stored != (turn is not None) and accelerator.is_main_process:
        logger.warning(
            f"{checkpoint} holds rollouts to be reused, and this run has no rollout_reuse: they are left alone."
            if stored
            else f"{checkpoint} holds no rollouts to be reused: the first pass from here generates all of its own."
        )
    if not stored or turn is None:
        return
    now, before, rank = accelerator.num_processes, state["world_size"], accelerator.process_index
    if isinstance(before, bool) or not isinstance(before, int) or before < 1:
        raise BrokenFileError(f"{checkpoint} names {before!r} processes. Resume from another checkpoint.")
    # A process that reads its own file needs no other; all of them have to be there for another number. They are
    # counted by what is there, since the number may be any in a file that somebody else has written.
    first, count = (rank, 1) if now == before else (0, before)
    wanted = map(drafts_name, itertools.islice(itertools.count(first), count))
    names = list(itertools.takewhile(lambda name: (checkpoint / name).exists(), wanted))
    lost = gather_object([drafts_name(first + len(names))] if len(names) < count else [])
    if lost:
        raise missing_file(checkpoint / lost[0])
    states = [load_state(checkpoint / name) for name in names]
    share = {} if now == before else {"part": rank, "parts": now}
    turn.load_state_dict(*states, **share)
