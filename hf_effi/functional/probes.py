"""Which updates of a run are probes: tried and undone, so that they are no part of the training."""

from __future__ import annotations

import contextlib
import weakref
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from ..errors import BrokenFileError
from . import metrics

if TYPE_CHECKING:  # the command line reads records without it
    from torch import nn

#: key of the probes so far in `TrainerState.stateful_callbacks`, which every checkpoint stores as JSON
PROBES_KEY = "hf_effi.probes"

_PROBED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@dataclass(frozen=True)
class ProbePlan:
    """
    The probing updates of a run, in blocks of probes that follow each other.

    Updates count from 1, as `TrainerState.global_step` does once an update is finished. The weights after the last
    update of each single probe are those before its first one.

    Args:
        blocks (`tuple[tuple[int, int, int], ...]`): First update, last update, and updates of one probe, for each
            search; ascending, not touching each other's updates.

    Raises:
        ValueError: blocks that overlap, are empty or begin before update 1.

    Example:
    ```python
    >>> plan = ProbePlan(((3, 6, 2),))  # two probes of two updates each, after two updates of training
    >>> [plan.is_probe(update) for update in range(1, 8)]
    [False, False, True, True, True, True, False]
    >>> [plan.trained(update) for update in range(1, 8)]
    [1, 2, 2, 2, 2, 2, 3]
    >>> [plan.undone(update) for update in range(1, 8)]
    [True, True, False, True, False, True, True]
    ```
    """

    blocks: tuple[tuple[int, int, int], ...] = ()

    def __post_init__(self) -> None:
        end = 0
        for first, last, length in self.blocks:
            if first <= end or last < first or length < 1:
                raise ValueError(
                    f"A block of probes from update {first} to {last}, {length} each, after update {end}: blocks must "
                    "ascend without overlap, and a probe has at least one update."
                )
            end = last

    @cached_property
    def _firsts(self) -> tuple[int, ...]:
        """The first update of each block."""
        return tuple(first for first, _, _ in self.blocks)

    @cached_property
    def _counts(self) -> tuple[int, ...]:
        """How many probes there are before each block, and after the last."""
        return tuple(accumulate((last - first + 1 for first, last, _ in self.blocks), initial=0))

    def is_probe(self, update: int) -> bool:
        """Return whether this update is tried and undone."""
        return self.block_of(update) is not None

    def undone(self, update: int) -> bool:
        """Return whether the weights after this update are those of training: it is no probe, or the last of one."""
        block = self.block_of(update)
        return block is None or (update - block[0] + 1) % block[2] == 0

    def probes(self, update: int) -> int:
        """Return how many of the updates 1 to `update` are probes."""
        index = bisect_right(self._firsts, update)
        return self._counts[index] - max(0, self.blocks[index - 1][1] - update) if index else 0

    def trained(self, update: int) -> int:
        """Return how many of the updates 1 to `update` are training."""
        return update - self.probes(update)

    def update_of(self, trained: int) -> int:
        """Return the update that is number `trained` (from 1) of those of training."""
        update = trained
        for first, last, _ in self.blocks:
            if update < first:
                break
            update += last - first + 1
        return update

    def until(self, update: int) -> ProbePlan:
        """Return the plan up to an update, as far as it got in the block it lies in."""
        return ProbePlan(tuple((a, min(b, update), n) for a, b, n in self.blocks if a <= update))

    def block_of(self, update: int) -> tuple[int, int, int] | None:
        """Return the block that an update lies in, `None` for an update of training."""
        index = bisect_right(self._firsts, update)
        return self.blocks[index - 1] if index and update <= self.blocks[index - 1][1] else None


def stored_plan(stateful_callbacks: Mapping[str, Any]) -> ProbePlan:
    """
    Return the probes so far from what a checkpoint stores; none where no search ran.

    Raises:
        BrokenFileError: what is stored is no list of blocks.
    """
    try:
        return ProbePlan(tuple(tuple(block) for block in stateful_callbacks.get(PROBES_KEY, {}).get("blocks", ())))
    except (TypeError, AttributeError, ValueError) as error:
        raise BrokenFileError(
            f"The checkpoint's {PROBES_KEY!r} is damaged: it holds no list of ascending blocks of three numbers."
        ) from error


def without_probes(log_history: Iterable[Mapping[str, Any]]) -> list[Any]:
    """
    Return the log entries of training, without those of probes.

    Example:
    ```python
    >>> without_probes([{"step": 1, "loss": 9.0, "effi/probe": 1.0}, {"step": 2, "loss": 2.0}])
    [{'step': 2, 'loss': 2.0}]
    ```
    """
    return [entry for entry in log_history if metrics.PROBE not in entry]


@contextlib.contextmanager
def probing_model(model: nn.Module) -> Iterator[None]:
    """Mark a model and its parts while updates are tried on it outside of a Trainer's loop, for the hooks on it."""
    marked: Sequence[nn.Module] = [module for module in model.modules() if module not in _PROBED]
    _PROBED.update(marked)
    try:
        yield
    finally:
        _PROBED.difference_update(marked)


def is_probed(module: nn.Module) -> bool:
    """Return whether [`probing_model`] holds this module."""
    return module in _PROBED
