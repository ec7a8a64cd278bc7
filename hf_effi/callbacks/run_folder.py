"""Where the checkpoints of a run are, as a callback can know it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerState, TrainingArguments

from ..errors import RefusedError


def run_folder(args: TrainingArguments, state: TrainerState) -> Path:
    """
    Return the folder that holds the `checkpoint-N` of the run that is going on.

    It is `output_dir`, and a folder of each trial in it during a hyperparameter search. What that folder is called
    only the Trainer knows, and no event hands over the Trainer: it is looked for among those who called.

    Raises:
        RefusedError: a trial of a search, and no Trainer of this state has called.
    """
    if not state.is_hyper_param_search:
        return Path(args.output_dir)
    trainer = _calling_trainer(state)
    if trainer is None:
        raise RefusedError(
            "This run is a trial of a hyperparameter search, and the Trainer that runs it did not call the callback, "
            "so the "
            "folder of the trial is not known. Leave callbacks that keep files in checkpoints out of the search."
        )
    return Path(trainer._get_output_dir(trainer._trial))


def _calling_trainer(state: TrainerState) -> Any:
    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer) and caller.state is state:
            return caller
        frame = frame.f_back
    return None
