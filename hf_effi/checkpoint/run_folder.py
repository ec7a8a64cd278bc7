"""Where the checkpoints of a run are, as a callback can know it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import Trainer, TrainerState, TrainingArguments

from ..errors import RefusedError

#: attribute of a TrainerState: the folder in progress while a checkpoint is written aside. It is no field, so no
#: checkpoint has it.
_ASIDE = "_hf_effi_saving_into"


@contextmanager
def saving_into(state: TrainerState, folder: Path) -> Iterator[None]:
    """Let [`run_folder`] give `folder` for a while: a checkpoint that is being written has not got its place yet."""
    setattr(state, _ASIDE, folder)
    try:
        yield
    finally:
        delattr(state, _ASIDE)


def run_folder(args: TrainingArguments, state: TrainerState) -> Path:
    """
    Return the folder that holds the `checkpoint-N` of the run that is going on.

    It is `output_dir`, and a folder of each trial in it during a hyperparameter search. What that folder is called
    only the Trainer knows, and no event hands over the Trainer: it is looked for among those who called.

    Raises:
        RefusedError: a trial of a search, and no Trainer of this state has called.
    """
    if (aside := getattr(state, _ASIDE, None)) is not None:
        return aside
    if not state.is_hyper_param_search:
        return Path(str(args.output_dir))
    trainer = calling_trainer(state)
    if trainer is None:
        raise RefusedError(
            "This run is a trial of a hyperparameter search, and the Trainer that runs it did not call the callback, "
            "so the "
            "folder of the trial is not known. Leave callbacks that keep files in checkpoints out of the search."
        )
    return Path(trainer._get_output_dir(trainer._trial))


def is_saved_aside(state: TrainerState) -> bool:
    """Return whether a checkpoint is being written into a folder in progress, which will be renamed as a whole."""
    return getattr(state, _ASIDE, None) is not None


def calling_trainer(state: TrainerState) -> Any:
    """Return the Trainer of a state among those who called this function, or `None`."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer) and caller.state is state:
            return caller
        frame = frame.f_back
    return None
