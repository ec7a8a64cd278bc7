"""`SamplerMixin`: a sampler of this package in any Trainer, saved and resumed with it."""

from __future__ import annotations

import inspect
import os
from typing import Any

import torch
from accelerate.utils import gather_object

from ..._files import load_state, save_bytes, state_bytes
from ...callbacks.owners import claim
from ...callbacks.probing import training_weights
from ...callbacks.sampler import ROW_ORDER
from ...errors import BrokenFileError, RefusedError
from ...samplers import EffiSampler, MeasuringSampler, TokenBudgetBatchSampler
from ...samplers.trainer_checks import (
    STATE_KEY,
    check_plan,
    check_stored_order,
    check_trainer,
    in_layout_of,
    resume_in_dispatcher,
    store_order,
    warn_order_against_decay,
)
from .token_budget import rank_batches

SAMPLER_FILE = "effi_sampler.pt"


class SamplerMixin:
    """
    Give a Trainer a constructor argument `train_sampler`.

    Put it before the Trainer: `class MyTrainer(SamplerMixin, Trainer): pass`. Works with several processes,
    `dispatch_batches`, workers, persistent workers, gradient accumulation. A Trainer that repeats each prompt (GRPO)
    gets the order in its own layout. The sampler's state is saved in each checkpoint, and a resumed run goes on with
    the same order, in the middle of any epoch.

    Args:
        train_sampler ([`EffiSampler`], *optional*): Orders the rows of `train_dataset`. Without it nothing changes.

    Raises:
        RefusedError: the dataset is a stream, another sampling option is set, or a sampler that measures the model and
            sharded parameters.
        ValueError: the dataset has another length than the sampler, or the run is longer than the sampler's plan.
        MismatchError: a checkpoint was made with another sampler, or with another number of rows per update.
        BrokenFileError: a checkpoint has no file of what the sampler has learned.

    Example:
    ```python
    class CurriculumTrainer(SamplerMixin, Trainer):
        pass


    CurriculumTrainer(model, args, train_dataset=rows, train_sampler=QualityAscendingSampler(scores)).train()
    ```
    """

    train_sampler: EffiSampler | None = None
    #: `train_sampler` in the layout of the trainer
    _sampler_in_loader: EffiSampler | None = None

    def __init__(self, *args: Any, train_sampler: EffiSampler | None = None, **kwargs: Any) -> None:
        if train_sampler is not None and not isinstance(train_sampler, EffiSampler):
            raise ValueError(
                f"train_sampler={train_sampler!r} is not an EffiSampler. Use one of hf_effi.samplers, or subclass "
                "EffiSampler and implement order(epoch)."
            )
        self.train_sampler = train_sampler
        super().__init__(*args, **kwargs)
        if train_sampler is not None:
            check_trainer(self.args, self.train_dataset, train_sampler)
            claim(self.state, ROW_ORDER, train_sampler, "train_sampler=", at="built")

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        stock = super()._get_train_sampler(*args, **kwargs)
        if self.train_sampler is None:
            return stock
        dataset = args[0] if args else self.train_dataset
        check_trainer(self.args, dataset, self.train_sampler)
        self.train_sampler.check_not_started()
        if isinstance(self.train_sampler, TokenBudgetBatchSampler):
            self._sampler_in_loader = self.train_sampler
            return rank_batches(self, stock, self.train_sampler)
        self._sampler_in_loader = in_layout_of(stock, self.train_sampler)
        return self._sampler_in_loader

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        if self._sampler_in_loader is not None:
            claim(self.state, ROW_ORDER, self.train_sampler, "train_sampler=")
            check_plan(self.train_sampler, max_steps, train_dataloader, self.args.gradient_accumulation_steps)
            if resume_from_checkpoint is not None:
                self._load_sampler(resume_from_checkpoint)
            store_order(self.state, self._sampler_in_loader, train_dataloader, self.args)
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        if self._sampler_in_loader is None:
            return super()._run_epoch(*args, **kwargs)
        call = inspect.signature(super()._run_epoch).bind(*args, **kwargs).arguments
        if self.state.global_step == 0:
            warn_order_against_decay(self.train_sampler, self.args, self.lr_scheduler, self.state.max_steps)
        # accelerate's skipping loader hides the sampler of a resumed epoch from its own `set_epoch`.
        self._sampler_in_loader.set_epoch(call["epoch"])
        self._measure_before(call["epoch"])
        if call["resume_from_checkpoint"] is not None and call["epoch"] == call["epochs_trained"]:
            resume_in_dispatcher(
                self._sampler_in_loader,
                call["train_dataloader"],
                call["epoch"],
                call["steps_trained_in_current_epoch"],
            )
        try:
            return super()._run_epoch(*args, **kwargs)
        finally:
            self._sampler_in_loader.forget_start()

    def _measure_before(self, epoch: int) -> None:
        """Let a sampler that learns look at the model: each process at its part, all with the gathered values."""
        sampler = self.train_sampler
        if not isinstance(sampler, MeasuringSampler) or sampler.measured_epoch == epoch:
            return
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or self.get_tp_size() > 1:
            raise RefusedError(
                f"{type(sampler).__name__} forwards the model outside of its wrapper, each process with rows of its "
                "own, which FSDP, DeepSpeed and tensor parallelism do not allow. Measure before training and use a "
                "sampler that does not learn, such as QualityAscendingSampler."
            )
        rows, rank, world = sampler.rows_to_measure(epoch), self.args.process_index, self.args.world_size
        mine: list[float] = []
        if rows:
            was_training = self.model.training
            self.model.eval()
            # What a measure draws at random must not shift the random numbers of the training that follows; an epoch
            # that begins inside of a probe looks at the weights of training.
            with torch.no_grad(), torch.random.fork_rng(), training_weights(self.state):
                mine = [float(value) for value in sampler.measure(self.model, rows[rank::world])]
            self.model.train(was_training)
        parts = gather_object([mine]) if world > 1 else [mine]
        values = [0.0] * len(rows)
        for part, found in enumerate(parts):
            if len(found) != len(rows[part::world]):
                raise ValueError(
                    f"measure returned {len(found)} values for {len(rows[part::world])} rows on process {part}. "
                    "Return one number per row."
                )
            values[part::world] = found
        sampler.observe(epoch, values)

    def _save_rng_state(self, output_dir: str) -> None:
        # Before `trainer_state.json` is written and the checkpoint is pushed: whatever has the one also has the other.
        if self._sampler_in_loader is not None:
            if STATE_KEY in self.state.stateful_callbacks:
                self.state.stateful_callbacks[STATE_KEY]["step"] = self.state.global_step
            content = state_bytes(
                self._sampler_in_loader.state_dict(), f"train_sampler ({type(self.train_sampler).__name__})"
            )
            if self.args.should_save:
                save_bytes(os.path.join(output_dir, SAMPLER_FILE), content)
        super()._save_rng_state(output_dir)

    def _load_sampler(self, checkpoint: str) -> None:
        path = os.path.join(checkpoint, SAMPLER_FILE)
        if not os.path.exists(path):
            check_stored_order(self.state, self._sampler_in_loader)  # of SamplerCallback, which writes no file
            if self.train_sampler.learns:
                raise BrokenFileError(
                    f"{checkpoint} has no {SAMPLER_FILE}, which holds what {type(self.train_sampler).__name__} has "
                    "learned: it was saved with save_only_model, or copied in part. Resume from a checkpoint that "
                    "has it, or start a new run from the weights."
                )
            return
        self._sampler_in_loader.load_state_dict(load_state(path))
