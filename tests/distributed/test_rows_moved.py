"""Four gloo ranks: only rows that change their rank are sent, and each arrives as it was."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed as dist

from hf_effi.trainers.grpo import exchange
from hf_effi.trainers.grpo.rows import Rows
from tests.helpers import run_distributed

#: rows that each rank generated, and those that are chosen of it: 8 in all, 2 for each rank
HELD, CHOSEN = 6, (5, 2, 1, 0)


def row(rank: int, index: int) -> dict[str, Any]:
    """Tokens of one row: its lengths and values follow from where it was generated."""
    prompt, completion = 2 + rank, 3 + index
    return {
        "prompt_ids": [100 * rank + index] * prompt,
        "completion_ids": [1000 + 100 * rank + index + place for place in range(completion)],
        "logps": [-0.1 * (rank + 1) * (place + 1) for place in range(completion)],
    }


def held_by(rank: int) -> Rows:
    rows = [row(rank, index) for index in range(HELD)]
    wide = (max(len(r["prompt_ids"]) for r in rows) + 50, max(len(r["completion_ids"]) for r in rows) + 100)

    def padded(values: list[Any], left: bool, width: int) -> list[Any]:
        gap = [0] * (width - len(values))
        return gap + values if left else values + gap

    def mask(count: int, left: bool, width: int) -> list[int]:
        return padded([1] * count, left, width)

    return Rows(
        {
            "prompt_ids": torch.tensor([padded(r["prompt_ids"], True, wide[0]) for r in rows]),
            "prompt_mask": torch.tensor([mask(len(r["prompt_ids"]), True, wide[0]) for r in rows]),
            "completion_ids": torch.tensor([padded(r["completion_ids"], False, wide[1]) for r in rows]),
            "completion_mask": torch.tensor([mask(len(r["completion_ids"]), False, wide[1]) for r in rows]),
            "sampling_per_token_logps": torch.tensor([padded(r["logps"], False, wide[1]) for r in rows]),
            "advantages": torch.tensor([float(10 * rank + index) for index in range(HELD)]),
            "num_items_in_batch": torch.tensor(7),
        }
    )


def move() -> dict[str, Any]:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    sent = {"bytes": 0, "calls": 0}
    all_to_all, all_reduce = dist.all_to_all_single, dist.all_reduce

    class Counting:
        @staticmethod
        def all_to_all_single(received: Any, given: Any, *splits: Any) -> None:
            sent["bytes"] += given.numel()
            sent["calls"] += 1
            all_to_all(received, given, *splits)

        @staticmethod
        def all_reduce(values: Any) -> None:
            sent["numbers"] = values.numel()
            all_reduce(values)

    exchange.dist = Counting
    accelerator = type("Ranks", (), {"num_processes": world, "process_index": rank, "device": torch.device("cpu")})
    owners = [(r, index) for r in range(world) for index in range(CHOSEN[r])]
    costs = [float(3 + index) for _, index in owners]
    join = lambda parts: Rows.joined(parts, 0, 1.0)  # noqa: E731
    mine, moved = exchange.share_out(held_by(rank), owners, costs, accelerator, join)
    return {"batch": mine.batch, "moved": moved, **sent}


def test_only_rows_that_move_are_sent_and_arrive_as_they_were() -> None:
    ranks = run_distributed(move, 4)
    found, cost = [], []
    for result in ranks:
        batch = result["batch"]
        for i, advantage in enumerate(batch["advantages"].tolist()):
            rank, index = divmod(int(advantage), 10)
            found.append((rank, index))
            expected = row(rank, index)
            prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()].tolist()
            real = batch["completion_mask"][i].bool()
            assert prompt == expected["prompt_ids"]
            assert batch["completion_ids"][i][real].tolist() == expected["completion_ids"]
            logps = torch.tensor(expected["logps"])
            assert torch.equal(batch["sampling_per_token_logps"][i][real], logps)
        assert batch["num_items_in_batch"] == 7 and len(batch["advantages"]) == 2
        cost.append(sum(3 + index for _, index in found[-2:]))
    assert sorted(found) == [(r, index) for r in range(4) for index in range(CHOSEN[r])]
    assert max(cost) - min(cost) <= 3, "tokens are dealt evenly"
    travelled = [pair for place, pair in enumerate(found) if pair[0] != place // 2]
    assert sum(result["moved"] for result in ranks) == len(travelled) >= 3
    # 6 widths, prompt ids and masks of 8 bytes, completions of 8 + 8 + 4, and the advantage; no byte of padding.
    expected = sum(6 * 8 + 16 * (2 + rank) + 20 * (3 + index) + 4 for rank, index in travelled)
    assert sum(result["bytes"] for result in ranks) == expected
    assert {(result["calls"], result["numbers"]) for result in ranks} == {(1, 8)}
