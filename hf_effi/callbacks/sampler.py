"""`SamplerCallback`: a sampler that does not learn on a stock `transformers.Trainer`, without a subclass."""

from __future__ import annotations

from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from ..errors import RefusedError
from ..functional.kept_arguments import keeps_arguments
from ..samplers import EffiSampler, TokenBudgetBatchSampler
from ..samplers.trainer_checks import (
    STATE_KEY,
    check_plan,
    check_stored_order,
    check_trainer,
    in_layout_of,
    resume_in_dispatcher,
    store_order,
    warn_order_against_decay,
)
from .owners import OwningCallback, Role

#: who orders the rows of a run
ROW_ORDER = Role(
    "row order",
    "Two samplers want to order the rows",
    "Keep one; one sampler can draw from several, such as MixtureSampler.",
)


class SamplerCallback(OwningCallback):
    """
    Put a sampler into the Trainer's dataloader at the start of training, before its first batch.

    The order, the resumed order and the weights are those of [`SamplerMixin`]. Two things need the mixin, because a
    callback comes too late or is not told the path of the checkpoint: samplers that learn, and samplers whose epoch
    has another length than the dataset (the Trainer has counted its steps by then). Both raise here, by name.

    Args:
        sampler ([`EffiSampler`]): Orders the rows of `train_dataset`, by nothing that is learned in training.

    Raises:
            or `train_sampler`.
            per update.

    Example:
    ```python
    Trainer(model, args, train_dataset=rows, callbacks=[SamplerCallback(ShuffledSampler(len(rows)))]).train()
    ```
    """

    role = ROW_ORDER

    @keeps_arguments
    def __init__(self, sampler: EffiSampler) -> None:
        if not isinstance(sampler, EffiSampler):
            raise ValueError(f"sampler={sampler!r} is not an EffiSampler. Use one of hf_effi.samplers.")
        if sampler.learns:
            raise RefusedError(
                f"{type(sampler).__name__} learns during training, and a callback cannot load "
                "its state from a checkpoint. Use SamplerMixin: class MyTrainer(SamplerMixin, Trainer): pass."
            )
        if isinstance(sampler, TokenBudgetBatchSampler):
            raise RefusedError(
                "TokenBudgetBatchSampler makes the batches themselves, and a callback comes when the dataloader has "
                "made its own. Use SamplerMixin: class MyTrainer(SamplerMixin, Trainer): pass."
            )
        self.sampler = sampler
        self._sampler_in_loader: EffiSampler | None = None
        self._epoch = self._batches_done = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        loader = kwargs["train_dataloader"]
        name = type(self.sampler).__name__
        check_trainer(args, getattr(loader, "dataset", None), self.sampler)
        super().on_train_begin(args, state, control, **kwargs)
        self.sampler.check_not_started()
        if not hasattr(loader, "set_sampler") or getattr(loader, "batch_sampler", None) is None:
            raise RefusedError(
                f"The dataloader is a {type(loader).__name__}, which takes no sampler. Use SamplerMixin instead."
            )
        stock = loader.get_sampler()
        self._sampler_in_loader = in_layout_of(stock, self.sampler)
        if len(self._sampler_in_loader) != len(stock):
            raise RefusedError(
                f"An epoch of {name} has {len(self._sampler_in_loader)} samples and the Trainer has counted its steps "
                f"with {len(stock)}. Use SamplerMixin: class MyTrainer(SamplerMixin, Trainer): pass."
            )
        check_plan(self.sampler, state.max_steps, loader, args.gradient_accumulation_steps)
        if state.global_step > 0:
            check_stored_order(state, self._sampler_in_loader)
        updates = max(-(-len(loader) // args.gradient_accumulation_steps), 1)
        self._epoch = state.global_step // updates
        self._batches_done = state.global_step % updates * args.gradient_accumulation_steps
        store_order(state, self._sampler_in_loader, loader, args)
        loader.set_sampler(self._sampler_in_loader)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 0:  # and not in on_train_begin, where another callback may still set the schedule
            warn_order_against_decay(self.sampler, args, kwargs["lr_scheduler"], state.max_steps)
        self._sampler_in_loader.set_epoch(self._epoch)
        resume_in_dispatcher(self._sampler_in_loader, kwargs["train_dataloader"], self._epoch, self._batches_done)
        self._batches_done = 0

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        state.stateful_callbacks[STATE_KEY]["step"] = state.global_step

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._epoch += 1
        self._sampler_in_loader.forget_start()
