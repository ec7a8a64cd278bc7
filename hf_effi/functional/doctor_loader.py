"""The rule for a run whose steps wait for their batches, and the clock that measures it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from .findings import Finding, RunFacts, Trace, TrainLimits, latest, step_of

#: keys of a trace, from [`LoaderClock`]
WAIT_FRACTION, WAIT_SECONDS = "data_wait_fraction", "data_wait_seconds"


@dataclass(frozen=True)
class LoaderWait:
    """
    What a [`LoaderClock`] measured.

    Args:
        fraction (`float`): Seconds between two updates over seconds between and in them, in `[0, 1]`.
        seconds (`float`): Seconds between two updates, the mean.
        updates (`int`): How many were measured.
    """

    fraction: float
    seconds: float
    updates: int


class LoaderClock:
    """
    Seconds from the end of an update to the begin of the next one, in which the Trainer fetches batches.

    Logging, evaluating and saving lie between two updates too: whoever uses the clock calls [`~LoaderClock.mark`] when
    they are over, and the time before it is left out; so are the seconds of others, of which `mark`, `begin_step` and
    `end_step` are told the sum so far. The first update after [`~LoaderClock.leave_out`] has no
    begin, and does not count: a pass over the data begins with starting the workers.

    Args:
        now (`Callable[[], float]`, *optional*, defaults to `time.perf_counter`): Seconds since any fixed moment.

    Example:
    ```python
    >>> clock = LoaderClock(now=iter([0.0, 3.0, 4.0, 6.0, 7.0]).__next__)
    >>> clock.mark()
    >>> clock.begin_step()
    >>> clock.end_step()
    >>> clock.begin_step()
    >>> clock.end_step()
    >>> clock.take()
    LoaderWait(fraction=0.7142857142857143, seconds=2.5, updates=2)
    >>> clock.take() is None
    True
    ```
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._from: float | None = None
        self._began: float | None = None
        self._others = 0.0
        self._waited = self._worked = self._between = 0.0
        self._updates = 0

    def mark(self, others: float = 0.0) -> None:
        """Begin to wait from now on: an update is over, or what came between."""
        self._from, self._others = self._now(), others

    def leave_out(self) -> None:
        """Do not count the next update."""
        self._from = None

    def begin_step(self, others: float = 0.0) -> None:
        """The batches of an update are there."""
        self._began = None if self._from is None else self._now()
        between = 0.0 if self._from is None or self._began is None else self._began - self._from
        self._between = max(0.0, between - (others - self._others))

    def end_step(self, others: float = 0.0) -> None:
        """The update is over."""
        self.mark(others)
        if self._began is not None and self._from is not None:
            self._waited += self._between
            self._worked += self._from - self._began
            self._updates += 1
        self._began = None

    def take(self) -> LoaderWait | None:
        """Return what was measured since the last call; `None` where no update was."""
        total, waited, updates = self._waited + self._worked, self._waited, self._updates
        self._waited = self._worked = 0.0
        self._updates = 0
        return LoaderWait(waited / total if total else 0.0, waited / updates, updates) if updates else None


def loader_waits(trace: Trace, facts: RunFacts, limits: TrainLimits) -> Finding | None:
    """
    Each step waits for its batch.

    Args:
        trace (`Sequence[Mapping]`): Log entries with `data_wait_fraction` and `data_wait_seconds`, of a
            [`LoaderClock`].

    Example:
    ```python
    >>> trace = [{"step": step, "data_wait_fraction": 0.6, "data_wait_seconds": 0.3} for step in range(1, 6)]
    >>> loader_waits(trace, RunFacts(max_steps=100), TrainLimits()).problem
    '60% of the time passes between two updates, 0.3 seconds for each, while the next batch is fetched'
    ```
    """
    fractions = latest(trace, WAIT_FRACTION, limits.waiting_logs)
    seconds = latest(trace, WAIT_SECONDS, limits.waiting_logs)
    if not fractions or not seconds or min(fractions) <= limits.waiting or min(seconds) <= limits.waiting_seconds:
        return None
    share, each = sum(fractions) / len(fractions), sum(seconds) / len(seconds)
    return Finding(
        "loader_waits",
        step_of(trace, facts),
        f"{share:.0%} of the time passes between two updates, {each:.2g} seconds for each, while the next batch is "
        "fetched",
        "set dataloader_num_workers to 2 or more (with dataloader_persistent_workers=True), take work out of the "
        "dataset and the collator (tokenise once: write_token_file and TokenBlocks), or read from a faster disk",
    )
