"""`SafeCheckpointCallback`: crash-safe checkpoints of a stock Trainer, by one line."""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from ..checkpoint.run_folder import calling_trainer
from ..checkpoint.safe import Digest, Mode, OnError, SafeCheckpointer, attached_to
from ..errors import RefusedError
from .owners import OwningCallback, Role


class SafeCheckpointCallback(OwningCallback):
    """
    Attaches a [`SafeCheckpointer`] to the Trainer that it is given to.

    It is the same as `SafeCheckpointer(...).attach(trainer)`. Given to the Trainer when that is built, it also makes
    `trainer.train(resume_from_checkpoint="auto")` work; added later, from the next training on.

    Args:
        mode, digest, on_error, lazy: Of [`SafeCheckpointer`].

    Raises:
        ValueError: an argument out of range; or, when the Trainer is built, a second one for the same Trainer.
        RefusedError: when training begins, where no Trainer does it.

    Example:
    ```python
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[SafeCheckpointCallback()])
    trainer.train(resume_from_checkpoint="auto")
    ```
    """

    role = Role("checkpoints", "Two callbacks want to save the checkpoints", "Keep one.")

    def __init__(
        self, mode: Mode = "sync", *, digest: Digest = "crc32", on_error: OnError = "raise", lazy: bool = False
    ) -> None:
        self._arguments: dict[str, Any] = {"mode": mode, "digest": digest, "on_error": on_error, "lazy": lazy}
        self.checkpointer = SafeCheckpointer(**self._arguments)

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_init_end(args, state, control, **kwargs)
        if (trainer := calling_trainer(state)) is not None:
            self._attach(trainer)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        trainer = calling_trainer(state)
        if trainer is None:
            raise RefusedError(
                "SafeCheckpointCallback was called by no Trainer. Call SafeCheckpointer().attach(trainer) instead."
            )
        self._attach(trainer)

    def _attach(self, trainer: Trainer) -> None:
        if attached_to(trainer) is self.checkpointer:
            return
        if self.checkpointer.is_attached:  # to another Trainer, which keeps it
            self.checkpointer = SafeCheckpointer(**self._arguments)
        self.checkpointer.attach(trainer)
