"""What all prompt selectors promise: exclusion, exploration, small datasets, state, and errors that name the fix."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hf_effi.errors import MismatchError
from hf_effi.functional.rollouts import draw_uniform, round_at_random, smallest_rows
from hf_effi.protocols import PromptSelector
from hf_effi.selection import DUMP, GRESO, AdaRFT, MoPPS, OfflineCurriculum
from hf_effi.selection._history import StepTotals
from tests.helpers.prompt_selectors import Simulated, context_of, groups_of

NAN = math.nan
RATES = [0.0, 0.125, 0.25, 0.5, 0.5, 0.625, 0.75, 1.0, 1.0, 0.0]
SOURCES = list("aabbccabca")
MAKE: dict[str, Callable[..., Any]] = {
    "GRESO": lambda **over: GRESO(10, **over),
    "MoPPS": lambda **over: MoPPS(10, **{"candidates": 2.0, **over}),
    "BOTS": lambda **over: MoPPS(
        10, forget=0.1, rho=0.1, weak=[0.0] * 10, strong=[0.1 * i for i in range(10)], **over
    ),
    "DUMP": lambda **over: DUMP(SOURCES, **over),
    "SEC": lambda **over: DUMP(RATES, bins=3, bonus=0.0, **over),
    "AdaRFT": lambda **over: AdaRFT([1 - rate for rate in RATES], **over),
    "OfflineCurriculum": lambda **over: OfflineCurriculum(RATES, start=0.3, **over),
}
COUNTED = ("GRESO", "MoPPS", "BOTS", "AdaRFT")


@pytest.fixture(params=MAKE)
def make(request: Any) -> Callable[..., Any]:
    return MAKE[request.param]


def test_it_is_a_prompt_selector(make: Any) -> None:
    assert isinstance(make(), PromptSelector)


@pytest.mark.parametrize("explore", [0.0, 0.1, 0.5, 1.0])
def test_no_row_twice_and_none_that_is_excluded_while_there_are_others(make: Any, explore: float) -> None:
    selector, world = make(explore=explore), Simulated(RATES)
    for step in range(20):
        excluded = frozenset(range(step % 10))
        rows = selector.select(4, exclude=excluded)
        free = min(4, 10 - len(excluded))
        assert len(rows) == 4 and all(type(row) is int and 0 <= row < 10 for row in rows)
        assert len(set(rows)) == free and not set(rows) & excluded
        assert set(rows[:free]) == set(rows)  # each of them once before any of them twice
        selector.observe(rows, world.answer(rows, step))


def test_where_all_rows_are_excluded_and_where_more_are_wanted_they_repeat(make: Any) -> None:
    selector = make()
    everything = frozenset(range(10))
    assert len(set(selector.select(4, exclude=everything))) == 4
    rows = selector.select(23)
    assert sorted(rows[:10]) == sorted(rows[10:20]) == list(range(10)) and len(rows) == 23
    assert selector.select(0) == []
    assert len(selector.select(3, exclude=frozenset({-1, 99}))) == 3  # no rows of this dataset


def test_a_row_that_came_twice_is_learned_from_twice(make: Any) -> None:
    selector = make()
    selector.observe([3, 3, 4], groups_of([1.0, 1.0, 0.5]))
    assert len(selector.select(5)) == 5


def test_groups_that_nobody_could_score_teach_nothing(make: Any) -> None:
    selector, untouched = make(), make()
    selector.observe([1, 2], groups_of([[NAN, NAN], [NAN, NAN]]))
    for _ in range(3):
        assert selector.select(6) == untouched.select(6) or isinstance(selector, AdaRFT)
    assert all(math.isfinite(value) for value in selector.metrics().values())


@pytest.mark.parametrize("name", COUNTED)
def test_rewards_that_are_no_answer_need_a_threshold(name: str) -> None:
    groups = groups_of([[0.1, 1.1], [-1.0, 1.1]])
    with pytest.raises(ValueError, match=r"difficulty_reward=.*success_at=1\.0"):
        MAKE[name]().observe([1, 2], groups)
    told, binary = MAKE[name](success_at=1.0), MAKE[name]()
    told.observe([1, 2], groups)
    binary.observe([1, 2], groups_of([[0.0, 1.0], [0.0, 1.0]]))
    assert told.select(5) == binary.select(5)


@pytest.mark.parametrize("stop", [1, 7])
def test_resumed_it_goes_on_as_if_nothing_had_happened(make: Any, stop: int, tmp_path: Any) -> None:
    def go(selector: Any, world: Simulated, steps: range) -> list[Any]:
        seen = []
        for step in steps:
            for _ in range(1 + step % 2):  # two rounds in each second step
                rows = selector.select(4, exclude=frozenset({step % 10}))
                selector.observe(rows, world.answer(rows, step, progress=step / 12))
                seen.append((rows, selector.metrics()))
        return seen

    world = Simulated(RATES)
    straight = make(seed=3)
    whole = go(straight, world, range(12))
    first, again = make(seed=3), Simulated(RATES)
    before = go(first, again, range(stop))
    between = first.select(4)  # between choosing and learning: in the middle of a generation
    torch.save(first.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    second = make()  # of another seed, and with a history that is no more
    rows = second.select(3)
    second.observe(rows, Simulated(RATES, seed=5).answer(rows, 0, progress=0.5))
    second.load_state_dict(state)
    assert second.state_dict().keys() == state.keys()
    for selector in (first, second):
        copied = Simulated(RATES, seed=9)
        selector.observe(between, copied.answer(between, stop))
    assert [first.select(6) for _ in range(5)] == [second.select(6) for _ in range(5)]
    # and at the end of a step, with the same answers as the run that was not interrupted
    third, world = make(), Simulated(RATES)
    fourth = make(seed=3)
    before = go(fourth, world, range(stop))
    third.load_state_dict(fourth.state_dict())
    after = go(third, world, range(stop, 12))
    assert [rows for rows, _ in before + after] == [rows for rows, _ in whole]
    for (_, left), (_, right) in zip(before + after, whole, strict=True):
        assert {k: v for k, v in left.items() if k != "explored"} == pytest.approx(
            {k: v for k, v in right.items() if k != "explored"}
        )


def test_its_state_is_a_copy(make: Any) -> None:
    selector, world = make(), Simulated(RATES)
    state = selector.state_dict()
    frozen = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in state.items()}
    for step in range(5):
        rows = selector.select(4)
        selector.observe(rows, world.answer(rows, step))
    for name, value in frozen.items():
        assert torch.equal(state[name], value) if isinstance(value, torch.Tensor) else state[name] == value, name


def test_a_state_of_another_dataset_is_refused(make: Any) -> None:
    state = make().state_dict()
    with pytest.raises(MismatchError, match="over 11 rows, this dataset has 10"):
        make().load_state_dict({**state, "size": 11})


def test_a_state_of_another_selector_is_refused(make: Any) -> None:
    with pytest.raises(MismatchError, match="another selector"):
        make().load_state_dict({"size": 10, "seed": 0, "draws": 0})


def test_seeds_and_calls_differ_and_equal_ones_agree(make: Any) -> None:
    draws = [[make(seed=seed, explore=1.0).select(5) for _ in range(2)] for seed in range(6)]
    assert all(first == second for first, second in draws)
    assert len({tuple(first) for first, _ in draws}) > 3
    selector = make(explore=1.0)
    assert len({tuple(selector.select(5)) for _ in range(6)}) > 3


def test_the_share_that_explores_is_the_one_that_was_asked_for(make: Any) -> None:
    selector, world = make(explore=0.25), Simulated(RATES)
    shares = []
    for step in range(400):
        rows = selector.select(3)
        selector.observe(rows, world.answer(rows, step))
        shares.append(selector.metrics()["explored"])
    assert abs(sum(shares) / len(shares) - 0.25) < 0.04  # of 3 rows that is 0.75 row: 1 in 3 of 4 calls


def test_explored_rows_are_uniform() -> None:
    selector = AdaRFT([float(i) for i in range(10)], explore=1.0)
    counts = torch.zeros(10)
    for _ in range(2000):
        counts[selector.select(3)] += 1
    assert (counts / counts.sum() - 0.1).abs().max() < 0.012


def test_explored_rows_stand_anywhere_and_the_others_in_their_order() -> None:
    """Surplus groups are dropped from the end: exploration must not be what is dropped."""
    levels = [float(i) for i in range(100)]
    order = AdaRFT(levels, explore=0.0).select(8)
    assert order == list(range(8))
    places = []
    for seed in range(200):
        rows = AdaRFT(levels, explore=0.25, seed=seed).select(8)
        explored = [place for place, row in enumerate(rows) if row >= 8]
        places += explored
        others = [row for row in rows if row < 8]
        assert len(explored) <= 2 and (len(explored) < 2 or others == sorted(others))
    assert min(map(places.count, range(8))) > 20


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: GRESO(0), "size=0"),
        (lambda: GRESO(True), "size=True"),
        (lambda: GRESO(4, explore=1.5), r"explore=1.5 is outside \[0, 1\]"),
        (lambda: GRESO(4, explore=NAN), "explore=nan"),
        (lambda: GRESO(4, explore=True), "explore=True"),
        (lambda: GRESO(4, seed=-1), "seed=-1"),
        (lambda: GRESO(4).select(-1), "count=-1"),
        (lambda: GRESO().select(1), r"size=len\(dataset\)"),
        (lambda: AdaRFT("level").select(1), r"does not know how many rows"),
        (lambda: AdaRFT("level", 4).select(1), r"difficulty=dataset\['level'\]"),
        (lambda: AdaRFT([]), "one value per row"),
        (lambda: AdaRFT(3), "one value per row"),
        (lambda: AdaRFT([1.0, 2.0], 3), "2 values for 3 rows"),
        (lambda: AdaRFT([1.0, NAN]).select(1), "1 NaN of 2"),
        (lambda: AdaRFT([1.0, math.inf]).select(1), "row 1 is infinite"),
        (lambda: GRESO(4).attach(context_of(5)), "GRESO is for 4 rows, the training dataset has 5"),
        (lambda: AdaRFT("level").attach(context_of(2, rate=[0, 1])), "no column 'level'. It has: rate"),
    ],
)
def test_what_is_wrong_is_named(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def test_size_and_columns_come_from_the_trainer() -> None:
    columns = {"rate": RATES, "hard": [1 - rate for rate in RATES], "from": SOURCES}
    for by_name, by_value in (
        (AdaRFT("hard"), AdaRFT(columns["hard"])),
        (OfflineCurriculum("rate"), OfflineCurriculum(RATES)),
        (DUMP("from"), DUMP(SOURCES)),
        (GRESO(), GRESO(10)),
    ):
        by_name.attach(context_of(10, **columns))
        assert [by_name.select(4) for _ in range(5)] == [by_value.select(4) for _ in range(5)]
        by_name.attach(context_of(10, **columns))  # a second trainer


def test_a_second_trainer_gets_it_as_it_was_made() -> None:
    reused, fresh = (OfflineCurriculum("level", explore=0.0) for _ in range(2))
    reused.attach(context_of(3, level=[0.1, 0.9, 0.5]))
    reused.select(2)
    for selector in (reused, fresh):
        selector.attach(context_of(3, level=[0.9, 0.1, 0.5]))
    assert [reused.select(1) for _ in range(3)] == [fresh.select(1) for _ in range(3)]
    mopps = MoPPS(explore=0.0)
    mopps.attach(context_of(3))
    mopps.observe([0, 1], groups_of([[1.0, 1.0], [0.0, 0.0]]))
    assert mopps.rates().tolist() == [0.75, 0.25, 0.5]
    mopps.attach(context_of(3))
    assert mopps.rates().tolist() == [0.5] * 3


def test_the_bench_of_their_cost_runs() -> None:
    """On a million rows: `bench/selection_overhead.py`."""
    from bench.selection_overhead import run

    rows = run([0], repeats=1, rows=2000, divided=((16, 128),))
    assert {row["name"] for row in rows if row["part"] == "selector"} >= {"GRESO", "MoPPS", "BOTS", "DUMP", "AdaRFT"}
    assert {row["name"] for row in rows if row["part"] == "allocator"} == {"VIP", "VIP, relaxed", "Knapsack"}
    assert all(row.get("select", 0.0) >= 0 and row.get("seconds", 0.0) >= 0 for row in rows)


# --- the pure functions ----------------------------------------------------------------------------------------------


def test_smallest_rows_equal_a_full_sort() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        scores = torch.randint(0, 4, (12,), generator=generator).double()
        free = torch.rand(12, generator=generator) < 0.7
        then = torch.randint(0, 3, (12,), generator=generator)
        for count in (0, 1, 3, 12, 20):
            rows = [row for row in range(12) if free[row]]
            plain = sorted(rows, key=lambda row: (scores[row], row))[:count]
            assert smallest_rows(scores, free, count).tolist() == plain
            kept = sorted(rows, key=lambda row: (scores[row], then[row], row))[:count]
            assert smallest_rows(scores, free, count, then).tolist() == sorted(
                kept, key=lambda row: (scores[row], row)
            )


def test_uniform_draws_and_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    assert draw_uniform(torch.zeros(3, dtype=torch.bool), 2, generator).tolist() == []
    rounded = [round_at_random(1.3, generator) for _ in range(4000)]
    assert set(rounded) == {1, 2} and abs(sum(rounded) / 4000 - 1.3) < 0.03
    assert [round_at_random(value, generator) for value in (0.0, 2.0)] == [0, 2]


def test_totals_of_a_step_begin_anew_with_the_next() -> None:
    totals = StepTotals(2)
    assert totals.add(3, [1, 2], [5.0]) == ([5.0], [1, 2])
    assert totals.add(3, [1, 0], [6.0]) == ([5.0], [2, 2])
    other = StepTotals(2)
    other.load_state_dict(totals.state_dict())
    assert other.add(3, [0, 1], [7.0]) == ([5.0], [2, 3])
    assert other.add(4, [0, 1], [7.0]) == ([7.0], [0, 1])
