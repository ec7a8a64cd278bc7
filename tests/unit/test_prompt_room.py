"""`PromptRoom` without a trainer: what is counted, warned of once, and refused."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_effi.errors import RefusedError
from hf_effi.trainers.grpo import prompt_room
from hf_effi.trainers.grpo.prompt_room import PromptRoom
from tests.helpers import tiny_gpt2, tiny_qwen3

COUNT = "effi/rows_over_max_positions"


def checked(room: PromptRoom, lengths: list[int], completion: int | None = 4, others: Any = ()) -> list[float]:
    """Return what is logged; `others` are the `(longest, too long)` of further ranks."""

    def gather(row: Tensor) -> Tensor:
        return torch.cat([row, *(torch.tensor([pair]) for pair in others)])

    log: dict[str, list[float]] = defaultdict(list)
    room.check(lengths, completion, SimpleNamespace(device="cpu", gather=gather), log)
    return log[COUNT]


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(prompt_room.logger, "warning", found.append)
    return found


def test_a_prompt_fits_up_to_the_last_position(warnings: list[str]) -> None:
    assert checked(PromptRoom(10, is_a_table=True), [1, 6]) == [0.0] and not warnings


def test_what_does_not_fit_is_counted_and_warned_of_once(warnings: list[str]) -> None:
    room = PromptRoom(10, is_a_table=False)
    assert checked(room, [6, 7, 30]) == [2.0] and checked(room, [7]) == [1.0]
    assert len(warnings) == 1 and "a prompt of 30 tokens and max_completion_length=4" in warnings[0]
    assert "Rotary models go on" in warnings[0]


def test_a_table_ends_where_not_even_one_token_fits(warnings: list[str]) -> None:
    room = PromptRoom(10, is_a_table=True)
    assert checked(room, [9]) == [1.0] and "stops where a completion goes past them" in warnings[0]
    with pytest.raises(
        RefusedError, match="a prompt of 10 tokens .* 10 positions. Drop prompts of more than 6 tokens"
    ):
        checked(room, [10])


def test_all_ranks_hear_of_the_prompt_of_one(warnings: list[str]) -> None:
    assert checked(PromptRoom(10, is_a_table=False), [2], others=[(8, 3)]) == [3.0] and warnings
    with pytest.raises(RefusedError, match="a prompt of 12 tokens"):
        checked(PromptRoom(10, is_a_table=True), [2], others=[(12, 1)])


def test_completions_of_any_length_are_at_least_one_token(warnings: list[str]) -> None:
    room = PromptRoom(10, is_a_table=False)
    assert checked(room, [9], completion=None) == [0.0] and checked(room, [10], completion=None) == [1.0]


def test_the_room_is_that_of_the_model() -> None:
    table, rotary = tiny_gpt2(), tiny_qwen3()
    assert PromptRoom.of(table) == PromptRoom(table.config.n_positions, is_a_table=True)
    assert PromptRoom.of(rotary) == PromptRoom(rotary.config.max_position_embeddings, is_a_table=False)
    silent = nn.Linear(1, 1)
    silent.config = SimpleNamespace()
    assert PromptRoom.of(silent) is None
