"""
`ResumeMixin`: a resume from half a checkpoint is refused by name, and one from the end of the run trains nothing.
"""

from __future__ import annotations

from typing import Any

from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from ...checkpoint.elastic import check_place_in_data, seed_new_process
from ...checkpoint.resume import AUTO, check_checkpoint, resolve_auto

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
        if resume_from_checkpoint:
            checkpoint = resume_from_checkpoint
            if checkpoint is True:
                checkpoint = get_last_checkpoint(self.args.output_dir)
            if checkpoint is not None:  # else stock says that there is none
                check_checkpoint(checkpoint, self.args.save_only_model)
        return super().train(resume_from_checkpoint, *args, **kwargs)

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

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        if self._at_its_end:
            self.control.should_training_stop = True
            return None
        return super()._run_epoch(*args, **kwargs)
