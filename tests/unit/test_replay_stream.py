"""Replay from streams, and the stability gap, by hand."""

from __future__ import annotations

import itertools
import math

import pytest
from datasets import Dataset

from hf_effi.data import ReplayStream
from hf_effi.errors import MismatchError, RefusedError
from hf_effi.functional.data import measure_gap, replayed

NEW, OLD = list(range(1, 1001)), [-1, -2, -3]


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.05, 0.25, 0.3, 1.0])
def test_the_share_of_old_rows(fraction):
    """Drawn one by one: within four standard deviations. In blocks: exact over them, to one row in all."""
    drawn = sum(replayed(place, fraction, 3) for place in range(4000))
    assert abs(drawn - 4000 * fraction) <= 4 * math.sqrt(4000 * fraction * (1 - fraction))
    for block in (1, 7, 40):
        places = [replayed(place, fraction, 3, block) for place in range(1000 // block * block)]
        assert sum(places) == int(len(places) * fraction)
        per_block = (
            {sum(part) for part in itertools.batched(places, block)} if hasattr(itertools, "batched") else set()
        )
        assert len(per_block) <= 2


def test_the_stream():
    stream = ReplayStream(NEW, OLD, 0.25, seed=1)
    rows = list(stream)
    assert rows == list(stream) == list(ReplayStream(NEW, OLD, 0.25, seed=1))  # also for another process
    assert [row for row in rows if row > 0] == NEW
    replay = [row for row in rows if row < 0]
    assert replay == [OLD[i % 3] for i in range(len(replay))]
    assert rows != list(ReplayStream(NEW, OLD, 0.25, seed=2))
    stream.set_epoch(1)
    assert list(stream) != rows
    assert list(ReplayStream(NEW, [], 0.0)) == NEW and list(ReplayStream([], OLD, 0.0)) == []


@pytest.mark.parametrize("place", [0, 1, 7, 400])
def test_a_stored_place_goes_on(place):
    whole = list(ReplayStream(NEW, OLD, 0.3, seed=5, block=8))
    first, second = (ReplayStream(NEW, OLD, 0.3, seed=5, block=8) for _ in range(2))
    begun = list(itertools.islice(first, place))
    second.load_state_dict(first.state_dict())
    assert begun + list(second) == whole
    assert list(second) == whole  # the pass after it begins at the beginning
    with pytest.raises(MismatchError, match="'seed': 5"):
        ReplayStream(NEW, OLD, 0.3, seed=6, block=8).load_state_dict(first.state_dict())


def test_shuffled_streams_get_their_epoch():
    old = Dataset.from_dict({"x": list(range(8))}).to_iterable_dataset().shuffle(seed=1, buffer_size=8)
    stream = ReplayStream([{"x": -1}] * 24, old, 0.5)
    passes = [row["x"] for row in stream if row["x"] >= 0][:16]
    assert sorted(passes[:8]) == sorted(passes[8:]) == list(range(8)) and passes[:8] != passes[8:]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((NEW, OLD, 1.0), "fraction=1 leaves no place"),
        ((NEW, OLD, -0.1), "fraction=-0.1"),
        ((iter(NEW), OLD, 0.1), "new is a list_iterator"),
        ((NEW, 5, 0.1), "old is a int"),
    ],
)
def test_what_a_stream_refuses(given, message):
    with pytest.raises(ValueError, match=message):
        ReplayStream(*given)


def test_more_refusals(monkeypatch):
    with pytest.raises(ValueError, match="block"):
        ReplayStream(NEW, OLD, 0.1, block=0)
    with pytest.raises(ValueError, match="index=-1"):
        replayed(-1, 0.5)
    with pytest.raises(RefusedError, match="old has no row"):
        list(ReplayStream(NEW, [], 0.5))
    workers = type("Info", (), {"num_workers": 2})
    monkeypatch.setattr("hf_effi.data.replay_stream.get_worker_info", lambda: workers)
    with pytest.raises(RefusedError, match="dataloader_num_workers=2"):
        list(ReplayStream(NEW, OLD, 0.5))


@pytest.mark.parametrize(
    ("values", "over", "expected"),
    [
        ([2.0, 2.25, 2.5, 2.0, 1.5], {}, (0.5, 0.0, 10, 20, 30, 20)),
        ([2.0], {}, (0.0, 0.0, None, 0, None, 0)),
        ([2.0, 2.0, 2.0], {}, (0.0, 0.0, None, 0, None, 0)),  # all equal
        ([2.0, 1.5, 1.0], {}, (0.0, 0.0, None, 0, None, 0)),  # no dip
        ([2.0, 2.5, 3.0], {}, (1.0, 1.0, 10, 20, None, 10)),  # has not come back
        ([2.0, 3.0, 1.0, 2.5, 1.0], {}, (1.0, 0.0, 10, 10, 20, 10)),  # the deeper one of two
        ([2.0, 2.5, 1.0, 3.0, 2.5], {}, (1.0, 0.5, 30, 30, None, 10)),
        ([2.0, 2.1, 2.5, 2.1, 2.0], {"tolerance": 0.25}, (0.5, 0.0, 20, 20, 30, 10)),
        ([2.0, 2.1, 2.2], {"tolerance": 0.25}, (pytest.approx(0.2), pytest.approx(0.2), None, 20, None, 0)),
        ([0.5, 0.25, 0.5], {"higher_is_better": True}, (0.25, 0.0, 10, 10, 20, 10)),
    ],
)
def test_depth_and_duration_of_a_dip(values, over, expected):
    steps = [10 * number for number in range(len(values))]
    gap = measure_gap(steps, values, **{"higher_is_better": False, **over})
    assert (gap.depth, gap.behind, gap.began, gap.lowest, gap.recovered, gap.duration) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (([0, 0], [1.0, 1.0]), "must rise"),
        (([0], [1.0, 1.0]), "one for each of the 2 values"),
        (([], []), "finite numbers"),
        (([0], [math.nan]), "finite numbers"),
        (([0], [1.0], True, -0.1), "tolerance=-0.1"),
    ],
)
def test_what_a_gap_refuses(given, message):
    with pytest.raises(ValueError, match=message):
        measure_gap(*given)
