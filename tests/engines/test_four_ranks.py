"""Four gloo processes: DDP, and sequences shared by two ranks each; their checkpoints on two processes and on one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import hf_effi
from tests.engines.runs import Outcome, Place, effi_grpo, effi_trainer
from tests.helpers import run_distributed

#: rows per update on any number of processes
ROWS = 8
CHECKPOINT = "checkpoint-3"


def run_all(folder: str, resume_only: bool) -> dict[str, Outcome]:
    """Train with a checkpoint at update 3, or go on from the one that four processes left."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}
    each = {"per_device_train_batch_size": ROWS // world}
    place = Place("ddp", Path(folder) / "data")
    shared = {"per_device_train_batch_size": 2 * ROWS // world, "sequence_parallel_size": 2}
    found = {}
    if not resume_only:
        found["data"] = effi_trainer(place, **saving, **each)
        if world == 4:
            found["sequence"] = effi_trainer(Place("ddp", Path(folder) / "sequence"), **saving, **shared)
            found["grpo"] = effi_grpo(Place("ddp", Path(folder) / "grpo"))
        return found
    for name in ("data", "sequence"):
        checkpoint = str(Path(folder) / name / CHECKPOINT)
        found[name] = effi_trainer(Place("ddp", Path(folder) / f"{name}-{world}"), resume=checkpoint, **each)
    with pytest.raises(hf_effi.errors.MismatchError) as refusal:
        effi_trainer(
            Place("ddp", Path(folder) / "other"),
            resume=str(Path(folder) / "data" / CHECKPOINT),
            per_device_train_batch_size=2 * ROWS // world,
        )
    found["refused"] = Outcome(refused=str(refusal.value))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("four"))


@pytest.fixture(scope="module")
def four(folder: str) -> list[dict[str, Outcome]]:
    return run_distributed(run_all, 4, folder, False, timeout=900)


def worst(found: Outcome, expected: Outcome) -> float:
    assert found.weights.keys() == expected.weights.keys() and found.weights
    return max(float((found.weights[name] - weight).abs().max()) for name, weight in expected.weights.items())


def test_four_ranks_train_as_one(four: Any, tmp_path: Path) -> None:
    (one,) = run_distributed(run_all, 1, str(tmp_path), False, timeout=900)
    assert four[0]["data"].updates == 6
    for name in ("data", "sequence"):
        assert worst(four[0][name], one["data"]) <= 1e-6, name
        assert four[0][name].series("loss") == pytest.approx(one["data"].series("loss"), rel=1e-5)
    rollouts = four[0]["grpo"]
    assert min(rollouts.series("effi/rows_generated")) > max(rollouts.series("effi/rows_trained")) > 0


@pytest.mark.parametrize("world", [2, 1])
def test_a_checkpoint_of_four_goes_on_with_fewer(four: Any, folder: str, world: int) -> None:
    """With the rows per update of the run that is resumed; with others the place in the order would be missed."""
    found = run_distributed(run_all, world, folder, True, timeout=900)
    for name in ("data", "sequence"):
        assert found[0][name].updates == 6
        assert worst(found[0][name], four[0]["data"]) <= 1e-6, name
        assert found[0][name].series("learning_rate")[3:] == four[0]["data"].series("learning_rate")[3:]
    assert f"trained with {ROWS} rows per update, this run has {2 * ROWS}" in found[0]["refused"].refused
