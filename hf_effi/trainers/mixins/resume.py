"""
`ResumeMixin`: a resume from half a checkpoint is refused by name, and one from the end of the run trains nothing.
"""

from __future__ import annotations

from typing import Any

from transformers.utils import logging

from ...checkpoint.elastic import check_place_in_data, place_in_stream, seed_new_process
from ...checkpoint.log_window import restore_log_window, store_log_window
from ...checkpoint.resume import AUTO, check_given, resolve_auto

logger = logging.get_logger(__name__)


class ResumeMixin:
    """
    Overrides `train`, the passes of a Trainer and what it loads. Put it before the Trainer class.

    `resume_from_checkpoint="auto"` takes the newest whole checkpoint and starts fresh where there is none. A process
    that is killed inside of a save leaves a checkpoint that stock stops at with an error of whoever reads
    the file. And a run that had reached its end trains one more update in stock each time that it is resumed inside of
    a pass, so that a job that restarts by itself drifts.
    """

    _at_its_end = False

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint == AUTO:
            resume_from_checkpoint = resolve_auto(self)
        elif resume_from_checkpoint:
            check_given(self, resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: Any,
        trial: Any,
    ) -> tuple[int, int]:
        place = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is None:
            return place
        return place_in_stream(self, resume_from_checkpoint, place)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        self._at_its_end = resume_from_checkpoint is not None and self.state.global_step >= max_steps
        if self._at_its_end and self.is_world_process_zero():
            logger.warning(
                f"The run had reached its end: update {self.state.global_step} of {max_steps}. Nothing is trained. "
                "Raise max_steps or num_train_epochs to train further."
            )
        model, loader = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if resume_from_checkpoint is not None:
            check_place_in_data(self, loader, resume_from_checkpoint)
        return model, loader

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None or not seed_new_process(self, checkpoint):
            super()._load_rng_state(checkpoint)
        if checkpoint is not None:
            restore_log_window(self)

    def _save_rng_state(self, output_dir: str) -> None:
        store_log_window(self)  # before `trainer_state.json` is written
        super()._save_rng_state(output_dir)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        if self._at_its_end:
            self.control.should_training_stop = True
            return None
        return super()._run_epoch(*args, **kwargs)
