"""Curricula that are fixed before training."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..functional.data import (
    check_count,
    clean_scores,
    competence_order,
    cyclical_sizes,
    draw_without_replacement,
    interleave_levels,
    score_order,
)
from ..functional.kept_arguments import keeps_arguments
from .base import EffiSampler

logger = logging.getLogger(__name__)


class QualityAscendingSampler(EffiSampler):
    """
    Rows in the order of a score, lowest first: the best data comes last.

    Use it for one epoch, and with a learning rate that does not decay to zero: a schedule that does meets the best
    rows with the smallest updates, and `DecayToZeroWarning` says so. Formula:
    [`~hf_effi.functional.data.score_order`].

    Args:
        scores (`torch.Tensor` or `Sequence[float]`): One number per row of the training dataset.
        buckets (`int`, *optional*): Shuffle inside this many equal parts; a full sort if `None`.
        folds (`int`, *optional*, defaults to 1): Interleaved ascending passes.
        descending (`bool`, *optional*, defaults to `False`): Highest first.
        sources (`Sequence[Hashable]`, *optional*): Source of each row; the mixture then stays constant along the
            order.
        seed (`int`, *optional*, defaults to 0): Seed of ties and of the shuffles in buckets.
        nan (`str`, *optional*, defaults to `"error"`): `"error"` or `"median"`.

    Raises:
        ValueError: NaN scores, or an argument out of range.

    Example:
    ```python
    >>> list(QualityAscendingSampler([0.3, 0.1, 0.2]))
    [1, 2, 0]
    ```
    """

    learns = False

    @keeps_arguments
    def __init__(
        self,
        scores: Tensor | Sequence[float],
        *,
        buckets: int | None = None,
        folds: int = 1,
        descending: bool = False,
        sources: Sequence[Hashable] | None = None,
        seed: int = 0,
        nan: str = "error",
    ) -> None:
        self.scores = clean_scores(scores, nan=nan)
        super().__init__(self.scores.numel(), seed)
        self.options: dict[str, Any] = {"buckets": buckets, "folds": folds, "descending": descending}
        self.best_last = not descending
        self._order = score_order(self.scores, seed=seed, sources=sources, **self.options)

    def order(self, epoch: int) -> Tensor:
        if epoch == 1:
            logger.warning("QualityAscendingSampler begins a second epoch, which repeats the order of the first.")
        return self._order

    def settings(self) -> dict[str, Any]:
        return {"order": self._order}


class InterleavedSampler(EffiSampler):
    """
    Rows by level, and inside a level the subjects in turn: CORGI's curriculum.

    Args:
        levels (`Sequence`): Level of each row, such as `(education stage, Bloom level)`; lower comes first.
        subjects (`Sequence[Hashable]`): Subject of each row.
        seed (`int`, *optional*, defaults to 0): Order within a subject, and of the subjects.

    Raises:
        ValueError: lengths differ, or a NaN level.

    Example:
    ```python
    >>> list(InterleavedSampler([2, 1], ["law", "law"]))
    [1, 0]
    ```
    """

    learns = False

    @keeps_arguments
    def __init__(self, levels: Sequence[Any], subjects: Sequence[Hashable], *, seed: int = 0) -> None:
        self._order = interleave_levels(levels, subjects, seed=seed)
        super().__init__(self._order.numel(), seed)

    def order(self, epoch: int) -> Tensor:
        return self._order

    def settings(self) -> dict[str, Any]:
        return {"order": self._order}


class CompetenceSampler(EffiSampler):
    """
    Draw uniformly from the easiest share of the rows, which grows with progress: competence-based pacing.

    The plan covers the whole run in one epoch: set `num_train_epochs=1`, and `num_samples` to what the run shall see.

    Args:
        scores (`torch.Tensor` or `Sequence[float]`): Difficulty of each row, low is easy.
        num_samples (`int`, *optional*): Draws of the whole run; the number of rows if `None`.
        start (`float`, *optional*, defaults to 0.01): Share at the beginning, in `(0, 1]`.
        root (`float`, *optional*, defaults to 2.0): 1 is linear, 2 the paper's square root.
        full_at (`float`, *optional*, defaults to 1.0): Progress from which all rows are in play.
        seed (`int`, *optional*, defaults to 0): Seed of the draws.
        nan (`str`, *optional*, defaults to `"error"`): `"error"` or `"median"`.

    Raises:
        ValueError: NaN scores, or an argument out of range.

    Example:
    ```python
    >>> len(CompetenceSampler([0.1, 0.2, 0.3], num_samples=12))
    12
    ```
    """

    learns = False
    single_pass = True

    @keeps_arguments
    def __init__(
        self,
        scores: Tensor | Sequence[float],
        num_samples: int | None = None,
        *,
        start: float = 0.01,
        root: float = 2.0,
        full_at: float = 1.0,
        seed: int = 0,
        nan: str = "error",
    ) -> None:
        self.scores = clean_scores(scores, nan=nan)
        super().__init__(self.scores.numel(), seed)
        self.num_samples = self.num_rows if num_samples is None else check_count("num_samples", num_samples)
        self.options: dict[str, Any] = {"start": start, "root": root, "full_at": full_at}
        competence_order(self.scores[:1], 1, **self.options)  # refuses a bad option now, not at the first batch

    def __len__(self) -> int:
        return self.num_samples

    def order(self, epoch: int) -> Tensor:
        return competence_order(self.scores, self.num_samples, seed=self.seed, **self.options)

    def settings(self) -> dict[str, Any]:
        return {"scores": self.scores, "num_samples": self.num_samples, **self.options}


class CyclicalSampler(EffiSampler):
    """
    Subsets whose size swings between a small easy one and all rows: cyclical curriculum learning.

    Stage `i` draws `int(num_rows * size_i)` rows without replacement, with probability proportional to `1 / loss`. The
    plan covers the whole run in one epoch: set `num_train_epochs=1`.

    Args:
        losses (`torch.Tensor` or `Sequence[float]`): Loss of each row under a model of the same kind, trained the
            plain way; at least 0 (floored at 1e-8).
        total_epochs (`float`): Passes over the data, in rows, that the cyclical part shall at least have.
        start (`float`, *optional*, defaults to 0.25): Smallest share, in `(0, end]`.
        end (`float`, *optional*, defaults to 1.0): Largest share.
        alpha (`float`, *optional*, defaults to 0.5): Factor from one stage to the next, in `(0, 1)`.
        full_epochs (`int`, *optional*, defaults to 0): Plain shuffled passes before the first stage. The released
            script spends half of its epochs so.
        seed (`int`, *optional*, defaults to 0): Seed of the draws.
        nan (`str`, *optional*, defaults to `"error"`): `"error"` or `"median"`.

    Raises:
        ValueError: a negative loss, or an argument out of range.

    Example:
    ```python
    >>> sampler = CyclicalSampler([0.5, 1.0, 1.0, 2.0], total_epochs=2)
    >>> sampler.stages
    [1, 2, 4, 2]
    ```
    """

    learns = False
    single_pass = True

    @keeps_arguments
    def __init__(
        self,
        losses: Tensor | Sequence[float],
        total_epochs: float,
        *,
        start: float = 0.25,
        end: float = 1.0,
        alpha: float = 0.5,
        full_epochs: int = 0,
        seed: int = 0,
        nan: str = "error",
    ) -> None:

        values = clean_scores(losses, "losses", nan)
        if bool((values < 0).any()):
            raise ValueError(
                f"losses has a negative value ({float(values.min())}). Pass losses, or 1 / score where high is easy."
            )
        super().__init__(values.numel(), seed)
        self.weights = 1.0 / values.clamp(min=1e-8)
        sizes = cyclical_sizes(total_epochs, start, end, alpha)
        full = [self.num_rows] * check_count("full_epochs", full_epochs, 0)
        #: Rows of each stage.
        self.stages = full + [max(1, int(self.num_rows * size)) for size in sizes]
        self._full = len(full)

    def __len__(self) -> int:
        return sum(self.stages)

    def order(self, epoch: int) -> Tensor:
        parts = []
        for stage, count in enumerate(self.stages):
            weights = torch.ones_like(self.weights) if stage < self._full else self.weights
            parts.append(draw_without_replacement(weights, count, self.seed, stage))
        return torch.cat(parts)

    def settings(self) -> dict[str, Any]:
        return {"weights": self.weights, "stages": self.stages, "full": self._full}
