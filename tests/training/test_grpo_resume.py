"""Exact resume: at any step, in any epoch, inside a generation block. Stock fails where it says so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from trl import GRPOConfig, GRPOTrainer

from hf_effi.errors import MismatchError
from hf_effi.trainers.grpo.config import EffiGRPOConfig
from hf_effi.trainers.grpo.resume import ResumableGRPOTrainer
from hf_effi.trainers.grpo.trainer import EffiGRPOTrainer
from tests.helpers import (
    assert_bitwise_equal,
    compare_runs,
    grpo_args,
    kill_and_resume,
    prompt_dataset,
    record_run,
    run_grpo,
    run_in_child,
)

CASES = {
    "plain": {"gradient_accumulation_steps": 2},
    "workers": {"gradient_accumulation_steps": 2, "dataloader_num_workers": 1},
    "reuse": {"num_iterations": 2},
    "split": {"steps_per_generation": 4},
    "filter": {"difficulty_range": (0, 1), "gradient_accumulation_steps": 2},
    "prune": {"prune_rate": 0.5, "gradient_accumulation_steps": 2},
    "random": {"prune_rate": 0.5, "prune_metric": "random", "num_iterations": 2},
}


def train(cls: type, folder: Path, resume: Path | None = None, **over: Any) -> Any:
    config = GRPOConfig if cls is GRPOTrainer else EffiGRPOConfig
    args = grpo_args(
        folder, config, **{"max_steps": -1, "num_train_epochs": 3, "save_strategy": "steps", "save_steps": 1, **over}
    )
    return run_grpo(cls, args, train_dataset=prompt_dataset(9), resume_from_checkpoint=resume and str(resume))


def test_the_repairs_need_none_of_the_mixins(tmp_path: Path) -> None:
    """`ResumableGRPOTrainer` on its own: stock's run to the bit, and resumed in the middle of the second pass."""
    over = {"gradient_accumulation_steps": 2}
    stock = train(GRPOTrainer, tmp_path / "stock", **over, save_strategy="no")
    whole = train(ResumableGRPOTrainer, tmp_path / "whole", **over)
    assert_bitwise_equal(stock.model, whole.model, what="uninterrupted")
    stop = whole.state.max_steps // 2 + 1
    resumed = train(ResumableGRPOTrainer, tmp_path / "resumed", tmp_path / "whole" / f"checkpoint-{stop}", **over)
    assert_bitwise_equal(whole.model, resumed.model, what=f"resumed at {stop}")


def test_a_trainer_without_rollouts_says_what_it_cannot_go_on_with(tmp_path: Path) -> None:
    over = {"difficulty_range": (0, 1), "num_train_epochs": 1}
    train(EffiGRPOTrainer, tmp_path / "filter", **over)
    state = json.loads((tmp_path / "filter" / "checkpoint-1" / "effi_state.json").read_text())
    if state["prompts"] is None:
        pytest.fail("the run made no refill, so that there is no stream to go on with")
    with pytest.raises(MismatchError, match="Resume it with the trainer that wrote it"):
        train(ResumableGRPOTrainer, tmp_path / "other", tmp_path / "filter" / "checkpoint-1")


@pytest.mark.parametrize("case", CASES)
def test_resume_anywhere_equals_the_uninterrupted_run(tmp_path: Path, case: str) -> None:
    # Two passes; a pass over the prompts is one update where half of the completions are pruned.
    over = {**CASES[case], "num_train_epochs": 3 if "prune_rate" in CASES[case] else 2}
    whole = train(EffiGRPOTrainer, tmp_path / "whole", **over)
    steps = whole.state.max_steps
    assert steps >= 3
    for stop in sorted({1, steps // 2, steps // 2 + 1, steps - 1}):
        start = tmp_path / "whole" / f"checkpoint-{stop}"
        resumed = train(EffiGRPOTrainer, tmp_path / "resumed", start, **over, save_strategy="no")
        assert_bitwise_equal(whole.model, resumed.model, what=f"resumed at {stop} of {steps}")
        logs = [
            [{k: v for k, v in entry.items() if "time" not in k} for entry in t.state.log_history if "loss" in entry]
            for t in (whole, resumed)
        ]
        assert logs[0] == logs[1]


@pytest.mark.parametrize(("case", "stop"), [("plain", 5), ("split", 6)])
def test_stock_replays_other_prompts_and_ours_does_not(tmp_path: Path, case: str, stop: int) -> None:
    """The intended difference from stock: TRL 1.16 restarts the prompt order and the generation phase on resume."""
    over = CASES[case]
    whole = train(GRPOTrainer, tmp_path / "stock", **over)
    resumed = train(GRPOTrainer, tmp_path / "stock2", tmp_path / "stock" / f"checkpoint-{stop}", **over)
    with pytest.raises(AssertionError, match="tensors differ"):
        assert_bitwise_equal(whole.model, resumed.model)
    # An uninterrupted stock run and ours agree, so the repair changes nothing but the resume.
    assert_bitwise_equal(whole.model, train(EffiGRPOTrainer, tmp_path / "ours", exact_savings="off", **over).model)


def test_a_checkpoint_of_stock_can_be_continued(tmp_path: Path) -> None:
    stock = train(GRPOTrainer, tmp_path / "stock", gradient_accumulation_steps=2)
    ours = train(
        EffiGRPOTrainer,
        tmp_path / "ours",
        tmp_path / "stock" / "checkpoint-5",
        gradient_accumulation_steps=2,
        exact_savings="off",
    )
    # Stock wrote no state of ours, but the epoch is in its own: the prompts go on where they were.
    assert_bitwise_equal(stock.model, ours.model)


def killed_run(output_dir: str, resume: bool) -> Any:
    args = grpo_args(output_dir, EffiGRPOConfig, max_steps=5, save_strategy="steps", save_steps=1, num_iterations=2)
    return record_run(run_grpo(EffiGRPOTrainer, args, resume_from_checkpoint=resume or None))


def test_a_killed_process_resumes_to_the_same_bits(tmp_path: Path) -> None:
    whole = run_in_child(killed_run, tmp_path / "whole")
    resumed = kill_and_resume(killed_run, tmp_path / "killed", kill_after_checkpoint=3, extra_steps=1)
    assert_bitwise_equal(whole.weights, resumed.weights)


def test_the_buffer_of_another_world_size_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr("hf_effi.trainers.grpo.resume.logger.warning", warnings.append)
    over = CASES["reuse"]
    train(EffiGRPOTrainer, tmp_path / "whole", **over)
    checkpoint = tmp_path / "copy" / "checkpoint-3"
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", checkpoint)
    state = json.loads((checkpoint / "effi_state.json").read_text())
    assert state["inside_block"] and (checkpoint / "effi_rollouts_0.pt").exists()
    del state["layout"]  # as earlier versions wrote it; with one the rows are dealt anew: test_grpo_elastic.py
    (checkpoint / "effi_state.json").write_text(json.dumps({**state, "world_size": 2}))
    resumed = train(EffiGRPOTrainer, tmp_path / "resumed", checkpoint, **over)
    assert resumed.state.global_step == resumed.state.max_steps
    assert len(warnings) == 1 and "saved by 2 processes" in warnings[0]


def test_two_equal_runs_log_the_same(tmp_path: Path) -> None:
    runs = [train(EffiGRPOTrainer, tmp_path / name, **CASES["filter"]) for name in ("a", "b")]
    compare_runs(
        *runs, keys=["loss", "reward", "effi/reward_kept", "effi/tokens_forward", "effi/dropped/zero_variance"]
    )
