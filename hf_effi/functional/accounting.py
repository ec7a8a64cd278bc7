"""Where the time goes and what is forwarded: the arithmetic that trainers, run records and benchmarks share."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

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

    def settle(self) -> None:
        """Take in what has been timed by now: on the host's clock, everything."""

    def clear(self) -> None:
        """Forget the seconds; phases that are being timed go on."""
        self.seconds.clear()


class DeviceEvent(Protocol):
    """What is recorded in a stream of work, such as `torch.cuda.Event(enable_timing=True)`."""

    def record(self) -> None:
        """Mark this place in the stream."""

    def query(self) -> bool:
        """Return whether the device has come to it."""

    def elapsed_time(self, end: Any, /) -> float:
        """Return the milliseconds from this event to another."""


#: phase, the one around it, and the events at its two ends
_Timed = tuple[str, str | None, DeviceEvent, DeviceEvent]


class DevicePhaseClock(PhaseClock):
    """
    Seconds by phase as the device spends them, from events in its stream of work.

    The host only queues kernels: around them its own clock measures the queueing, and gives the work to whichever
    phase waits first. An event is reached when all work before it is done, so that work belongs to the phase that
    queued it, and what the host does alone (rewards) to the phase in which the device waits for it. Nothing is waited
    for: [`~DevicePhaseClock.settle`] takes in the outermost phases that the device has finished, with all inside of
    them, and leaves the others for the next time.

    Args:
        event (`Callable[[], DeviceEvent]`): Makes an event with timing.
    """

    def __init__(self, event: Callable[[], DeviceEvent]) -> None:
        super().__init__()
        self._event = event
        #: what was timed inside of the outermost phase, and then of each such phase that the device may not have done
        self._timed: list[_Timed] = []
        self._waiting: deque[list[_Timed]] = deque()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        outer = self._inside[-1] if self._inside else None
        self._inside.append(name)
        start = self._recorded()
        try:
            yield
        finally:
            self._inside.pop()
            self._timed.append((name, outer, start, self._recorded()))
            if outer is None:
                self._waiting.append(self._timed)
                self._timed = []

    def settle(self) -> None:
        # In one stream events are reached in the order in which they were recorded: the outermost phase ends last.
        while self._waiting and self._waiting[0][-1][3].query():
            for name, outer, start, end in self._waiting.popleft():
                spent = start.elapsed_time(end) / 1000
                self.seconds[name] += spent
                if outer is not None:
                    self.seconds[outer] -= spent

    def _recorded(self) -> DeviceEvent:
        event = self._event()
        event.record()
        return event


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
