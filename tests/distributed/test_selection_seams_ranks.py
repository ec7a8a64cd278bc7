"""Two gloo ranks see the same groups, serve the same rows and train on the same, also in groups of several sizes."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from hf_effi.selection import Screening
from tests.helpers import run_distributed
from tests.training import test_selection_inputs as inputs
from tests.training import test_selection_seams as seams

METHODS: dict[str, dict[str, Any]] = {
    "told": {},
    "transformed": {"advantage_transform": lambda groups: groups.advantages * 2},
    "allocated": {"rollout_allocator": True},
    "screened": {"screening": Screening(2)},
    "filtered": {"rollout_allocator": True, "difficulty_range": (0, 1), "difficulty_max_rounds": 3},
}


def everything(rows: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, over in METHODS.items():
        listener = seams.Listener()
        if "rollout_allocator" in over:
            over = {**over, "rollout_allocator": seams.Uneven()}
        folder = Path(tempfile.mkdtemp())
        more = {"per_device_train_batch_size": rows, "max_steps": 2, "callbacks": [listener]}
        trainer = seams.train(folder, **{**more, **over})
        found[name] = {
            "rows": [told for told, _ in listener.told],
            "rewards": [groups.rewards.nan_to_num(-1).tolist() for _, groups in listener.told],
            "advantages": [groups.advantages.tolist() for _, groups in listener.told],
            "trained": [batch["advantages"].tolist() for batch in trainer.batches],
            "weights": [float(p.detach().double().sum()) for p in trainer.model.parameters()],
            "generated": seams.metric(trainer, "effi/rows_generated"),
        }
    found["one listens"] = heard_by_one()
    found["images"] = pictured()
    return found


def heard_by_one() -> list[list[int]]:
    """The rows that a callback is told of which the first rank alone has, as many users write it."""
    listener = seams.Listener()
    callbacks = [listener] if int(os.environ.get("RANK", "0")) == 0 else []
    seams.train(Path(tempfile.mkdtemp()), per_device_train_batch_size=4, max_steps=2, callbacks=callbacks)
    return [told for told, _ in listener.told]


def pictured() -> list[Any]:
    """The number that the image of each trained row shows, beside that of its prompt; and an error of one rank."""
    model, processor = inputs.vision_model()
    over: dict[str, Any] = {"difficulty_range": (0, 1), "difficulty_max_rounds": 4, "per_device_train_batch_size": 4}
    over["ddp_find_unused_parameters"] = True  # the last norm of the image encoder is not used
    folder = Path(tempfile.mkdtemp())
    trainer = inputs.build(inputs.Spy, folder, model, inputs.odd_or_even, inputs.pictures(), processor, **over)
    found: list[Any] = []
    for batch in trainer.batches:
        shown = (batch["pixel_values"].flatten(1)[:, 0] * 255 / 10).round().int().tolist()
        texts = processor.tokenizer.batch_decode(batch["prompt_ids"], skip_special_tokens=True)
        found.append((shown, [int(text.replace("<image>", "").rstrip("?")) for text in texts]))
    found.append(sum(seams.metric(trainer, "effi/rows_moved")))
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_distributed(everything, 2, 4)


@pytest.mark.parametrize("name", METHODS)
def test_ranks_are_told_the_same(ranks: list[dict[str, Any]], name: str) -> None:
    first, second = (rank[name] for rank in ranks)
    for what in ("rows", "rewards", "advantages", "weights", "generated"):
        assert first[what] == second[what], what
    assert all(row >= 0 for rows in first["rows"] for row in rows)
    assert [len(a) == len(b) for a, b in zip(first["trained"], second["trained"], strict=True)] == [True, True]


@pytest.mark.parametrize("name", METHODS)
def test_two_ranks_do_what_one_does(ranks: list[dict[str, Any]], one: dict[str, Any], name: str) -> None:
    """Rewards come from a table, so that they do not depend on what is generated."""
    both = [rank[name] for rank in ranks]
    for what in ("rows", "rewards", "advantages", "generated"):
        assert both[0][what] == one[name][what], what
    for alone, *parts in zip(one[name]["trained"], *(rank["trained"] for rank in both), strict=True):
        together = sorted((value for part in parts for value in part), key=abs)
        left_over = len(alone) - len(together)
        # Filtered groups of several sizes need not divide over the micro-batches of all ranks: those of the smallest
        # advantages are left over, fewer than there are micro-batches.
        assert left_over == 0 or (name == "filtered" and 0 < left_over < 4)
        assert sorted(map(abs, alone))[left_over:] == pytest.approx([abs(value) for value in together])
        assert left_over or sorted(alone) == pytest.approx(sorted(together))


def test_a_callback_of_one_rank_is_told_of_all(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["one listens"] == ranks[0]["told"]["rows"] and ranks[1]["one listens"] == []


def test_images_move_with_their_rows(ranks: list[dict[str, Any]]) -> None:
    moved = 0
    for rank in ranks:
        *batches, rows_moved = rank["images"]
        moved += rows_moved
        assert len(batches) == 2
        for shown, asked in batches:
            assert shown == asked and all(number % 2 for number in shown)
    assert moved > 0


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    return everything(8)
