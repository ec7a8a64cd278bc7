"""Where the time goes and what is forwarded: the arithmetic that trainers, run records and benchmarks share."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line reads records without it
    from torch import Tensor


class PhaseClock:
    """
    Seconds by phase. Each second belongs to one phase: what runs inside another phase is taken from that one.

    Args:
        now (`Callable[[], float]`, *optional*, defaults to `time.perf_counter`): Seconds since any fixed moment.

    Attributes:
        seconds (`dict[str, float]`): Phase -> seconds so far; 0 of one that was not entered.

    Example:
    ```python
    >>> clock = PhaseClock(now=iter([0.0, 1.0, 4.0, 6.0]).__next__)
    >>> with clock.phase("train"):
    ...     with clock.phase("generate"):
    ...         pass
    >>> dict(clock.seconds)
    {'generate': 3.0, 'train': 3.0}
    ```
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._now = now
        self._inside: list[str] = []
        self._lap_began = 0.0

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the seconds spent inside to this phase, and take them from the phase around it."""
        outer = self._inside[-1] if self._inside else None
        self._inside.append(name)
        start = self._now()
        try:
            yield
        finally:
            spent = self._now() - start
            self._inside.pop()
            self.seconds[name] += spent
            if outer is not None:
                self.seconds[outer] -= spent

    def start(self) -> None:
        """Begin a lap."""
        self._lap_began = self._now()

    def lap(self, name: str) -> None:
        """Add the seconds since the last lap ended, or [`start`], to this phase."""
        now = self._now()
        self.seconds[name] += now - self._lap_began
        self._lap_began = now

    def clear(self) -> None:
        """Forget the seconds; phases that are being timed go on."""
        self.seconds.clear()


def count_tokens(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[int, Tensor | int]:
    """
    Count what a forward is given.

    Args:
        input_ids (`torch.Tensor`): Token ids of any shape.
        attention_mask (`torch.Tensor`, *optional*): Of that shape, 0 on padding; any other mask says nothing of
            padding.

    Returns:
        `tuple`: All tokens, and those that are no padding: a tensor without dimensions, on the device, where there is
            a
        mask.

    Example:
    ```python
    >>> count_tokens(torch.tensor([[7, 8, 0], [9, 0, 0]]), torch.tensor([[1, 1, 0], [1, 0, 0]]))
    (6, tensor(3))
    ```
    """
    if attention_mask is None or attention_mask.shape != input_ids.shape:
        return input_ids.numel(), input_ids.numel()
    return input_ids.numel(), attention_mask.detach().ne(0).sum()
