"""Numbers of single rows under a causal language model: loss, and whether it is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..functional.data import check_count


class RowLoss:
    """
    Mean loss over the labelled tokens of each row, in nats: `-1/|T| sum_{t in T} ln p(y_t | y_<t)`.

    A row without a labelled token has loss 0.

    Args:
        dataset: Map-style, with what `collate` takes.
        collate (`Callable[[list], dict]`): Makes a batch with `input_ids` and `labels` (-100 = not labelled).
        batch_size (`int`, *optional*, defaults to 8): Rows forwarded at once.
    """

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any], batch_size: int = 8) -> None:
        self.dataset, self.collate = dataset, collate
        self.batch_size = check_count("batch_size", batch_size)

    def __call__(self, model: Any, rows: list[int]) -> Tensor:
        device = next(model.parameters()).device
        parts = []
        for first in range(0, len(rows), self.batch_size):
            batch = self.collate([self.dataset[row] for row in rows[first : first + self.batch_size]])
            batch = {key: value.to(device) for key, value in batch.items() if isinstance(value, Tensor)}
            labels = batch.pop("labels")
            with torch.no_grad():
                logits = model(**batch).logits
            parts.append(self.reduce(logits[:, :-1].float(), labels[:, 1:]).double().cpu())
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)

    def reduce(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return one number per row from logits `(rows, tokens, vocabulary)` and the labels that they predict."""
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")
        return loss.sum(1) / (labels != -100).sum(1).clamp(min=1)


class RowCorrect(RowLoss):
    """
    1 where every labelled token of a row is the most likely one (teacher forcing), else 0. Arguments as in `RowLoss`.
    """

    def reduce(self, logits: Tensor, labels: Tensor) -> Tensor:
        return ((logits.argmax(-1) == labels) | (labels == -100)).all(1).double()
