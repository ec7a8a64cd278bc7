"""What callbacks share whose state is too large for `trainer_state.json`: a file of their own in each checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .._files import save_state
from .run_folder import run_folder


class SideFileCallback(TrainerCallback):
    """
    Base of a callback with a file in each checkpoint.

    A Trainer that pushes does so inside its save and calls `on_save` afterwards. The file is therefore written at
    `on_push_begin` where a checkpoint is pushed, and at `on_save` otherwise.
    """

    #: Name of the file in `checkpoint-N`; one for each process may have the process's number in it.
    side_file = ""
    _written_at: int | None = None

    def side_state(self, args: TrainingArguments, state: TrainerState) -> Any:
        """Return what this process stores now, in a form that `torch.save` takes; `None` for nothing."""
        raise NotImplementedError(f"{type(self).__name__} has to implement side_state(args, state).")

    def side_path(self, args: TrainingArguments, state: TrainerState) -> Path:
        """Return where the file of this checkpoint is."""
        return run_folder(args, state) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / self.side_file

    def write_side_file(self, args: TrainingArguments, state: TrainerState) -> None:
        """Write the file, once for each save."""
        if self._written_at != state.global_step and (content := self.side_state(args, state)) is not None:
            save_state(self.side_path(args, state), content)
        self._written_at = state.global_step

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # On inside a save, off where a finished model is pushed.
        if control.should_save:
            self.write_side_file(args, state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.write_side_file(args, state)
        self._written_at = None
