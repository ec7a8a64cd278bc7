"""Curricula that look at the model before an epoch: self-paced learning and ability-matched selection."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..functional.data import (
    check_count,
    check_number,
    clean_scores,
    easiest_share,
    rasch_ability,
    refill,
    seeded,
    self_paced_weights,
    within_ability,
)
from ..functional.options import refuse_idle
from .base import EffiSampler

#: `measure(model, rows)` returns one number for each of these row numbers.
Measure = Callable[[Any, list[int]], Tensor | Sequence[float]]


class MeasuringSampler(EffiSampler):
    """
    Base of samplers that measure the model once before an epoch and then keep the order of that epoch.

    The trainer calls [`~MeasuringSampler.rows_to_measure`], has `measure` look at these rows (each process at its
    part), and hands the gathered values to [`~MeasuringSampler.observe`]. The values are in the checkpoint: an epoch
    that is resumed is not measured again, since the model has moved on.

    Epochs have a fixed number of samples, so that the number of steps and the schedule are known: the chosen rows are
    repeated, each time in a new order, until the epoch is full.

    Args:
        num_rows (`int`): Rows of the dataset.
        measure (`Callable[[model, list[int]], Tensor]`): One number for each row. Called in eval mode without
            gradients.
        num_samples (`int`, *optional*): Samples of an epoch; `num_rows` if `None`.
        seed (`int`, *optional*, defaults to 0): Seed of the orders.
    """

    learns = True

    def __init__(self, num_rows: int, measure: Measure, num_samples: int | None = None, seed: int = 0) -> None:
        super().__init__(num_rows, seed)
        if not callable(measure):
            raise ValueError(f"measure={measure!r} must be a function of (model, rows).")
        self.measure = measure
        self.num_samples = self.num_rows if num_samples is None else check_count("num_samples", num_samples)
        self.measured_epoch = -1
        self.chosen: Tensor | None = None
        self._observations = 0

    def __len__(self) -> int:
        return self.num_samples

    @abstractmethod
    def rows_to_measure(self, epoch: int) -> list[int]:
        """Return the rows to look at before this epoch; none where nothing has to be known."""

    @abstractmethod
    def choose(self, epoch: int, rows: list[int], values: Tensor) -> Tensor:
        """Return the mask of the rows to train on, shape `(num_rows,)`."""

    def observe(self, epoch: int, values: Tensor | Sequence[float]) -> None:
        """
        Take the measured numbers, in the order of `rows_to_measure(epoch)`, and fix the rows of this epoch.

        Raises:
            ValueError: another number of values than rows, or NaN.
        """
        rows = self.rows_to_measure(epoch)
        found = clean_scores(values, "measured values") if rows else torch.empty(0, dtype=torch.float64)
        if found.numel() != len(rows):
            raise ValueError(f"measure returned {found.numel()} values for {len(rows)} rows. Return one per row.")
        self.chosen = self.choose(epoch, rows, found).nonzero().flatten()
        self.measured_epoch = epoch
        self._observations += 1

    def order(self, epoch: int) -> Tensor:
        if self.chosen is None or self.measured_epoch != epoch:
            raise ValueError(
                f"{type(self).__name__} has not measured the model before epoch {epoch}. Give it to a Trainer with "
                "SamplerMixin, or call observe(epoch, values) in your loop."
            )
        return refill(self.chosen, self.num_samples, self.seed, epoch)

    def learned_state(self) -> dict[str, Any]:
        return {"measured_epoch": self.measured_epoch, "chosen": self.chosen}

    def load_learned_state(self, state: dict[str, Any]) -> None:
        self.measured_epoch, self.chosen = state["measured_epoch"], state["chosen"]
        self._observations += 1

    def _cache_key(self) -> Any:
        return self.epoch, self._observations


class SelfPacedSampler(MeasuringSampler):
    """
    Train on what the model finds easy now, and on more of it in each epoch: self-paced learning.

    Give either a share of the rows or a threshold on the loss:
    `share_e = min(1, share + e * share_step)`, or `lambda_e = threshold * growth^e` and rows with `loss < lambda_e`.

    Args:
        num_rows (`int`): Rows of the dataset.
        measure (`Callable`): Loss of each row, see [`MeasuringSampler`] and [`RowLoss`].
        share (`float`, *optional*): Share of the rows in the first epoch, in `(0, 1]`.
        share_step (`float`, *optional*, defaults to 0.25): Added in each epoch, at least 0.
        threshold (`float`, *optional*): `lambda_0`, positive.
        growth (`float`, *optional*, defaults to 1.3): At least 1.
        min_rows (`int`, *optional*, defaults to 1): The easiest so many are always in.
        num_samples, seed (`int`, *optional*): See [`MeasuringSampler`].

    Raises:
        ValueError: both or neither of `share` and `threshold`, or an argument out of range.

    Example:
    ```python
    >>> sampler = SelfPacedSampler(4, lambda model, rows: [3.0, 1.0, 2.0, 4.0], share=0.5)
    >>> sampler.observe(0, sampler.measure(None, sampler.rows_to_measure(0)))
    >>> sorted(sampler)
    [1, 1, 2, 2]
    ```
    """

    def __init__(
        self,
        num_rows: int,
        measure: Measure,
        *,
        share: float | None = None,
        share_step: float = 0.25,
        threshold: float | None = None,
        growth: float = 1.3,
        min_rows: int = 1,
        num_samples: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(num_rows, measure, num_samples, seed)
        if (share is None) == (threshold is None):
            raise ValueError(
                f"share={share!r} and threshold={threshold!r}: give exactly one, a share of the rows or a bound on "
                "the loss."
            )
        if share is not None:
            check_number("share", share, 0, 1, open_low=True)
        if threshold is not None:
            check_number("threshold", threshold, 0, open_low=True)
        refuse_idle("share_step", share_step, 0.25, share is not None, "with share=")
        refuse_idle("growth", growth, 1.3, threshold is not None, "with threshold=")
        self.share, self.share_step = share, check_number("share_step", share_step, 0)
        self.threshold, self.growth = threshold, check_number("growth", growth, 1)
        self.min_rows = check_count("min_rows", min_rows)
        if min_rows > self.num_rows:
            raise ValueError(f"min_rows={min_rows} exceeds the {self.num_rows} rows.")

    def rows_to_measure(self, epoch: int) -> list[int]:
        return list(range(self.num_rows))

    def choose(self, epoch: int, rows: list[int], values: Tensor) -> Tensor:
        if self.share is not None:
            return easiest_share(values, min(1.0, self.share + epoch * self.share_step), self.min_rows)
        threshold = cast(float, self.threshold)  # one of the two was given
        mask = self_paced_weights(values, threshold * self.growth**epoch) > 0
        return mask if int(mask.sum()) >= self.min_rows else easiest_share(values, 0.0, self.min_rows)

    def settings(self) -> dict[str, Any]:
        names = ("share", "share_step", "threshold", "growth", "min_rows", "num_samples")
        return {name: getattr(self, name) for name in names}


class AbilitySampler(MeasuringSampler):
    """
    Train on items that are not harder than the model is able: PUDF's dynamic data selection.

    Before each epoch the model answers up to `max_probe` items; its ability `theta` is the MAP under the Rasch model,
    and the epoch holds the items with `theta + lower <= b <= theta + upper`. If `theta` moved by less than
    `min_change` for two epochs in a row, `shift` is added to it, for good.

    Args:
        difficulty (`torch.Tensor` or `Sequence[float]`): `b` of each row, such as `fit_rasch(responses)[0]`.
        measure (`Callable`): 1 where the model answers the row right, else 0; see [`RowCorrect`].
        lower, upper (`float`, *optional*): The band around `theta`; all that is easier, by default.
        min_rows (`int`, *optional*, defaults to 1): The easiest so many if the band has fewer.
        full_from_epoch (`int`, *optional*): From this epoch (0-based) on, all rows. The paper: 8 of 10.
        max_probe (`int`, *optional*, defaults to 1000): Items answered for `theta`, drawn anew for each epoch.
        min_change (`float`, *optional*, defaults to 0.05): What counts as progress; the paper gives no figure.
        shift (`float`, *optional*, defaults to 0.1): At least 0.
        num_samples, seed (`int`, *optional*): See [`MeasuringSampler`].

    Raises:
        ValueError: NaN difficulties, or an argument out of range.

    Example:
    ```python
    >>> sampler = AbilitySampler([-2.0, 0.0, 2.0], lambda model, rows: [1.0, 1.0, 0.0])
    >>> sampler.observe(0, [1.0, 1.0, 0.0])
    >>> round(sampler.history[0], 4), sorted(sampler)
    (0.3427, [0, 0, 1])
    ```
    """

    def __init__(
        self,
        difficulty: Tensor | Sequence[float],
        measure: Measure,
        *,
        lower: float = -float("inf"),
        upper: float = 0.0,
        min_rows: int = 1,
        full_from_epoch: int | None = None,
        max_probe: int = 1000,
        min_change: float = 0.05,
        shift: float = 0.1,
        num_samples: int | None = None,
        seed: int = 0,
    ) -> None:
        self.difficulty = clean_scores(difficulty, "difficulty")
        super().__init__(self.difficulty.numel(), measure, num_samples, seed)
        within_ability(self.difficulty, 0.0, lower=lower, upper=upper, min_rows=min_rows)  # checks the ranges
        self.lower, self.upper, self.min_rows = lower, upper, min_rows
        self.full_from_epoch = None if full_from_epoch is None else check_count("full_from_epoch", full_from_epoch, 0)
        self.max_probe = check_count("max_probe", max_probe)
        self.min_change = check_number("min_change", min_change, 0)
        self.shift = check_number("shift", shift, 0)
        #: Estimated ability before each epoch, without shifts.
        self.history: list[float] = []
        self.stagnant = 0
        self.shifted = 0.0

    def rows_to_measure(self, epoch: int) -> list[int]:
        if self.full_from_epoch is not None and epoch >= self.full_from_epoch:
            return []
        if self.num_rows <= self.max_probe:
            return list(range(self.num_rows))
        # Stream 1 of the epoch: the order of the epoch uses the stream (seed, epoch).
        drawn = torch.randperm(self.num_rows, generator=seeded(self.seed, epoch, 1))[: self.max_probe]
        return drawn.sort().values.tolist()

    def choose(self, epoch: int, rows: list[int], values: Tensor) -> Tensor:
        if not rows:
            return torch.ones(self.num_rows, dtype=torch.bool)
        ability = rasch_ability(values, self.difficulty[rows])
        if self.history and abs(ability - self.history[-1]) < self.min_change:
            self.stagnant += 1
        else:
            self.stagnant = 0
        if self.stagnant >= 2:
            self.shifted += self.shift
            self.stagnant = 0
        self.history.append(ability)
        return within_ability(
            self.difficulty, ability + self.shifted, lower=self.lower, upper=self.upper, min_rows=self.min_rows
        )

    def settings(self) -> dict[str, Any]:
        names = ("min_rows", "full_from_epoch", "max_probe", "min_change", "shift", "num_samples")
        band = {"lower": repr(self.lower), "upper": repr(self.upper)}  # JSON has no infinity
        return {"difficulty": self.difficulty, **band, **{name: getattr(self, name) for name in names}}

    def learned_state(self) -> dict[str, Any]:
        mine = {"history": list(self.history), "stagnant": self.stagnant, "shifted": self.shifted}
        return {**super().learned_state(), **mine}

    def load_learned_state(self, state: dict[str, Any]) -> None:
        super().load_learned_state(state)
        self.history, self.stagnant, self.shifted = list(state["history"]), state["stagnant"], state["shifted"]
