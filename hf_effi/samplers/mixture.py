"""Domain mixtures that change during the run, and replay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

from torch import Tensor

from ..functional.data import as_labels, check_count, check_number, mixture_order
from ..functional.data.mixing import Waypoints
from ..functional.kept_arguments import keeps_arguments
from .base import EffiSampler


class MixtureSampler(EffiSampler):
    """
    Serve domains in shares that depend on progress; every block has its composition to the sample.

    The plan covers the whole run in one epoch: set `num_train_epochs=1`. With `block` equal to the global batch size
    (batch a device x devices x accumulation) each update has the exact shares.

    Args:
        domains (`Sequence[Hashable]`): Domain of each row of the training dataset.
        waypoints (`Sequence[tuple[float, Mapping]]`): `(progress, weights)`; the first at progress 0. To upsample a
            domain at the end of training: `[(0.0, {"web": 9, "math": 1}), (0.85, {"web": 3, "math": 7})]`.
        block (`int`): Samples over which the shares are exact.
        num_samples (`int`, *optional*): Samples of the run; the number of rows if `None`.
        smooth (`bool`, *optional*, defaults to `False`): Move linearly from one way-point to the next.
        in_order (`bool`, *optional*, defaults to `False`): Rows of a domain in dataset order.
        seed (`int`, *optional*, defaults to 0): Seed of all shuffles.

    Raises:
        ValueError: a domain with weight but without rows, or an argument out of range.

    Example:
    ```python
    >>> mixes = [(0.0, {"web": 1}), (0.5, {"math": 1})]
    >>> sampler = MixtureSampler(["web"] * 4 + ["math"] * 2, mixes, block=2, num_samples=8)
    >>> sorted(set(list(sampler)[:4])), sorted(set(list(sampler)[4:])), sampler.passes()
    ([0, 1, 2, 3], [4, 5], {'web': 1.0, 'math': 2.0})
    ```
    """

    learns = False
    single_pass = True

    @keeps_arguments
    def __init__(
        self,
        domains: Sequence[Hashable],
        waypoints: Waypoints,
        *,
        block: int,
        num_samples: int | None = None,
        smooth: bool = False,
        in_order: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(len(domains), seed)
        self.num_samples = self.num_rows if num_samples is None else check_count("num_samples", num_samples)
        self.domains = list(as_labels(domains))
        self._order = mixture_order(
            self.domains, waypoints, self.num_samples, block=block, smooth=smooth, in_order=in_order, seed=seed
        )

    def __len__(self) -> int:
        return self.num_samples

    def order(self, epoch: int) -> Tensor:
        return self._order

    def settings(self) -> dict[str, Any]:
        return {"order": self._order}

    def passes(self) -> dict[Hashable, float]:
        """Return how many times the plan goes through each domain; much above 4 is often called too much."""
        size = Counter(self.domains)
        served = Counter(self.domains[row] for row in self._order.tolist())
        return {name: served[name] / size[name] for name in size}


class ReplaySampler(MixtureSampler):
    """
    Mix a set share of old rows into every block while training on new ones: replay for continual pre-training.

    The run is as long as it takes to go through the new rows once, unless `num_samples` says otherwise.

    Args:
        is_old (`Sequence[bool]`): Whether a row belongs to the old data.
        rate (`float`): Share of old rows, in `(0, 1)`. The study: 0.05 for a weak shift, 0.25 for a strong one; 0.01
            already recovers most.
        block (`int`): Such as the global batch size; the shares are exact over it.
        num_samples (`int`, *optional*): Samples of the run; `round(new rows / (1 - rate))` if `None`.
        in_order (`bool`, *optional*, defaults to `True`): Old and new rows each in dataset order, as in the study.
        seed (`int`, *optional*, defaults to 0): Seed of the places inside a block.

    Raises:
        ValueError: a rate outside `(0, 1)`, or no old or no new row.

    Example:
    ```python
    >>> sampler = ReplaySampler([True] * 3 + [False] * 6, rate=0.25, block=4)
    >>> len(sampler), [sum(row < 3 for row in list(sampler)[i : i + 4]) for i in (0, 4)]
    (8, [1, 1])
    ```
    """

    @keeps_arguments
    def __init__(
        self,
        is_old: Sequence[bool],
        rate: float,
        *,
        block: int,
        num_samples: int | None = None,
        in_order: bool = True,
        seed: int = 0,
    ) -> None:
        check_number("rate", rate, 0, 1, open_low=True, open_high=True)
        domains = ["old" if old else "new" for old in is_old]
        if num_samples is None:
            num_samples = max(1, round(domains.count("new") / (1 - rate)))
        shares: list[tuple[float, dict[Hashable, float]]] = [(0.0, {"old": rate, "new": 1 - rate})]
        super().__init__(domains, shares, block=block, num_samples=num_samples, in_order=in_order, seed=seed)
