"""`HubCallback`: card with recipe, and uploads beside training, for a stock Trainer."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..callbacks.observer import describe
from ..callbacks.owners import OwningCallback, Role
from ..callbacks.probing import holds_training_weights
from ..checkpoint.run_folder import run_folder
from ..checkpoint.safe import attached_to
from ..errors import RefusedError
from .publish import make_room_for_card, push_checkpoint, uploader_for, write_section

logger = logging.getLogger(__name__)


class HubCallback(OwningCallback):
    """
    Push each checkpoint of a stock Trainer to the Hub, with a card that carries the whole recipe.

    The card gets tags (`hf_effi` and the methods), exact arguments, learning rate, what was dropped, hardware,
    versions, citations and a snippet that runs it again; [`from_card`] reads it back. Uploads go from copies, beside
    training, and are tried again; none of them can fail or hold up the run: at the end it waits at most `seconds`.
    Record and recipe are on disk before the upload begins. Add it last, after a [`RunRecordCallback`].

    Args:
        trainer (`Trainer`): The trainer it is added to. `args.push_to_hub` must be off, as two would push.
        repo_id (`str`): `user/name`. `args.hub_token`, `hub_private_repo`, `hub_revision` and `hub_always_push` act as
            usual.
        seconds (`float`, *optional*): How long one upload may take, and the wait at the end; 0.8 of `args.ddp_timeout`
            (24 minutes, unless it was changed) without it.

    Raises:
        RefusedError: `push_to_hub` is on, or the run saves no checkpoints.
        ValueError: `seconds` is no less than `ddp_timeout` with several processes.
        HubRefusedError: at the beginning of training, where the Hub refuses the token or the name.

    Example:
    ```python
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[RunRecordCallback()])
    trainer.add_callback(HubCallback(trainer, "me/my-run"))
    trainer.train()
    ```
    """

    in_recipe = False

    def __init__(self, trainer: Trainer, repo_id: str, seconds: float | None = None) -> None:
        if trainer.args.push_to_hub:
            raise RefusedError("HubCallback and push_to_hub=True would both push. Set push_to_hub=False.")
        if trainer.args.save_strategy == "no":
            raise RefusedError(
                "HubCallback pushes checkpoints, and save_strategy='no' writes none. Set 'steps' or 'epoch'."
            )
        self.trainer = trainer
        self.uploader = uploader_for(trainer.args, repo_id, seconds)
        self._pushed: str | None = None

    @property
    def role(self) -> Role:
        """One for each repository."""
        repository = self.uploader.repo_id
        return Role(("hub", repository), f"Two callbacks want to push to {repository!r}", "Keep one.")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if state.is_world_process_zero:
            self.uploader.create_repo()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not holds_training_weights(state):
            return  # a checkpoint that somebody asked for inside of a probe can be resumed, and is no model to publish
        name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        checkpointer = attached_to(self.trainer)
        if checkpointer is None:
            self._push(args, state, name, "Training in progress")
        else:  # which may still be writing it
            checkpointer.when_written(lambda: self._push(args, state, name, "Training in progress"))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        last = Path(best).name if best else self._pushed
        if last is not None:
            self._push(args, state, last, "End of training")
        if state.is_world_process_zero:
            self.uploader.wait()

    def _push(self, args: TrainingArguments, state: TrainerState, name: str, message: str) -> None:
        if not state.is_world_process_zero:
            return
        self._pushed = name
        try:
            make_room_for_card(args.output_dir)
            self.trainer.create_model_card(model_name=self.uploader.repo_id.split("/")[-1])
        except Exception as error:  # a stock run without pushes writes no card
            logger.warning("%s is pushed without its model card: %s", name, describe(error))
        if not getattr(self.trainer, "writes_recipe", False):  # an Effi trainer's card has it already
            write_section(self.trainer, self.uploader.repo_id)
        push_checkpoint(self.uploader, args.output_dir, run_folder(args, state) / name, f"{message}, {name}")
