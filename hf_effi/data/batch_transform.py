"""`BatchTransform`: what changes a batch as a function of the step."""

from __future__ import annotations

from typing import Any

import torch


class BatchTransform:
    """
    What `BatchTransformMixin` calls for each batch; override `__call__` and what else is needed.

    Attributes:
        columns (`tuple[str, ...]`): Columns of the dataset that the transform needs and the model does not take.
    """

    columns: tuple[str, ...] = ()

    def __call__(
        self, batch: dict[str, Any], step: int, total_steps: int, generator: torch.Generator
    ) -> dict[str, Any]:
        """
        Return the batch to train on; all chance comes from `generator`.

        `step` is the number of finished updates and `total_steps` that of the run; updates that a search tries and
        undoes (`AutoLRSCallback`) count in neither, and get the setting of the update of training that follows them.
        """
        raise NotImplementedError

    def at_evaluation(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the batch to evaluate on."""
        return batch

    def metrics(self, step: int, total_steps: int) -> dict[str, float]:
        """Return what is logged beside the loss of this update."""
        return {}
