"""Two gloo ranks: groups of PDR lie on one process each, or are refused on both."""

from __future__ import annotations

import tempfile
from typing import Any

import pytest
import torch
from trl import GRPOTrainer

from hf_effi.errors import RefusedError
from hf_effi.recipes import pdr_rollout_func
from hf_effi.trainers.grpo.trainer import EffiGRPOTrainer
from tests.helpers import assert_bitwise_equal, run_distributed, weights_of
from tests.training import test_refine as refine


def on_two() -> dict[str, Any]:
    """One group on each process, of which one is plain and one refined."""
    reward = refine.Kept()
    rollouts = pdr_rollout_func(drafts=2, k=1, max_workspace_tokens=4, join=refine.short)
    over = {"per_device_train_batch_size": 4, "max_steps": 3}
    trained = refine.train(tempfile.mkdtemp(), EffiGRPOTrainer, rollouts, reward, **over)
    found = {"weights": weights_of(trained.model), "rows": reward.rows}
    try:
        over = {"per_device_train_batch_size": 2, "max_steps": 1}
        refine.train(tempfile.mkdtemp(), GRPOTrainer, pdr_rollout_func(join=refine.short), **over)
    except RefusedError as error:
        found["refused"] = str(error)
    return found


@pytest.fixture(scope="module")
def ranks() -> Any:
    return run_distributed(on_two, 2)


def test_groups_on_two_processes(ranks):
    one, two = ranks
    assert_bitwise_equal(one["weights"], two["weights"])
    assert all(bool(torch.isfinite(value).all()) for value in one["weights"].values())
    kinds = set()
    for rank in (one, two):
        for first in range(0, len(rank["rows"]), 4):
            group = rank["rows"][first : first + 4]
            assert len({(row[0], row[2]) for row in group}) == 1
            kinds.add(bool(group[0][2]))
    assert kinds == {True, False}


def test_a_group_on_two_processes_is_refused_on_both(ranks):
    assert all("no whole groups of 4" in rank["refused"] for rank in ranks)
