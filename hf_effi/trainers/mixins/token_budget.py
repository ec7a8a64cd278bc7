"""How a Trainer takes `TokenBudgetBatchSampler`: as the batch sampler of its dataloader, one part per process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers.trainer_pt_utils import BatchRebalanceSampler
from transformers.utils import logging

from ...errors import RefusedError
from ...patching import agreed, loss_by_item_count, remembered
from ...samplers import TokenBudgetBatchSampler

logger = logging.get_logger(__name__)


class RankBatches(BatchRebalanceSampler):
    """
    The micro-batches of one process.

    `Trainer._get_dataloader` takes an instance of this base class as a batch sampler that knows its rank, and no other
    class; nothing else of the base is used.
    """

    def __init__(self, plan: TokenBudgetBatchSampler, rank: int) -> None:
        self.plan, self.rank = plan, rank

    def set_epoch(self, epoch: int) -> None:
        self.plan.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[int]]:
        return self.plan.batches(self.rank)

    def __len__(self) -> int:
        return self.plan.batches_per_rank


def rank_batches(trainer: Any, stock: Any, plan: TokenBudgetBatchSampler) -> RankBatches:
    """
    Deal the plan to the processes and accumulation steps of the trainer, and return the part of this process.

    Raises:
        RefusedError: the trainer would cut the micro-batches anew, or weigh their tokens unequally.
    """
    args, settings = trainer.args, trainer.args.accelerator_config
    name = type(plan).__name__
    for setting in ("dispatch_batches", "split_batches"):
        if getattr(settings, setting):
            raise RefusedError(
                f"accelerator_config has {setting}=True, which cuts the micro-batches of {name} anew. Set it to "
                "False: each process then reads its own."
            )
    if args.auto_find_batch_size:
        raise RefusedError(
            f"auto_find_batch_size=True lowers a batch size that {name} does not use. Set it to False and lower "
            "max_tokens."
        )
    if hasattr(stock, "mini_repeat_count"):
        raise RefusedError(
            f"{type(trainer).__name__} needs the completions of a prompt side by side, and {name} packs single rows. "
            "Use it for SFT and pre-training."
        )
    if trainer.get_tp_size() * trainer.get_cp_size() * trainer.get_sp_size() > 1:
        raise RefusedError(
            f"With tensor, context or sequence parallelism several processes need one micro-batch, and {name} gives "
            "each its own. Use it with data parallelism only."
        )
    places = args.world_size * args.gradient_accumulation_steps
    counts_tokens = trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None
    if places > 1 and not counts_tokens:
        raise RefusedError(
            f"{type(trainer.model).__name__} takes no num_items_in_batch, so the {places} micro-batches of an update "
            "would count alike, whatever they hold. Pass compute_loss_func, which gets num_items_in_batch."
        )
    if places > 1 and trainer.compute_loss_func is None:
        _check_loss(trainer.model, places)
    if args.world_size > 1 and not args.average_tokens_across_devices:
        raise RefusedError(
            "average_tokens_across_devices=False lets every process count alike, whatever it holds. Set it to True."
        )
    plan.deal(args.world_size, args.gradient_accumulation_steps)
    return RankBatches(plan, args.process_index)


def _check_loss(model: nn.Module, places: int) -> None:
    """Measure what the signature only promises: that a micro-batch counts by its tokens."""
    found = agreed(remembered(model, "loss by item count", lambda: loss_by_item_count(model)))
    if found.looked and not found.equal:
        raise RefusedError(
            f"{type(model).__name__} takes num_items_in_batch and averages over each call all the same ({found}, "
            "where twice "
            f"the number has to halve it), so the {places} micro-batches of an update would count alike, whatever "
            "they hold. Pass compute_loss_func, which gets num_items_in_batch."
        )
    if not found.looked:
        logger.warning(
            f"Whether {type(model).__name__} divides its loss by num_items_in_batch could not be measured: "
            f"{found.reason}. Its signature has it, and is taken at its word."
        )
