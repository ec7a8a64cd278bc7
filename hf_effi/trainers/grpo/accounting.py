"""Where the time of an update goes and what it forwards, logged under the names of `functional/metrics.py`."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from ...functional import metrics
from ...functional.accounting import DevicePhaseClock, PhaseClock
from ...functional.rollouts import slowest_over_mean

#: summed over the ranks, in this order
COUNTERS = (
    metrics.TOKENS_FORWARD,
    metrics.TOKENS_REAL,
    metrics.TOKENS_SAVED,
    metrics.ROWS_GENERATED,
    metrics.ROWS_TRAINED,
    metrics.ROWS_MOVED,
    metrics.PREFILL_TOKENS_SAVED,
    metrics.DECODE_ROWS,
    metrics.DECODE_ROWS_SAVED,
    metrics.HYBRID_SFT_TOKENS,
    metrics.HYBRID_SFT_LOSS,
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
        nll (`float`): Negative log-likelihood of the demonstrations so far.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.clock = phase_clock(device)
        self.counts: Counter[str] = Counter()
        self.nll = 0.0
        #: tokens that this rank has forwarded with a gradient, in each micro-step of the update
        self._costs: list[int] = [0]

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
        if torch.is_grad_enabled():
            self._costs[-1] += forwarded

    def end_micro_step(self) -> None:
        """What is counted from here on belongs to another micro-step of the update."""
        self._costs.append(0)

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
        sums = {**self.counts, metrics.HYBRID_SFT_LOSS: self.nll}
        mine = [sums.get(name, 0) for name in COUNTERS] + self._costs
        ranks = torch.tensor([mine], dtype=torch.float64, device=accelerator.device)
        if accelerator.num_processes > 1:
            ranks = accelerator.gather(ranks)  # an update has as many micro-steps on every rank
        totals = dict(zip(COUNTERS, ranks.sum(0).tolist(), strict=False))
        for name in (metrics.TOKENS_FORWARD, metrics.TOKENS_REAL, metrics.TOKENS_SAVED):
            log[name].append(totals[name])
        if accelerator.num_processes > 1:
            log[metrics.ROWS_MOVED].append(totals[metrics.ROWS_MOVED])
            # The ranks of a sequence-parallel group that forward another one's rows count nothing.
            of_update, of_steps = slowest_over_mean([r for r in ranks[:, len(COUNTERS) :].tolist() if any(r)])
            log[metrics.RANK_COST_SLOWEST_OVER_MEAN].append(of_update)
            log[metrics.MICRO_STEP_COST_SLOWEST_OVER_MEAN].append(of_steps)
        if real := totals[metrics.TOKENS_REAL]:
            log[metrics.PAD_RATIO].append(1 - real / max(totals[metrics.TOKENS_FORWARD], 1))
        if generated := totals[metrics.ROWS_GENERATED]:
            log[metrics.ROWS_GENERATED].append(generated)
            log[metrics.ROWS_TRAINED].append(totals[metrics.ROWS_TRAINED])
            log[metrics.EFFECTIVE_RATIO].append(totals[metrics.ROWS_TRAINED] / generated)
        if totals[metrics.DECODE_ROWS]:
            for name in (metrics.PREFILL_TOKENS_SAVED, metrics.DECODE_ROWS, metrics.DECODE_ROWS_SAVED):
                log[name].append(totals[name])
        if tokens := totals[metrics.HYBRID_SFT_TOKENS]:
            log[metrics.HYBRID_SFT_TOKENS].append(tokens)
            log[metrics.HYBRID_SFT_LOSS].append(totals[metrics.HYBRID_SFT_LOSS] / tokens)
        self.clock.clear()
        self.counts.clear()
        self.nll = 0.0
        self._costs = [0]
