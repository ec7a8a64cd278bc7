"""The clock of the loader, by hand: what is counted, and what is left out."""

from __future__ import annotations

import pytest

from hf_effi.functional.doctor_loader import LoaderClock, LoaderWait


class Hand:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.at = 0.0

    def __call__(self) -> float:
        return self.at


@pytest.fixture
def hand() -> Hand:
    return Hand()


@pytest.fixture
def clock(hand) -> LoaderClock:
    return LoaderClock(now=hand)


def update(clock: LoaderClock, hand: Hand, wait: float, work: float) -> None:
    hand.at += wait
    clock.begin_step()
    hand.at += work
    clock.end_step()


def test_nothing_was_measured(clock):
    assert clock.take() is None
    clock.mark()
    assert clock.take() is None


def test_the_first_update_has_no_begin_and_does_not_count(clock, hand):
    update(clock, hand, 100.0, 100.0)
    assert clock.take() is None
    update(clock, hand, 1.0, 3.0)
    update(clock, hand, 2.0, 2.0)
    assert clock.take() == LoaderWait(fraction=3 / 8, seconds=1.5, updates=2)
    assert clock.take() is None


def test_what_comes_between_is_left_out_by_a_mark(clock, hand):
    update(clock, hand, 0.0, 1.0)
    hand.at += 50.0  # an evaluation
    clock.mark()
    update(clock, hand, 1.0, 1.0)
    assert clock.take() == LoaderWait(0.5, 1.0, 1)


def test_the_begin_of_a_pass_is_left_out_also_after_a_mark(clock, hand):
    update(clock, hand, 0.0, 1.0)
    clock.leave_out()
    update(clock, hand, 70.0, 1.0)
    assert clock.take() is None
    update(clock, hand, 0.0, 2.0)
    assert clock.take() == LoaderWait(0.0, 0.0, 1)


def test_an_update_without_an_end_does_not_count(clock, hand):
    clock.mark()
    hand.at = 1.0
    clock.begin_step()
    hand.at = 5.0
    clock.begin_step()
    hand.at = 6.0
    clock.end_step()
    clock.end_step()
    assert clock.take() == LoaderWait(5 / 6, 5.0, 1)


def test_no_time_at_all(clock, hand):
    clock.mark()
    update(clock, hand, 0.0, 0.0)
    assert clock.take() == LoaderWait(0.0, 0.0, 1)


def test_what_others_measure_between_two_updates_is_no_waiting():
    clock = LoaderClock(now=iter([0.0, 10.0, 11.0, 13.0, 14.0]).__next__)
    clock.mark(5.0)
    clock.begin_step(14.0)  # 9 of the 10 seconds were a measurement
    clock.end_step(20.0)  # what came after the begin of the update is not taken off again
    clock.begin_step(20.0)
    clock.end_step(20.0)
    found = clock.take()
    assert (found.seconds, found.updates) == (1.5, 2) and found.fraction == 3 / 5
