"""Where the time of an update goes and what it forwards, logged under the names of `functional/metrics.py`."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from ...functional import metrics
from ...functional.accounting import DevicePhaseClock, PhaseClock

#: summed over the ranks, in this order
COUNTERS = (
    metrics.TOKENS_FORWARD,
    metrics.TOKENS_REAL,
    metrics.TOKENS_SAVED,
    metrics.ROWS_GENERATED,
    metrics.ROWS_TRAINED,
    metrics.ROWS_MOVED,
)


def phase_clock(device: torch.device | None) -> PhaseClock:
    """Return a clock of the phases on a device, from its events where it has a stream of work."""
    if device is None or device.type in ("cpu", "mps", "meta"):  # MPS has no events that one can time and ask
        return PhaseClock()
    return DevicePhaseClock(lambda: torch.Event(device.type, enable_timing=True))


class StepAccounting:
    """
    The seconds and counts of one update of this rank.

    On an accelerator the seconds are those of the device ([`DevicePhaseClock`]): what it has not finished when an
    update ends is counted with the next one.

    Args:
        device (`torch.device`, *optional*): Where the model is; the host's clock without it.

    Attributes:
        clock ([`PhaseClock`]): Of the phases of `functional/metrics.py`.
        counts (`Counter`): Name of a metric, of `COUNTERS` -> number so far.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.clock = phase_clock(device)
        self.counts: Counter[str] = Counter()

    def count_forward(self, real: int, forwarded: int, saved: int) -> None:
        """
        Count one forward for log-probs.

        Args:
            real (`int`): Tokens that are no padding.
            forwarded (`int`): Tokens with their padding.
            saved (`int`): Tokens that stock would have forwarded beside them.
        """
        self.counts[metrics.TOKENS_REAL] += real
        self.counts[metrics.TOKENS_FORWARD] += forwarded
        self.counts[metrics.TOKENS_SAVED] += saved

    def flush(self, log: dict[str, list[float]], accelerator: Any) -> None:
        """
        Log the update that has ended and begin the next. Once for each update, on every rank.

        Args:
            log (`dict[str, list[float]]`): TRL's `_metrics["train"]`.
            accelerator (`Accelerator`): Adds up the counts of all ranks.
        """
        self.clock.settle()
        for phase in metrics.PHASES:
            log[metrics.TIME + phase].append(self.clock.seconds[phase])
        counts = torch.tensor([self.counts[name] for name in COUNTERS], dtype=torch.float64, device=accelerator.device)
        if accelerator.num_processes > 1:
            counts = accelerator.reduce(counts, reduction="sum")
        totals = dict(zip(COUNTERS, counts.tolist(), strict=True))
        for name in (metrics.TOKENS_FORWARD, metrics.TOKENS_REAL, metrics.TOKENS_SAVED):
            log[name].append(totals[name])
        if accelerator.num_processes > 1:
            log[metrics.ROWS_MOVED].append(totals[metrics.ROWS_MOVED])
        if real := totals[metrics.TOKENS_REAL]:
            log[metrics.PAD_RATIO].append(1 - real / max(totals[metrics.TOKENS_FORWARD], 1))
        if generated := totals[metrics.ROWS_GENERATED]:
            log[metrics.ROWS_GENERATED].append(generated)
            log[metrics.ROWS_TRAINED].append(totals[metrics.ROWS_TRAINED])
            log[metrics.EFFECTIVE_RATIO].append(totals[metrics.ROWS_TRAINED] / generated)
        self.clock.clear()
        self.counts.clear()
