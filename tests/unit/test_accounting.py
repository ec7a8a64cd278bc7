"""`PhaseClock`, `count_tokens` and `StepAccounting`, without a trainer."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_effi.functional import metrics
from hf_effi.functional.accounting import DevicePhaseClock, PhaseClock, count_tokens
from hf_effi.trainers.grpo.accounting import COUNTERS, StepAccounting, phase_clock


def clock(*times: float) -> PhaseClock:
    return PhaseClock(now=iter(times).__next__)


def test_a_phase_inside_another_is_taken_from_it_also_twice_over() -> None:
    found = clock(0, 1, 2, 5, 7, 10)
    with found.phase("a"), found.phase("b"), found.phase("c"):
        pass
    assert dict(found.seconds) == {"c": 3, "b": 3, "a": 4}  # together the 10 seconds of the outermost


def test_a_phase_inside_of_itself_counts_once() -> None:
    found = clock(0, 2, 3, 9)
    with found.phase("a"), found.phase("a"):
        pass
    assert found.seconds["a"] == 9


def test_a_phase_that_fails_is_left() -> None:
    found = clock(0, 4, 10, 11)
    with pytest.raises(ZeroDivisionError), found.phase("a"):
        1 / 0  # noqa: B018
    with found.phase("b"):
        pass
    assert dict(found.seconds) == {"a": 4, "b": 1}


def test_laps_leave_no_gap() -> None:
    found = clock(100, 103, 104, 110)
    found.start()
    for name in ("data", "train", "data"):
        found.lap(name)
    assert dict(found.seconds) == {"data": 9, "train": 1}
    found.clear()
    assert not found.seconds


def test_tokens_without_a_mask_are_all_real() -> None:
    ids = torch.ones(2, 3, dtype=torch.long)
    assert count_tokens(ids, None) == (6, 6)
    assert count_tokens(ids, torch.ones(1, 1, 3, 3)) == (6, 6)  # of another shape: no mask of padding
    forwarded, real = count_tokens(ids, torch.tensor([[0, 1, 1], [0, 0, 1]]))
    assert forwarded == 6 and int(real) == 3


def flushed(accounting: StepAccounting, ranks: int = 1) -> dict[str, Any]:
    log: dict[str, list[float]] = defaultdict(list)
    accelerator = SimpleNamespace(
        num_processes=ranks, device=torch.device("cpu"), gather=lambda counts: counts.repeat(ranks, 1)
    )
    accounting.flush(log, accelerator)
    return {name: value for name, (value,) in log.items()}


def test_an_update_is_logged_and_forgotten() -> None:
    accounting = StepAccounting()
    accounting.count_forward(real=6, forwarded=8, saved=4)
    accounting.count_forward(real=3, forwarded=4, saved=0)
    accounting.counts[metrics.ROWS_GENERATED] += 8
    accounting.counts[metrics.ROWS_TRAINED] += 6
    accounting.clock.seconds["gen"] += 1.5
    found = flushed(accounting, ranks=2)
    assert found == {
        "effi/time_gen": 1.5,
        "effi/time_reward": 0.0,
        "effi/time_logp": 0.0,
        "effi/time_train": 0.0,
        "effi/tokens_forward": 24.0,
        "effi/tokens_real": 18.0,
        "effi/tokens_saved": 8.0,
        "effi/pad_ratio": 0.25,
        "effi/rows_generated": 16.0,
        "effi/rows_trained": 12.0,
        "effi/rows_moved": 0.0,
        "effi/rank_cost_slowest_over_mean": 1.0,
        "effi/micro_step_cost_slowest_over_mean": 1.0,
        "effi/effective_ratio": 0.75,
    }
    assert not accounting.counts and not accounting.clock.seconds


def test_waiting_is_counted_at_the_update_and_at_its_micro_steps() -> None:
    accounting = StepAccounting()
    for tokens in (30, 10):
        accounting.count_forward(real=tokens, forwarded=tokens, saved=0)
        accounting.end_micro_step()
    with torch.no_grad():
        accounting.count_forward(real=500, forwarded=500, saved=0)  # log-probs, at which all ranks wait anyhow
    log: dict[str, list[float]] = defaultdict(list)
    width = len(COUNTERS)  # they go before
    other = torch.tensor([[0.0] * width + [10.0, 20.0, 0.0]], dtype=torch.float64)
    accelerator = SimpleNamespace(
        num_processes=2, device=torch.device("cpu"), gather=lambda mine: torch.cat([mine, other])
    )
    accounting.flush(log, accelerator)
    assert log[metrics.RANK_COST_SLOWEST_OVER_MEAN] == [40 / 35]
    assert log[metrics.MICRO_STEP_COST_SLOWEST_OVER_MEAN] == [(30 + 20) / (20 + 15)]
    assert log[metrics.TOKENS_FORWARD] == [540.0]


def test_an_update_that_neither_generates_nor_forwards_has_no_ratios() -> None:
    names = set(flushed(StepAccounting()))
    assert not names & {metrics.PAD_RATIO, metrics.EFFECTIVE_RATIO, metrics.ROWS_GENERATED}
    assert metrics.TOKENS_FORWARD in names


class Stream:
    """A host and a device with one stream of work, each with a time of its own, in seconds."""

    def __init__(self) -> None:
        self.host = self.device = 0.0

    def works(self, seconds: float) -> None:
        """The host does something itself."""
        self.host += seconds

    def queues(self, seconds: float) -> None:
        """The host queues a kernel, which takes no time of its own."""
        self.device = max(self.device, self.host) + seconds

    def waits(self) -> None:
        """The host reads a result."""
        self.host = max(self.host, self.device)

    def event(self) -> Any:
        stream = self

        class Event:
            def record(self) -> None:
                self.time = max(stream.device, stream.host)
                stream.device = self.time

            def query(self) -> bool:
                return stream.host >= self.time

            def elapsed_time(self, end: Any) -> float:
                return 1000 * (end.time - self.time)

        return Event()


def one_update(stream: Stream, clock: PhaseClock) -> None:
    """A training step that generates for 5 s, lets a reward work for 2 s, and queues 3 s of training."""
    with clock.phase("train"):
        with clock.phase("gen"):
            stream.queues(5.0)
        with clock.phase("reward"):
            stream.waits()  # for the completions
            stream.works(2.0)
        stream.queues(3.0)


def test_work_belongs_to_the_phase_that_queued_it_and_not_to_the_one_that_waits() -> None:
    stream = Stream()
    host, device = PhaseClock(lambda: stream.host), DevicePhaseClock(stream.event)
    one_update(stream, device)
    device.settle()
    # The device is still training: what it has not finished is not waited for.
    assert stream.host == 7.0 and stream.device == 10.0 and not device.seconds
    stream.waits()
    device.settle()
    assert dict(device.seconds) == {"gen": 5.0, "reward": 2.0, "train": 3.0}
    stream.__init__()
    one_update(stream, host)
    assert dict(host.seconds) == {"gen": 0.0, "reward": 7.0, "train": 0.0}  # what the host's clock makes of it


def test_a_phase_that_the_device_has_not_finished_counts_in_a_later_update() -> None:
    stream = Stream()
    clock = DevicePhaseClock(stream.event)
    for _ in range(3):
        one_update(stream, clock)
        stream.works(0.5)
    clock.settle()
    assert stream.device > stream.host and clock.seconds["train"] < 9.0
    assert dict(clock.seconds) == {"gen": 10.0, "reward": 4.0, "train": 6.0}
    stream.waits()
    clock.settle()
    assert dict(clock.seconds) == {"gen": 15.0, "reward": 6.0, "train": 9.0}


def test_the_clock_of_a_device() -> None:
    assert type(phase_clock(None)) is type(phase_clock(torch.device("cpu"))) is PhaseClock
    assert isinstance(phase_clock(torch.device("cuda")), DevicePhaseClock)
