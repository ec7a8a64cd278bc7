"""CMA and CDMA: ascending quality, an LR that does not decay to zero, and an average of the last checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..callbacks.lr_schedule import LRScheduleCallback
from ..callbacks.sampler import SamplerCallback
from ..callbacks.weight_averaging import WeightAveragingCallback
from ..functional.schedules import Schedule, constant, wsd
from ..samplers import QualityAscendingSampler


def cma(
    scores: Tensor | Sequence[float],
    *,
    warmup_fraction: float = 0.05,
    average: WeightAveragingCallback | None = None,
    **order: Any,
) -> dict[str, Any]:
    """
    Return the keyword arguments of curriculum model averaging: ascending quality, constant LR, averaged checkpoints.

    They fit every Trainer, stock ones included. Set `num_train_epochs=1` and leave `lr_scheduler_type` and
    `warmup_steps` at their defaults. Paper: How Learning Rate Decay Wastes Your Best Data (2511.18903).

    Args:
        scores (`torch.Tensor` or `Sequence[float]`): Quality of each row of the training dataset, high is good.
        warmup_fraction (`float`, *optional*, defaults to 0.05): Share of the run, in [0, 1]; ours.
        average ([`WeightAveragingCallback`], *optional*): Which average; the paper's (last 6, EMA with 0.2) if `None`.
        order: `buckets`, `folds`, `sources`, `seed`, `nan` of [`QualityAscendingSampler`].

    Returns:
        `dict`: `{"callbacks": [...]}`.

    Raises:
        ValueError: an argument out of range.

    Example:
    ```python
    trainer = Trainer(model, args, train_dataset=rows, **cma(scores))
    trainer.train()  # the average is in <output_dir>/averaged
    ```
    """
    return _arguments(scores, constant(warmup_fraction=warmup_fraction), average, order)


def cdma(
    scores: Tensor | Sequence[float],
    *,
    final_ratio: float = 1 / 3,
    decay_fraction: float = 0.2,
    warmup_fraction: float = 0.05,
    average: WeightAveragingCallback | None = None,
    **order: Any,
) -> dict[str, Any]:
    """
    Return the keyword arguments of CMA with a moderate decay: the LR ends at a third of its peak. As [`cma`]
    otherwise.

    A `final_ratio` below 0.1 makes training begin with a `DecayToZeroWarning`: the order and the decay fight each
    other.

    Args:
        scores (`torch.Tensor` or `Sequence[float]`): Quality of each row of the training dataset, high is good.
        final_ratio (`float`, *optional*, defaults to 1/3): Last LR over the peak, in [0, 1]. Paper: 3e-3 to 1e-3.
        decay_fraction (`float`, *optional*, defaults to 0.2): Share of the run that decays, 1-sqrt shaped; ours.
        warmup_fraction (`float`, *optional*, defaults to 0.05): Share of the run; ours.
        average ([`WeightAveragingCallback`], *optional*): Which average; the paper's (last 6, EMA with 0.2) if `None`.
        order: `buckets`, `folds`, `sources`, `seed`, `nan` of [`QualityAscendingSampler`].

    Returns:
        `dict`: `{"callbacks": [...]}`.

    Raises:
        ValueError: an argument out of range.

    Example:
    ```python
    trainer = Trainer(model, args, train_dataset=rows, **cdma(scores, sources=rows["source"]))
    trainer.train()
    ```
    """
    schedule = wsd(
        warmup_fraction=warmup_fraction,
        warmup_start=0.0,
        decay_fraction=decay_fraction,
        floor=final_ratio,
        shape="1-sqrt",
    )
    return _arguments(scores, schedule, average, order)


def _arguments(
    scores: Tensor | Sequence[float],
    schedule: Schedule,
    average: WeightAveragingCallback | None,
    order: dict[str, Any],
) -> dict[str, Any]:
    sampler = QualityAscendingSampler(scores, **order)
    average = WeightAveragingCallback() if average is None else average
    return {"callbacks": [SamplerCallback(sampler), LRScheduleCallback(schedule), average]}
