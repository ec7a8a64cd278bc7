"""A buffer over a stream: which rows are in it, what the selector sees, and its state."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_effi.errors import MismatchError, RefusedError
from hf_effi.functional.kept_arguments import arguments_of
from hf_effi.functional.rollouts import ShuffledPrompts
from hf_effi.protocols import PromptSelector, RolloutGroups
from hf_effi.selection import PCL, BufferedPrompts
from hf_effi.selection.stream import StreamRows


class Stream:
    """Rows `first`, `first + 1`, ..., as often as it is iterated."""

    def __init__(self, size: int) -> None:
        self.size, self.passes = size, 0

    def __iter__(self) -> Any:
        self.passes += 1
        yield from ({"prompt": f"p{row}"} for row in range(self.size))


class Last:
    """Chooses the last places; remembers what it is told."""

    def __init__(self, size: int) -> None:
        self.size, self.told, self.forgotten = size, [], []

    def attach(self, context: Any) -> None:
        self.context = context

    def select(self, count: int, exclude: Any = frozenset()) -> list[int]:
        return [row for row in reversed(range(self.size)) if row not in exclude][:count]

    def observe(self, rows: list[int], groups: Any) -> None:
        self.told.append(list(rows))

    def forget_rows(self, rows: Any) -> None:
        self.forgotten.append(list(rows))

    def state_dict(self) -> dict[str, Any]:
        return {"told": list(self.told)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.told = list(state["told"])


class Context:
    group_size, seed, size = 2, 0, 0

    def read_prompts(self, rows: Any, read: Any, layer: str = "last") -> torch.Tensor:
        return torch.tensor([[float(row)] for row in rows])

    def prompt_ids(self, rows: Any) -> list[list[int]]:
        return [[row] for row in rows]

    def spread(self, rows: Any, compute: Any) -> torch.Tensor:
        return compute(list(rows))


def groups_of(generation: int) -> RolloutGroups:
    return RolloutGroups(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2), step=0, generation=generation)


GROUPS = groups_of(1)


def made(size: int = 4, stream: int = 10) -> tuple[BufferedPrompts, StreamRows, Last]:
    inner = Last(size)
    selector = BufferedPrompts(inner, size)
    rows = selector.open_stream(Stream(stream))
    selector.attach(Context())
    return selector, rows, inner


def test_rows_have_the_number_in_which_they_were_read() -> None:
    rows = StreamRows(Stream(3), ahead=2)
    assert len(rows) == 2
    assert [rows.read() for _ in range(7)] == list(range(7)) and rows.starts == [0, 3, 6]
    assert [rows[n]["prompt"] for n in range(7)] == ["p0", "p1", "p2", "p0", "p1", "p2", "p0"]
    rows.drop([1])
    with pytest.raises(IndexError, match="row 1 of the stream is not in the buffer; 6 others are"):
        rows[1]
    with pytest.raises(ValueError, match="a stream without rows"):
        StreamRows(Stream(0), 1).read()


@pytest.mark.parametrize("read", [1, 3, 4, 6, 8])
def test_rows_are_restored_from_numbers(read: int) -> None:
    rows = StreamRows(Stream(3), ahead=2)
    for _ in range(read):
        rows.read()
    numbers = {0, read - 1}
    other = StreamRows(Stream(3), ahead=2)
    other.restore(rows.count, rows.starts, numbers)
    assert {number: other[number] for number in numbers} == {number: rows[number] for number in numbers}
    for _ in range(5):
        assert rows[rows.read()] == other[other.read()]
    assert rows.starts == other.starts


def test_rows_that_were_generated_for_leave_their_places() -> None:
    selector, rows, inner = made()
    assert selector.select(2) == [3, 2]
    assert selector.select(2, exclude=frozenset({3, 2})) == [1, 0]
    selector.observe([3, 2], GROUPS)
    assert rows[3]["prompt"] == "p3"  # until the next choice
    assert selector.select(2) == [5, 4]
    assert inner.told == [[3, 2]] and inner.forgotten == [[2, 3]]
    assert selector._slots == [0, 1, 4, 5] and selector.metrics() == {"rows_read": 6.0}


def test_rows_of_a_generation_can_be_read_until_the_next_one() -> None:
    selector, rows, _ = made()
    for chosen in ([3, 2], [5, 4]):  # a refill is a second round of one generation
        assert selector.select(2) == chosen
        selector.observe(chosen, groups_of(1))
    assert [rows[row]["prompt"] for row in (2, 3, 4, 5)] == ["p2", "p3", "p4", "p5"]
    assert selector.select(2) == [7, 6]
    selector.observe([7, 6], groups_of(2))
    assert sorted(rows._held) == [0, 1, 6, 7]


def test_a_second_stream_is_read_from_its_beginning() -> None:
    selector, _, _ = made()
    selector.observe(selector.select(2), GROUPS)
    rows = selector.open_stream(Stream(10))
    selector.attach(Context())
    assert selector.select(2) == [3, 2] and rows.count == 4


def test_the_selector_sees_the_buffer_as_its_dataset() -> None:
    selector, _, inner = made()
    selector.observe(selector.select(2), GROUPS)
    selector.select(1)
    context = inner.context
    assert context.size == 4 and context.column("prompt") == ["p0", "p1", "p4", "p5"]
    assert context.read_prompts([2, 0], None).flatten().tolist() == [4.0, 0.0]
    assert context.prompt_ids([3]) == [[5]]
    assert context.spread([3, 1], lambda places: torch.tensor(places).unsqueeze(1)).flatten().tolist() == [3, 1]
    with pytest.raises(ValueError, match="no column 'level'. It has: prompt"):
        context.column("level")


@pytest.mark.parametrize("stream", [3, 10])
def test_a_state_goes_on(stream: int) -> None:
    def go(selector: BufferedPrompts, times: int) -> list[list[int]]:
        found = []
        for _ in range(times):
            found.append(selector.select(3))
            selector.observe(found[-1], GROUPS)
        return found

    whole, rows, _ = made(stream=stream)
    go(whole, 3)
    state = whole.state_dict()
    assert all(isinstance(value, (int, str, list, dict)) for value in state.values())
    other, restored, inner = made(stream=stream)
    other.load_state_dict(state)
    assert go(other, 4) == go(whole, 4)
    assert {n: rows[n] for n in whole._slots} == {n: restored[n] for n in other._slots}
    fresh, _, _ = made(stream=stream)
    fresh.load_state_dict(made(stream=stream)[0].state_dict())
    assert fresh.select(1) == [3]


def test_another_stream_or_selector_is_refused() -> None:
    selector, _, _ = made(stream=10)
    selector.select(1)
    state = selector.state_dict()
    with pytest.raises(MismatchError, match="the stream ends after 2 rows, and the checkpoint's buffer holds later"):
        made(stream=2)[0].load_state_dict(state)
    with pytest.raises(MismatchError, match="'size': 4.*this one .'size': 5"):
        made(size=5)[0].load_state_dict(state)


def test_what_it_takes() -> None:
    selector = BufferedPrompts(PCL(8), 8)
    assert isinstance(selector, PromptSelector) and list(arguments_of(selector)) == ["selector", "size"]
    with pytest.raises(TypeError, match="ShuffledPrompts has no forget_rows"):
        BufferedPrompts(ShuffledPrompts(8), 8)
    with pytest.raises(ValueError, match="made for 8 rows, and the buffer has 9"):
        BufferedPrompts(PCL(8), 9)
    with pytest.raises(ValueError, match="size=0 must be"):
        BufferedPrompts(Last(0), 0)
    with pytest.raises(ValueError, match="above 1,000,000"):
        BufferedPrompts(Last(2_000_000), 2_000_000)
    with pytest.raises(ValueError, match="a buffer of size=4 rows cannot give 5 different prompts"):
        made()[0].select(5)
    with pytest.raises(ValueError, match="BufferedPrompts has no stream"):
        BufferedPrompts(Last(2), 2).select(1)
    with pytest.raises(RefusedError, match="for streaming datasets, and this one has 3 rows: pass Last itself"):
        BufferedPrompts(Last(2), 2).open_stream([1, 2, 3])
