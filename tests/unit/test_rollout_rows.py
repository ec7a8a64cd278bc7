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
    def join(self, parts: Any) -> Rows:
        return Rows.joined(parts, 0, 1.0)

    def ranks(self, rank: int) -> Any:
        return SimpleNamespace(num_processes=2, process_index=rank, device="cpu")

    def test_rows_stay_where_the_counts_are_equal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(exchange, "gather_object", None)  # nothing is sent
        mine = exchange.share_out(rows(1.0, 2.0, 3.0), [(0, 2), (1, 1)], [3, 5], self.ranks(0), self.join)
        assert mine.batch["advantages"].tolist() == [3.0]

    def test_rows_move_so_that_all_ranks_have_as_many(self, monkeypatch: pytest.MonkeyPatch) -> None:
        held = [rows(1.0, 2.0, 3.0), rows(4.0)]
        owners, costs = [(0, 2), (0, 0), (0, 1), (1, 0)], [3.0, 1.0, 2.0, 4.0]
        chosen = [held[0].take([2, 0, 1]).trimmed(), held[1].take([0]).trimmed()]
        monkeypatch.setattr(exchange, "gather_object", lambda mine: chosen)
        shares = [exchange.share_out(held[r], owners, costs, self.ranks(r), self.join) for r in range(2)]
        found = [share.batch["advantages"].tolist() for share in shares]
        assert sorted(sum(found, [])) == [1.0, 2.0, 3.0, 4.0] and [len(part) for part in found] == [2, 2]
        assert {sum(part) for part in found} == {5.0}  # the tokens are dealt evenly too
