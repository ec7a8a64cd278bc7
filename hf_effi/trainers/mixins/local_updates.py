"""`LocalUpdatesMixin`: processes that train alone for many updates, and are joined by an outer step (DiLoCo)."""

from __future__ import annotations

from typing import Any

from transformers.utils import logging

from ...checkpoint.capture import replaced
from ...errors import RefusedError
from ...functional import metrics
from ...functional.local_updates import LocalUpdates
from ._local_run import LocalRun, gather_nothing, refuse_settings, refuse_steps

logger = logging.get_logger(__name__)


class LocalUpdatesMixin:
    """
    Give a Trainer a constructor argument `local_updates`. Put it before the Trainer class.

    Under DDP no gradient is sent: each process trains on its own rows, clips its own gradient and keeps its own
    optimizer. After each `every` updates, and at the end of the run, one all-reduce averages the weights, and an outer
    step (SGD with Nesterov momentum) goes from the last common weights towards that mean. Bytes fall by `every`, and
    the processes wait for each other that much less often.

    Evaluations, saves and the end of training see common weights only. `eval_steps` and `save_steps` must be multiples
    of `every`. What is asked for in between (an epoch's end, a callback) is done at the next synchronisation, with a
    warning; `evaluate`, `predict` and `save_model` that are called in between raise. A resume equals the uninterrupted
    run to the bit. What a trainer gathers for its metrics in each micro-batch, as TRL's do, is not: those metrics are
    of the rows of the first process, counts times the number of processes.

    Args:
        local_updates ([`~hf_effi.functional.local_updates.LocalUpdates`], *optional*): When, and by what outer
            optimizer. Without it nothing changes.

    Raises:
        ValueError: another kind of object, or `eval_steps` or `save_steps` that is no multiple of `every`.
        RefusedError: FSDP, DeepSpeed, tensor, context or sequence parallelism, fp16, trainers that generate (GRPO),
            `average_tokens_across_devices=True` on several processes, `auto_find_batch_size`, a compression hook,
            BatchNorm, a schedule-free optimizer, or a callback that reads or writes weights in between.
        MismatchError: a resume with other settings or on another number of processes.

    Example:
    ```python
    class LocalTrainer(LocalUpdatesMixin, Trainer):
        pass


    args = TrainingArguments("out", average_tokens_across_devices=False, save_steps=500)
    LocalTrainer(model, args, train_dataset=rows, local_updates=LocalUpdates(every=50)).train()
    ```
    """

    local_updates: LocalUpdates | None = None
    _local_run: LocalRun | None = None
    _common_at: int | None = None
    _held_back: frozenset[str] = frozenset()

    def __init__(self, *args: Any, local_updates: LocalUpdates | None = None, **kwargs: Any) -> None:
        if local_updates is not None and not isinstance(local_updates, LocalUpdates):
            raise ValueError(
                f"local_updates={local_updates!r} must be a LocalUpdates, such as LocalUpdates(every=50)."
            )
        self.local_updates = local_updates
        super().__init__(*args, **kwargs)
        if local_updates is not None:
            refuse_settings(self, local_updates)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)
        finally:
            self._end_local_run()

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        settings = self.local_updates
        if settings is not None:
            refuse_settings(self, settings)  # callbacks may have been added since
            refuse_steps(self, settings)
        model, loader = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if settings is not None:
            args = self.args
            self._local_run = LocalRun(settings, model, self.optimizer, args.process_index, args.world_size)
            self._common_at, self._held_back = self.state.global_step, frozenset()
            if resume_from_checkpoint is not None:
                self._local_run.load(resume_from_checkpoint)
        return model, loader

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        run = self._local_run
        if run is None or run.world == 1 or run.settings.every == 1:
            return super().training_step(*args, **kwargs)
        with replaced(self.accelerator, "gather_for_metrics", gather_nothing(run.world)):
            return super().training_step(*args, **kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self.local_updates is not None and self._local_run is not None:
            state, control = self.state, self.control
            if control.should_training_stop or self.local_updates.is_due(state.global_step, state.max_steps):
                self._join()
            self._hold_back()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._join()  # of a run whose data ended early
        self._end_local_run()
        return super()._finalize_training(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._local_run is not None:
            self._local_run.save(output_dir)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        self._check_common("evaluate")
        return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        self._check_common("predict")
        return super().predict(*args, **kwargs)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        self._check_common("save_model")
        super().save_model(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if (run := self._local_run) is not None and "loss" in logs:
            logs = {
                **logs,
                metrics.LOCAL_SYNCHRONISATIONS: run.count,
                metrics.LOCAL_SENT_BYTES: run.sent_bytes,
                metrics.LOCAL_DELTA_NORM: run.delta_norm,
            }
        super().log(logs, *args, **kwargs)

    def _join(self) -> None:
        """Synchronise, unless this update has been."""
        if self._local_run is not None and self._common_at != self.state.global_step:
            self._local_run.synchronise()
            self._common_at = self.state.global_step

    def _hold_back(self) -> None:
        """Keep what is asked for between two synchronisations until the next one."""
        control = self.control
        asked = {name for name in ("should_evaluate", "should_save") if getattr(control, name)}
        common = self._common_at == self.state.global_step
        if asked and not common:
            what = " and ".join(sorted(name.removeprefix("should_") for name in asked))
            logger.warning_once(
                f"Update {self.state.global_step} asks to {what}, where each process has its own weights: it is done "
                "at the next synchronisation, here and in later updates."
            )
        due = self._held_back | asked
        for name in due:
            setattr(control, name, common)
        self._held_back = frozenset() if common else frozenset(due)

    def _check_common(self, what: str) -> None:
        if self._local_run is not None and self._common_at != self.state.global_step:
            raise RefusedError(
                f"{what} was called after update {self.state.global_step}, and the processes have had the same "
                f"weights after update {self._common_at} for the last time. Call it where global_step is a multiple "
                f"of every={self._local_run.settings.every}, or set control.should_evaluate or control.should_save, "
                "which wait."
            )

    def _end_local_run(self) -> None:
        run, self._local_run = self._local_run, None
        if run is not None:
            run.train_alone(False)
