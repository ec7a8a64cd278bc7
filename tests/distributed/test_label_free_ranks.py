"""Two gloo ranks: a vote of a group that lies on both, and one archive of states on both."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from trl import GRPOTrainer

from hf_effi.functional.rewards import majority_vote
from hf_effi.rewards import MajorityVoteReward
from hf_effi.selection import FirstRowsPruner
from tests.helpers import assert_bitwise_equal, run_distributed, weights_of
from tests.training import test_discover as discoveries
from tests.training import test_label_free as label_free

GROUP = 4


def voted(cls: type) -> dict[str, Any]:
    """Groups of four on two ranks with two rows each."""
    noted = label_free.Noted()
    size = {"group_size": GROUP} if cls is GRPOTrainer else {}
    over: dict[str, Any] = {} if cls is GRPOTrainer else {"rollout_pruner": FirstRowsPruner(2)}
    trainer = label_free.train(
        tempfile.mkdtemp(), [MajorityVoteReward(label_free.first_character, **size), noted], cls,
        per_device_train_batch_size=2, max_steps=2, **over,
    )  # fmt: skip
    return {
        "texts": noted.texts,
        "reward": label_free.metric(trainer, "rewards/majority_vote_reward/mean"),
        "ratio": label_free.metric(trainer, "effi/label/majority_ratio"),
        "weights": weights_of(trainer.model),
    }


def discovered() -> dict[str, Any]:
    discover = discoveries.discover()
    trainer = discoveries.search(Path(tempfile.mkdtemp()), discover, per_device_train_batch_size=4, max_steps=3)
    return {
        "archive": repr(discover.state_dict()),
        "states": len(discover.archive),
        "weights": weights_of(trainer.model),
    }


def everything(folder: Path) -> dict[str, Any]:
    return {"stock": voted(GRPOTrainer), "effi": voted(label_free.Spy), "discover": discovered()}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two ranks did; one start of two processes for all tests."""
    return run_distributed(everything, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("which", ["stock", "effi"])
def test_a_group_on_two_ranks_votes_as_one(ranks: list[dict[str, Any]], which: str) -> None:
    first, second = (one[which] for one in ranks)
    votes = [
        majority_vote([label_free.first_character(text) for text in mine + other])
        for mine, other in zip(first["texts"], second["texts"], strict=True)
    ]
    assert len(votes) == 2
    for one in (first, second):
        assert one["reward"] == pytest.approx([sum(vote.agrees) / GROUP for vote in votes])
        assert one["ratio"] == pytest.approx([vote.ratio for vote in votes])
    assert_bitwise_equal(first["weights"], second["weights"])


def test_both_ranks_hold_one_archive(ranks: list[dict[str, Any]]) -> None:
    first, second = (one["discover"] for one in ranks)
    assert first["archive"] == second["archive"] and first["states"] > 2
    assert_bitwise_equal(first["weights"], second["weights"])
