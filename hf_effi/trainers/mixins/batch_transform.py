"""`BatchTransformMixin`: change a batch as a function of the step, after it has left the dataloader."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from accelerate.data_loader import DataLoaderDispatcher
from torch.utils.data import IterableDataset

from ...callbacks.probing import trained_steps, trained_total
from ...data.batch_transform import BatchTransform
from ...errors import RefusedError
from ...functional.data import seeded


class BatchTransformMixin:
    """
    Give a Trainer a constructor argument `batch_transform`.

    Batches are changed when an update takes them, not when a worker builds them: a switch is exact at its step in
    spite of prefetching, and no worker holds a stale setting. Chance is a function of `args.seed`, the update, the
    micro-batch and the rank: the global random state is left alone and a resumed run needs no state.

    Args:
        batch_transform (`BatchTransform`, *optional*): Without it nothing changes.

    Raises:
        ValueError: another kind of object.
        RefusedError: columns that `remove_unused_columns` would drop, or rows of several widths with
            `dispatch_batches` and several processes.

    Example:
    ```python
    class MyTrainer(BatchTransformMixin, Trainer):
        pass


    MyTrainer(model, args, train_dataset=rows, data_collator=collator, batch_transform=MetadataConditioning(collator))
    ```
    """

    batch_transform: BatchTransform | None = None
    _transform_metrics: dict[str, float] | None = None

    def __init__(self, *args: Any, batch_transform: BatchTransform | None = None, **kwargs: Any) -> None:
        if batch_transform is not None and not isinstance(batch_transform, BatchTransform):
            raise ValueError(
                f"batch_transform={batch_transform!r} must be a BatchTransform, such as "
                "MetadataConditioning(collator)."
            )
        self.batch_transform = batch_transform
        super().__init__(*args, **kwargs)
        if batch_transform is not None and batch_transform.columns and self.args.remove_unused_columns:
            raise RefusedError(
                f"{type(batch_transform).__name__} needs {list(batch_transform.columns)}, which the Trainer drops. "
                "Set remove_unused_columns=False."
            )

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        if self.batch_transform is not None and self.args.world_size > 1:
            _check_dispatch(train_dataloader)
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> Any:
        if self.batch_transform is not None:
            step, total = trained_steps(self.state), trained_total(self.state)
            seed = (self.args.seed, self.state.global_step)
            # Ranks that share a sequence or a forward have the same batch, and have to draw the same for it.
            sharing = self.get_tp_size() * self.get_cp_size() * self.get_sp_size()
            # Lazily, over the same iterator: only the batches of this update are changed.
            epoch_iterator = (
                self.batch_transform(batch, step, total, seeded(*seed, micro, self.args.process_index // sharing))
                for micro, batch in enumerate(epoch_iterator)
            )
            self._transform_metrics = self.batch_transform.metrics(step, total)
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if self.batch_transform is not None:
            inputs = self.batch_transform.at_evaluation(inputs)
        return super().prediction_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self._transform_metrics and "loss" in logs:
            logs = {**logs, **self._transform_metrics}
        super().log(logs, *args, **kwargs)


def _check_dispatch(loader: Any, rows: int = 64) -> None:
    """
    Refuse rows of several widths where a dispatcher will join the batches of all processes, before the first step.

    Raises:
        RefusedError: some of `rows` rows, spread over a dataset that is no stream, are collated to several widths.
    """
    dispatched = isinstance(loader, DataLoaderDispatcher) and not loader.split_batches
    if not dispatched or isinstance(loader.dataset, IterableDataset):
        return
    widths: dict[str, set[tuple[int, ...]]] = {}
    with torch.random.fork_rng(devices=[]):  # a collator may draw
        for index in range(0, len(loader.dataset), max(len(loader.dataset) // rows, 1)):
            for key, value in loader.collate_fn([loader.dataset[index]]).items():
                if isinstance(value, torch.Tensor):
                    widths.setdefault(key, set()).add(tuple(value.shape[1:]))
    ragged = {key: sorted(found)[:3] for key, found in widths.items() if len(found) > 1}
    if ragged:
        raise RefusedError(
            f"dispatch_batches=True joins the batches of all processes, and rows are collated to several widths: "
            f"{ragged}. Set dispatch_batches=False (each process then reads its own), or pad all rows to one length."
        )
