"""What both ways of giving a sampler to a Trainer check before the first step."""

from __future__ import annotations

import logging
from typing import Any

from accelerate.data_loader import DataLoaderDispatcher
from torch.utils.data import IterableDataset

from ..errors import MismatchError, RefusedError
from ..functional.schedules import warn_decay_to_zero
from .base import EffiSampler
from .group import GroupSampler

logger = logging.getLogger(__name__)


def check_trainer(args: Any, dataset: Any, sampler: EffiSampler) -> None:
    """
    Refuse what a sampler cannot order, or what would order the rows a second time.

    Raises:
        RefusedError: as in [`SamplerMixin`].
        ValueError: as there.
    """
    name = type(sampler).__name__
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise RefusedError(
            f"train_dataset is a stream ({type(dataset).__name__}), and a stream has no row numbers for {name} to "
            "order. Load it as a map-style dataset (load_dataset(..., streaming=False)), or order the rows when the "
            "stream is written."
        )
    if len(dataset) != sampler.num_rows:
        raise ValueError(
            f"{name} was made for {sampler.num_rows} rows, but train_dataset has {len(dataset)}. Score the rows that "
            "are trained on: after filtering, and with packing after packing."
        )
    strategy = getattr(args, "train_sampling_strategy", "random")
    if strategy != "random":
        raise RefusedError(
            f"train_sampling_strategy={strategy!r} and train_sampler both order the rows. Leave the strategy at its "
            "default 'random'."
        )
    if args.ignore_data_skip:
        raise RefusedError(
            "ignore_data_skip=True makes the Trainer begin the interrupted epoch anew, so rows would be trained "
            f"twice. Set it to False: with {name} the skipped rows are not read, and skipping costs next to nothing."
        )


def in_layout_of(stock: Any, sampler: EffiSampler) -> EffiSampler:
    """Wrap the sampler in a [`GroupSampler`] where the stock one is a `RepeatSampler`, recognised by its counts."""
    if stock is None or not hasattr(stock, "mini_repeat_count"):
        return sampler
    return GroupSampler(sampler, stock.mini_repeat_count, stock.batch_size, stock.repeat_count)


#: key of the entry in `TrainerState.stateful_callbacks`, which every checkpoint stores as JSON
STATE_KEY = "hf_effi.sampler"


def rows_per_update(loader: Any, args: Any) -> int:
    """
    Return how many rows all processes train on in one update; of batches without a fixed size: how many there are.
    """
    batches = loader.batch_sampler
    size = getattr(batches, "batch_size", None)
    if size is None:
        return args.world_size * args.gradient_accumulation_steps
    dispatches = isinstance(loader, DataLoaderDispatcher)
    splits = loader.split_batches if dispatches else getattr(batches, "split_batches", False)
    # Ranks that share a sequence read the same rows, and their loader counts them once.
    readers = loader.state.num_processes if dispatches else getattr(batches, "num_processes", 1)
    return size * (1 if splits else readers) * args.gradient_accumulation_steps


def store_order(state: Any, in_loader: EffiSampler, loader: Any, args: Any) -> None:
    """
    Write into the state that gets saved which sampler orders the rows of the run, up to this update.

    Raises:
        MismatchError: the checkpoint was trained with another number of rows per update, so that its place in
            the order would be missed.
    """
    rows = rows_per_update(loader, args)
    stored = state.stateful_callbacks.get(STATE_KEY) or {}
    trained = stored.get("rows_per_update", rows) if stored.get("step") == state.global_step > 0 else rows
    if trained != rows and not args.ignore_data_skip:
        raise MismatchError(
            f"The checkpoint at step {state.global_step} was trained with {trained} rows per update, this run has "
            f"{rows}: the Trainer counts finished updates, and would go on at another place in the order. Keep "
            "per_device_train_batch_size "
            f"x gradient_accumulation_steps x processes at {trained}, or start a new run from the weights."
        )
    state.stateful_callbacks[STATE_KEY] = {
        "sampler": type(getattr(in_loader, "sampler", in_loader)).__name__,
        "class": in_loader.identity(),
        "fingerprint": in_loader.fingerprint(),
        "rows_per_update": rows,
        "step": state.global_step,
    }


def check_stored_order(state: Any, in_loader: EffiSampler) -> None:
    """
    Compare the sampler with the one that ordered the rows of a checkpoint.

    Raises:
        MismatchError: there was none up to the end, or another one.
    """
    stored = state.stateful_callbacks.get(STATE_KEY)
    # An entry that is not of the last update was carried along by a run in another order.
    if stored is None or stored.get("step", state.global_step) != state.global_step:
        since = "" if stored is None else f" since update {stored['step']}"
        raise MismatchError(
            f"The checkpoint at step {state.global_step} was trained without train_sampler or SamplerCallback{since}, "
            "in another order. Resume without a sampler, or start a new run from the weights."
        )
    in_loader.check_same_order(stored)


def check_plan(sampler: EffiSampler, max_steps: int, dataloader: Any, accumulation: int) -> None:
    """
    Refuse a run that is longer than a plan of one pass, before the first step.

    Raises:
        ValueError: `max_steps` exceeds the updates of one epoch.
    """
    updates = -(-len(dataloader) // accumulation)
    if sampler.single_pass and max_steps > updates:
        raise ValueError(
            f"{type(sampler).__name__} is a plan of {updates} steps for the whole run, but the run has {max_steps}. "
            f"Set num_train_epochs=1 or max_steps={updates}, or make the plan longer."
        )
    if sampler.single_pass and max_steps < updates:
        logger.warning(
            "%s is a plan of %d steps and the run ends after %d, so the end of the plan is never reached.",
            type(sampler).__name__,
            updates,
            max_steps,
        )


def warn_order_against_decay(sampler: EffiSampler, args: Any, scheduler: Any, max_steps: int) -> None:
    """Warn where the rows that matter most come last and the LR is near zero by then."""
    if sampler.best_last and args.process_index == 0:
        warn_decay_to_zero(
            scheduler,
            max_steps,
            f"and {type(sampler).__name__} serves the rows with the highest scores last: they are met with the "
            "smallest updates. Let the LR end at a third of its peak or stay constant, and average the last "
            "checkpoints (hf_effi.recipes.cdma).",
        )


def resume_in_dispatcher(in_loader: EffiSampler, dataloader: Any, epoch: int, batches_done: int) -> None:
    """
    Make up for batches that accelerate forgets to skip when process 0 reads for all.

    A `DataLoaderDispatcher` draws one batch for every process in each step, but `skip_first_batches` discards one in
    each finished step. The rest is passed over here, so that the two together discard what was trained on.

    Raises:
        RefusedError: the last batch of the epoch has to be filled up with the first rows, which the resumed loader
            lacks.
    """
    if not isinstance(dataloader, DataLoaderDispatcher) or batches_done == 0:
        return
    world = dataloader.state.num_processes
    if len(in_loader) % world and not dataloader._drop_last:
        raise RefusedError(
            f"With dispatch_batches the last of {len(in_loader)} samples would be filled up to {world} processes with "
            "other rows than in the run that is resumed. Set dataloader_drop_last=True, or dispatch_batches=False."
        )
    if not dataloader.split_batches:
        in_loader.start_from(
            epoch, min(batches_done * (world - 1) * dataloader.batch_sampler.batch_size, len(in_loader))
        )
