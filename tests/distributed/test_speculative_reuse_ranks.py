"""Drafts on two gloo ranks: they follow their prompts, the ranks agree, and a resume finds all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hf_effi import EffiGRPOConfig, EffiGRPOTrainer
from hf_effi.functional.rollouts import SpeculativeReuse
from tests.helpers import assert_bitwise_equal, grpo_args, prompt_dataset, run_distributed, run_grpo, weights_of


def train(folder: Path, resume: Path | None = None, reuse: SpeculativeReuse | None = None, **over: Any) -> Any:
    """Three passes over 12 prompts, 4 in each generation of 8 rows: a group of 4 lies on one rank or on two."""
    settings = {
        "max_steps": -1, "num_train_epochs": 3, "per_device_train_batch_size": 4, "num_generations": 2,
        "learning_rate": 1e-2,
    }  # fmt: skip
    args = grpo_args(folder, EffiGRPOConfig, **{**settings, **over})
    return run_grpo(
        EffiGRPOTrainer,
        args,
        train_dataset=prompt_dataset(12),
        rollout_reuse=SpeculativeReuse(stored_tokens=100) if reuse is None else reuse,
        resume_from_checkpoint=resume and str(resume),
    )


def log_of(trainer: Any) -> list[dict[str, float]]:
    names = ("effi/reuse/", "loss", "reward")
    return [{k: v for k, v in entry.items() if k.startswith(names)} for entry in trainer.state.log_history]


def everything(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    still = train(folder / "still", learning_rate=0.0, save_strategy="steps", save_steps=3)
    found["still"] = [entry["effi/reuse/tokens"] for entry in log_of(still) if "effi/reuse/tokens" in entry]
    over = {"save_strategy": "steps", "save_steps": 1}
    whole = train(folder / "whole", **over)
    resumed = train(folder / "resumed", resume=folder / "whole" / "checkpoint-5", **over)
    found["whole"], found["resumed"] = weights_of(whole.model), weights_of(resumed.model)
    found["log"] = [entry for entry in log_of(whole) if "effi/reuse/tokens" in entry]
    filtered = train(
        folder / "filtered", difficulty_range=(0, 1), difficulty_max_rounds=3, reuse=SpeculativeReuse(lenience=0.5)
    )
    found["filtered"] = weights_of(filtered.model)
    straddling = train(folder / "straddling", num_generations=8, learning_rate=0.0)
    found["straddling"] = [e["effi/reuse/tokens"] for e in log_of(straddling) if "effi/reuse/tokens" in e]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return run_distributed(everything, 2, folder)


def test_drafts_are_found_on_whichever_rank_they_are(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["still"] == [0] * 3 + [1] * 6
        assert rank["straddling"] == [0] * 12 + [1] * 24


def test_ranks_agree_and_a_resume_equals_the_uninterrupted_run(ranks: list[dict[str, Any]]) -> None:
    first, second = ranks
    for name in ("whole", "filtered"):
        assert_bitwise_equal(first[name], second[name], what=name)
    assert_bitwise_equal(first["whole"], first["resumed"], what="resumed")
    mine = [{k: v for k, v in entry.items() if "reuse" in k} for entry in first["log"]]
    assert 0 < sum(entry["effi/reuse/tokens"] for entry in mine) / 6 < 1


def test_one_process_goes_on_with_the_drafts_of_two(ranks: list[dict[str, Any]], folder: Path, tmp_path: Path) -> None:
    over = {"learning_rate": 0.0, "per_device_train_batch_size": 8}
    trainer = train(tmp_path, resume=folder / "still" / "checkpoint-3", **over)
    assert [e["effi/reuse/tokens"] for e in log_of(trainer) if "effi/reuse/tokens" in e] == [0] * 3 + [1] * 6
