"""Rows between TRL's generation and TRL's loss: placeholders, owners, ratios and the exchange, without a trainer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_effi.trainers.grpo import exchange
from hf_effi.trainers.grpo.deferred import DeferredLogProbs
from hf_effi.trainers.grpo.rows import Generation, Ratios, Rows

MASK = torch.ones(2, 5)


def rows(*values: float, put_off: tuple[str, ...] = ()) -> Rows:
    """One row per value, which is its advantage and the length of its completion."""
    lengths = torch.tensor([int(value) for value in values])
    mask = (torch.arange(6) < lengths.unsqueeze(1)).long()
    batch = {
        "prompt_ids": torch.ones(len(values), 2, dtype=torch.long),
        "prompt_mask": torch.ones(len(values), 2, dtype=torch.long),
        "completion_ids": mask * lengths.unsqueeze(1),
        "completion_mask": mask,
        "advantages": torch.tensor(values),
        "num_items_in_batch": lengths.sum(),
    }
    return Rows(batch, put_off)


class TestDeferredLogProbs:
    def test_entries_are_found_by_identity_in_the_order_of_the_forwards(self) -> None:
        deferred = DeferredLogProbs()
        old, ref = deferred.put_off(MASK, 3), deferred.put_off(MASK, 3)
        assert old.shape == (2, 3) and old.dtype == torch.float32
        batch = {"ref": ref, "count": 3, "equal": torch.zeros(2, 3), "old": old}
        assert deferred.entries_of(batch) == ("old", "ref")

    def test_without_a_forward_nothing_was_put_off(self) -> None:
        assert DeferredLogProbs().entries_of({"old": torch.zeros(2, 3)}) == ()

    def test_a_placeholder_that_was_computed_with_is_named(self) -> None:
        deferred = DeferredLogProbs()
        used = deferred.put_off(MASK, 3)
        with pytest.raises(RuntimeError, match="compute nothing from them in an override"):
            deferred.entries_of({"old_per_token_logps": used - 1.0})


class TestRows:
    def test_taken_rows_keep_what_was_put_off(self) -> None:
        taken = rows(1.0, 2.0, 3.0, put_off=("old",)).take([2, 0, 2])
        assert len(taken) == 3 and taken.loss_tokens.tolist() == [3, 1, 3] and taken.put_off == ("old",)

    def test_rounds_are_joined_and_trimmed(self) -> None:
        joined = Rows.joined([rows(1.0), rows(2.0, 3.0)], pad_token_id=0, ratio_padding=1.0).trimmed()
        assert joined.batch["advantages"].tolist() == [1.0, 2.0, 3.0]
        assert joined.batch["completion_ids"].tolist() == [[1, 0, 0], [2, 2, 0], [3, 3, 3]]

    def test_a_global_row_belongs_to_a_rank_and_has_a_place_there(self) -> None:
        generation = Generation(mine=[rows(1.0, 2.0), rows(3.0)])  # two ranks: rows 0 to 3, then 4 and 5
        assert [generation.owner(row, 2) for row in range(6)] == [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (1, 2)]
        with pytest.raises(IndexError):
            generation.owner(6, 2)


@pytest.mark.parametrize(
    ("mode", "low", "high", "padding"),
    [
        ("token_truncate", None, 3.0, 1.0),
        ("token_truncate", 1.5, 3.0, 1.5),
        ("token_truncate", None, 0.5, 0.5),
        ("token_mask", None, 3.0, 1.0),
        ("token_mask", 1.5, None, 0.0),
        ("sequence_mask", None, 3.0, None),
        ("sequence_truncate", None, 3.0, None),
    ],
)
def test_padding_has_the_ratio_that_trl_clips_1_to(mode: str, low: Any, high: Any, padding: Any) -> None:
    host = SimpleNamespace(
        loss_type="dapo",
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_min=low,
        vllm_importance_sampling_clip_max=high,
    )
    assert Ratios.of(host) == Ratios(multiply=True, padding=padding)
    host.loss_type = "vespo"
    assert not Ratios.of(host).multiply


class TestExchange:
    def test_rows_stay_where_the_counts_are_equal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(exchange, "dist", None)  # nothing is sent
        ranks: Any = SimpleNamespace(num_processes=2, process_index=0, device="cpu")
        mine, moved = exchange.share_out(rows(1.0, 2.0, 3.0), [(0, 2), (1, 1)], [3, 5], ranks, lambda parts: parts[0])
        assert mine.batch["advantages"].tolist() == [3.0] and moved == 0

    def test_a_row_comes_back_from_its_bytes_without_its_padding(self) -> None:
        batch = {
            "prompt_ids": torch.tensor([[0, 0, 7], [1, 2, 3]]),
            "prompt_mask": torch.tensor([[0, 0, 1], [1, 1, 1]]),
            "completion_ids": torch.tensor([[4, 5, 0, 0], [6, 7, 8, 9]]),
            "completion_mask": torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]),
            "old_per_token_logps": torch.tensor([[-0.5, -0.25, 0.0, 0.0], [-1.0, -2.0, -3.0, -4.0]]),
            "importance_sampling_ratio": torch.tensor([[0.5], [0.75]], dtype=torch.float64),
            "tool_mask": torch.tensor([[True, False, True, True]] * 2),
            "advantages": torch.tensor([0.1, -0.2], dtype=torch.bfloat16),
            "num_items_in_batch": torch.tensor(6),
            "ref_per_token_logps": None,
        }
        held = Rows(batch, ("old_per_token_logps",))
        for index, length in ((0, 2), (1, 4)):
            data = exchange.as_bytes(held.take([index]))
            # 8 shapes of 8 bytes; the ids and masks of a token are 8 each, a log-prob 4, a tool mask 1.
            prompt = 2 * index + 1
            assert len(data) == 8 * 8 + prompt * 16 + length * (16 + 4 + 1) + 8 + 2
            back = exchange.from_bytes(torch.cat([torch.zeros(3, dtype=torch.uint8), data])[3:], held)
            expected = held.take([index]).trimmed()
            assert back.put_off == held.put_off and back.batch.keys() == expected.batch.keys()
            for name, value in expected.batch.items():
                found = back.batch[name]
                assert value is None and found is None or (torch.equal(found, value) and found.dtype == value.dtype)

    def test_entries_that_are_no_tensors_of_rows_are_named(self) -> None:
        for name, value in (("images", [None]), ("texts", ["a"]), ("deep", torch.zeros(1, 1, 1, 1, 1, 1, 1, 2))):
            with pytest.raises(TypeError, match=name):
                exchange.as_bytes(Rows({**rows(1.0).batch, name: value}))

    def test_entries_of_any_shape_and_lists_of_them_come_back(self) -> None:
        pixels = [torch.rand(3, 4), torch.rand(5, 4)]
        batch = {**rows(1.0, 2.0).batch, "pixel_values": pixels, "num_images": [1, 2], "cube": torch.rand(2, 2, 3, 1)}
        held = Rows(batch)
        for index in (0, 1):
            back = exchange.from_bytes(exchange.as_bytes(held.take([index])), held).batch
            assert torch.equal(back["pixel_values"][0], pixels[index]) and back["num_images"] == [index + 1]
            assert torch.equal(back["cube"], batch["cube"][index : index + 1])

    def test_ranks_take_the_hand_of_which_they_hold_most(self) -> None:
        assert exchange.hands_of_ranks([[0, 1], [2, 3]], [1, 1, 0, 0]) == [[2, 3], [0, 1]]
        assert exchange.hands_of_ranks([[0, 1], [2, 3], [4, 5]], [0, 0, 0, 0, 0, 0]) == [[0, 1], [2, 3], [4, 5]]
