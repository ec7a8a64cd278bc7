"""Ragged rollout batches: plans against brute force, layouts against loops."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_effi.functional.rollouts import (
    concat_rows,
    contiguous_rows,
    deal_rows,
    plan_buckets,
    scatter_completion,
    take_rows,
    trim_rows,
)


def brute_force_tokens(lengths: list[int], buckets: int) -> int:
    ordered = sorted(lengths)
    count = min(buckets, len(ordered))
    best = None
    for cuts in itertools.combinations(range(1, len(ordered)), count - 1):
        bounds = [0, *cuts, len(ordered)]
        tokens = sum((b - a) * ordered[b - 1] for a, b in zip(bounds, bounds[1:], strict=False))
        best = tokens if best is None else min(best, tokens)
    return best


class TestPlanBuckets:
    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.integers(1, 40), min_size=1, max_size=9), st.integers(1, 4))
    def test_plan_is_optimal_and_complete(self, lengths: list[int], buckets: int) -> None:
        plan = plan_buckets(lengths, buckets)
        assert sorted(row for bucket in plan for row in bucket.rows) == list(range(len(lengths)))
        assert all(max(lengths[row] for row in bucket.rows) == bucket.width for bucket in plan)
        assert len(plan) == min(buckets, len(lengths))
        assert sum(bucket.tokens for bucket in plan) == brute_force_tokens(lengths, buckets)

    def test_max_rows_adds_buckets(self) -> None:
        plan = plan_buckets([5] * 10, num_buckets=1, max_rows=4)
        assert [len(bucket.rows) for bucket in plan] == [4, 4, 2] or max(len(b.rows) for b in plan) <= 4
        assert len(plan) == 3

    def test_many_rows_take_the_equal_split(self) -> None:
        plan = plan_buckets(list(range(1, 1001)), 4, max_rows=250)
        assert [len(bucket.rows) for bucket in plan] == [250] * 4
        assert [bucket.width for bucket in plan] == [250, 500, 750, 1000]

    def test_no_rows(self) -> None:
        assert plan_buckets([], 3) == []


def ragged(prompts: list[int], completions: list[int]) -> dict[str, torch.Tensor]:
    width, columns = max(prompts) + 1, max(completions) + 2
    rows = len(prompts)
    batch = {
        "prompt_ids": torch.zeros(rows, width, dtype=torch.long),
        "prompt_mask": torch.zeros(rows, width, dtype=torch.long),
        "completion_ids": torch.zeros(rows, columns, dtype=torch.long),
        "completion_mask": torch.zeros(rows, columns, dtype=torch.long),
    }
    for row, (p, c) in enumerate(zip(prompts, completions, strict=True)):
        batch["prompt_ids"][row, width - p :] = 10 * row + torch.arange(1, p + 1)
        batch["prompt_mask"][row, width - p :] = 1
        batch["completion_ids"][row, :c] = 100 * (row + 1) + torch.arange(c)
        batch["completion_mask"][row, :c] = 1
    return batch


class TestLayout:
    def test_contiguous_and_back(self) -> None:
        prompts, completions = [2, 4, 1], [3, 1, 0]
        batch = ragged(prompts, completions)
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        out = contiguous_rows(ids, mask, [0, 1, 2], width=5, pad_token_id=0)
        for row, (p, c) in enumerate(zip(prompts, completions, strict=True)):
            expected = ids[row][mask[row].bool()].tolist()
            assert out["input_ids"][row].tolist() == expected + [0] * (5 - p - c)
            assert out["attention_mask"][row].tolist() == [1] * (p + c) + [0] * (5 - p - c)
        window = 4  # columns 1..4 of the contiguous rows
        values = out["input_ids"][:, 1:].float()
        back = scatter_completion(values, torch.tensor(prompts) - 1, torch.tensor(completions), columns=5)
        assert back.long().tolist() == (batch["completion_ids"] * batch["completion_mask"]).tolist()
        assert values.shape[1] == window

    def test_concat_then_take_keeps_rows(self) -> None:
        a, b = ragged([2, 4], [3, 1]), ragged([6], [7])
        for batch, scale in ((a, 1.0), (b, 2.0)):
            batch["advantages"] = torch.full((len(batch["prompt_ids"]),), scale)
            batch["num_items_in_batch"] = torch.tensor(4)
            batch["old_per_token_logps"] = -batch["completion_ids"].float()
        joined = concat_rows([a, b], pad_token_id=9)
        assert joined["prompt_ids"].shape == (3, 7) and joined["completion_ids"].shape == (3, 9)
        last = take_rows(joined, [2])
        assert last["completion_ids"][0, :7].tolist() == b["completion_ids"][0, :7].tolist()
        assert last["advantages"].tolist() == [2.0] and last["num_items_in_batch"] == 4
        first = trim_rows(take_rows(joined, [1]))
        assert first["prompt_ids"].tolist() == [[11, 12, 13, 14]] and first["completion_ids"].tolist() == [[200]]
        assert first["old_per_token_logps"].tolist() == [[-200.0]]

    def test_a_ratio_per_row_is_never_padded_and_one_per_token_always(self) -> None:
        def part(rows: int, columns: int, ratio: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"completion_mask": torch.ones(rows, columns), "importance_sampling_ratio": ratio}

        per_row = [part(2, 5, torch.full((2, 1), 0.5)), part(1, 1, torch.full((1, 1), 0.25))]
        joined = concat_rows(per_row, 0, ratio_padding=None)["importance_sampling_ratio"]
        assert joined.tolist() == [[0.5], [0.5], [0.25]]
        # One token in every completion of the second part: the same shape, and another meaning.
        per_token = [part(2, 3, torch.full((2, 3), 0.5)), part(1, 1, torch.full((1, 1), 0.25))]
        joined = concat_rows(per_token, 0)["importance_sampling_ratio"]
        assert joined.tolist() == [[0.5] * 3, [0.5] * 3, [0.25, 1.0, 1.0]]
        joined = concat_rows(per_token[::-1], 0, ratio_padding=1.5)["importance_sampling_ratio"]
        assert joined.tolist() == [[0.25, 1.5, 1.5], [0.5] * 3, [0.5] * 3]
        single = [part(1, 1, torch.full((1, 1), 0.5))] * 2
        assert concat_rows(single, 0)["importance_sampling_ratio"].shape == (2, 1)

    def test_trim_keeps_a_column_when_everything_is_masked(self) -> None:
        batch = ragged([1], [2])
        batch["completion_mask"].zero_()
        assert trim_rows(batch)["completion_ids"].shape == (1, 1)


class TestDealRows:
    @settings(max_examples=60, deadline=None)
    @given(st.integers(1, 4), st.lists(st.integers(1, 100), min_size=4, max_size=12))
    def test_equal_counts_and_every_row_once(self, ranks: int, costs: list[int]) -> None:
        costs = costs[: len(costs) // ranks * ranks]
        hands = deal_rows(costs, ranks)
        assert {len(hand) for hand in hands} == {len(costs) // ranks}
        assert sorted(row for hand in hands for row in hand) == list(range(len(costs)))

    def test_costs_are_levelled(self) -> None:
        hands = deal_rows([10, 10, 1, 1, 1, 1], 2)
        loads = [sum([10, 10, 1, 1, 1, 1][row] for row in hand) for hand in hands]
        assert loads == [12, 12]

    def test_uneven_rows_are_refused(self) -> None:
        with pytest.raises(ValueError, match="3 rows cannot be dealt evenly to 2 ranks"):
            deal_rows([1, 2, 3], 2)
