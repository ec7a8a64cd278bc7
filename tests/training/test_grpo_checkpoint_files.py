"""The resume files of GRPO: written before the push, named in `trainer_state.json`, missed by name, loaded safely."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from trl import GRPOConfig, GRPOTrainer

from hf_effi.callbacks.reptile import ReptileCallback
from hf_effi.errors import BrokenFileError, MismatchError, RewardError
from hf_effi.functional.rollouts import ShuffledPrompts
from hf_effi.trainers.grpo.config import EffiGRPOConfig
from hf_effi.trainers.grpo.resume import MARK, PROMPTS_FILE, STATE_FILE
from hf_effi.trainers.grpo.trainer import EffiGRPOTrainer
from tests.helpers import (
    LocalHub,
    assert_bitwise_equal,
    binary_hash_reward,
    grpo_args,
    prompt_dataset,
    run_grpo,
    tiny_qwen3,
)

BUFFER = "effi_rollouts_0.pt"
ALL = {STATE_FILE, PROMPTS_FILE, BUFFER}


class Counting(ShuffledPrompts):
    """A selector whose state is a tensor: how often each row was chosen, which decides what comes next."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.chosen = torch.zeros(size)

    def select(self, count: int) -> list[int]:
        rows = self.chosen.argsort(stable=True)[:count].tolist()
        self.chosen[rows] += 1
        return rows

    def state_dict(self) -> dict[str, Any]:
        return {"chosen": self.chosen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.chosen = state["chosen"]


def train(folder: Path, resume: Path | None = None, cls: type = EffiGRPOTrainer, **over: Any) -> Any:
    """Each generation is used for two updates, so that odd steps lie inside a block."""
    kwargs = {name: over.pop(name) for name in ("callbacks", "prompt_selector", "reward_funcs") if name in over}
    config = GRPOConfig if cls is GRPOTrainer else EffiGRPOConfig
    settings = {"max_steps": 4, "num_iterations": 2, "save_strategy": "steps", "save_steps": 1}
    args = grpo_args(folder, config, **{**settings, **over})
    return run_grpo(
        cls, args, train_dataset=prompt_dataset(9), resume_from_checkpoint=resume and str(resume), **kwargs
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("whole")
    return train(folder, prompt_selector=Counting(9)), folder


def copied(checkpoint: Path, folder: Path, without: str | None = None) -> Path:
    target = folder / checkpoint.name
    shutil.copytree(checkpoint, target)
    if without is not None:
        (target / without).unlink()
    return target


def marks_of(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]


def unmark(checkpoint: Path) -> None:
    path = checkpoint / "trainer_state.json"
    state = json.loads(path.read_text())
    del state["stateful_callbacks"][MARK]
    path.write_text(json.dumps(state))


def test_a_selector_with_a_tensor_is_stored_and_goes_on_exactly(whole: tuple[Any, Path], tmp_path: Path) -> None:
    trainer, folder = whole
    assert ALL <= {path.name for path in (folder / "checkpoint-3").iterdir()}
    assert json.loads((folder / "checkpoint-3" / STATE_FILE).read_text())["schema"] == 1
    assert marks_of(folder / "checkpoint-3")[MARK] == {
        "schema": 1,
        "step": 3,
        "files": [STATE_FILE, PROMPTS_FILE, BUFFER],
    }
    assert not list(folder.rglob("_*"))  # nothing half-written is left
    resumed = train(tmp_path, folder / "checkpoint-3", prompt_selector=Counting(9))
    assert_bitwise_equal(trainer.model, resumed.model)


def test_a_state_that_no_resume_could_read_stops_the_first_save_and_leaves_no_half_file(tmp_path: Path) -> None:
    class Numpy(Counting):
        def state_dict(self) -> dict[str, Any]:
            return {"chosen": numpy.zeros(9)}

    with pytest.raises(ValueError, match=r"prompt_selector \(Numpy\) cannot be stored in a checkpoint"):
        train(tmp_path, prompt_selector=Numpy(9))
    assert not list(tmp_path.rglob("effi_state*")) and not list(tmp_path.rglob("effi_prompts*"))
    assert not (tmp_path / "checkpoint-1" / "trainer_state.json").exists()


@pytest.mark.parametrize("name", sorted(ALL))
def test_a_file_that_was_lost_is_missed_by_name(whole: tuple[Any, Path], tmp_path: Path, name: str) -> None:
    checkpoint = copied(whole[1] / "checkpoint-3", tmp_path, without=name)
    with pytest.raises(BrokenFileError, match=f"checkpoint-3 has no {name}, which was written with it"):
        train(tmp_path / "resumed", checkpoint, prompt_selector=Counting(9))


def test_another_selector_and_a_newer_file_are_refused(whole: tuple[Any, Path], tmp_path: Path) -> None:
    checkpoint = copied(whole[1] / "checkpoint-3", tmp_path)
    with pytest.raises(MismatchError, match="trained with a prompt selector Counting, this run has ShuffledPrompts"):
        train(tmp_path / "resumed", checkpoint)
    state = json.loads((checkpoint / STATE_FILE).read_text())
    (checkpoint / STATE_FILE).write_text(json.dumps({**state, "schema": 2}))
    with pytest.raises(BrokenFileError, match="has schema 2, and this hf_effi knows schemas up to 1"):
        train(tmp_path / "resumed", checkpoint, prompt_selector=Counting(9))


def test_a_number_of_processes_that_nobody_had_is_not_counted_to(whole: tuple[Any, Path], tmp_path: Path) -> None:
    checkpoint = copied(whole[1] / "checkpoint-3", tmp_path)
    state = json.loads((checkpoint / STATE_FILE).read_text())
    (checkpoint / STATE_FILE).write_text(json.dumps({**state, "world_size": 10**12}))
    with pytest.raises(BrokenFileError, match="names 1000000000000 processes"):
        train(tmp_path / "resumed", checkpoint, prompt_selector=Counting(9))


def test_a_checkpoint_of_before_the_mark_is_continued_exactly(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", difficulty_range=(0, 1))
    checkpoint = copied(tmp_path / "whole" / "checkpoint-3", tmp_path, without=None)
    state = json.loads((checkpoint / STATE_FILE).read_text())
    prompts = torch.load(checkpoint / PROMPTS_FILE, weights_only=True) if state["prompts"] else None
    kept = {name: state[name] for name in ("step", "inside_block", "world_size", "generations_done")}
    (checkpoint / STATE_FILE).write_text(json.dumps({**kept, "prompts": prompts}))
    (checkpoint / PROMPTS_FILE).unlink(missing_ok=True)
    unmark(checkpoint)
    resumed = train(tmp_path / "resumed", checkpoint, difficulty_range=(0, 1))
    assert prompts is not None and kept["inside_block"]
    assert_bitwise_equal(whole.model, resumed.model)


def test_stock_may_continue_our_run_and_we_its(whole: tuple[Any, Path], tmp_path: Path) -> None:
    """Stock keeps the mark in `trainer_state.json` and writes no files of ours: the mark is of another step."""
    train(tmp_path / "stock", whole[1] / "checkpoint-2", cls=GRPOTrainer)
    checkpoint = tmp_path / "stock" / "checkpoint-3"
    assert marks_of(checkpoint)[MARK]["step"] == 2
    assert train(tmp_path / "ours", checkpoint).state.global_step == 4


def test_a_file_that_another_run_left_is_not_taken(
    whole: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr("hf_effi.trainers.grpo.resume.logger.warning", warnings.append)
    checkpoint = copied(whole[1] / "checkpoint-3", tmp_path)
    unmark(checkpoint)  # as where stock has saved into the folder of an older run of ours
    trainer = train(tmp_path / "resumed", checkpoint)
    assert trainer._rollouts.generations_done == 1 and len(warnings) == 1 and "was left by another run" in warnings[0]


def test_rotation_and_model_only_saves(tmp_path: Path) -> None:
    train(tmp_path / "one", save_total_limit=1, max_steps=3)
    (checkpoint,) = (tmp_path / "one").glob("checkpoint-*")
    assert {STATE_FILE, BUFFER} <= {path.name for path in checkpoint.iterdir()}
    train(tmp_path / "bare", save_only_model=True, max_steps=1)
    assert not list((tmp_path / "bare" / "checkpoint-1").glob("effi_*"))
    assert train(tmp_path / "again", tmp_path / "bare" / "checkpoint-1", max_steps=2).state.global_step == 2


def test_what_is_pushed_resumes_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: tuple[Any, Path]
) -> None:
    with LocalHub() as hub:
        hub.use(monkeypatch, HF_TOKEN="tester-token")
        pushed = {"push_to_hub": True, "hub_model_id": "tester/run", "hub_strategy": "all_checkpoints"}
        train(tmp_path / "out", prompt_selector=Counting(9), hub_always_push=True, **pushed)
        files = hub.files("tester/run")
    assert {f"checkpoint-3/{name}" for name in ALL} <= set(files)
    assert f"checkpoint-2/{STATE_FILE}" in files and f"checkpoint-2/{BUFFER}" not in files  # a generation begins there
    assert not [path for path in files if path in ALL], "they are no part of the model"
    checkpoint = tmp_path / "served" / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    for path, content in files.items():
        if path.startswith("checkpoint-3/"):
            (checkpoint / path.split("/")[1]).write_bytes(content)
    resumed = train(tmp_path / "resumed", checkpoint, prompt_selector=Counting(9))
    assert_bitwise_equal(whole[0].model, resumed.model)


def test_the_checkpoint_before_a_bad_reward_has_the_files_of_callbacks(tmp_path: Path) -> None:
    def reward(prompts: list[str], **kwargs: Any) -> Any:
        return None if trainer.state.global_step == 2 else binary_hash_reward(prompts=prompts, **kwargs)

    over = {"save_strategy": "no", "num_iterations": 1, "max_steps": 4}
    trainer = run_grpo(
        EffiGRPOTrainer,
        grpo_args(tmp_path, EffiGRPOConfig, **over),
        model=tiny_qwen3(end_tokens=10),
        reward_funcs=reward,
        callbacks=[ReptileCallback(3, 0.5)],
        train=False,
    )
    with pytest.raises(RewardError):
        trainer.train()
    assert {STATE_FILE, "effi_reptile.pt"} <= {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
