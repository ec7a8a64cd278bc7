"""GRPO that changes its number of processes: the same samples in the same update, or a refusal by name."""

from __future__ import annotations

import json
import re
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from hf_effi.checkpoint import SafeCheckpointer
from hf_effi.errors import BrokenFileError, MismatchError
from hf_effi.functional.rollouts import AdvantagePruner, GenerationLayout, PassRateBand
from hf_effi.trainers.grpo.config import EffiGRPOConfig
from hf_effi.trainers.grpo.elastic import check_same_updates, stored_layout
from hf_effi.trainers.grpo.trainer import EffiGRPOTrainer
from tests.helpers import grpo_args, run_distributed, run_grpo, tiny_qwen3, weights_of
from tests.helpers.sampling import StopAt

PROMPTS, UPDATES = 10, 6


class _Fixed:
    """Completions that are a function of the prompt and of the place in its group, at any number of processes."""

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        first = self.accelerator.process_index * len(prompt_ids)
        made = []
        for i, prompt in enumerate(prompt_ids):
            number = zlib.crc32(bytes([*(token % 251 for token in prompt), (first + i) % self.num_generations]))
            made.append([5 + (number >> 3 * k) % 40 for k in range(2 + number % 5)])
        return made, None


class FixedStock(_Fixed, GRPOTrainer):
    pass


class FixedEffi(_Fixed, EffiGRPOTrainer):
    pass


def reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [float(zlib.crc32(bytes(ids)) >> 7 & 3) for ids in completion_ids]


def part(folder: str, kind: str, layout: tuple[int, int, int], last: int, iterations: int = 1, **over: Any) -> Any:
    """Train in fp64 up to update `last`, with (rows, accumulation, micro-batches per generation) on each process."""
    from hf_effi.trainers.grpo import resume

    said: list[str] = []
    resume.logger.warning = said.append
    rows, steps, chunks = layout
    settings = {
        "per_device_train_batch_size": rows, "gradient_accumulation_steps": steps, "steps_per_generation": chunks,
        "max_steps": UPDATES, "save_strategy": "steps", "save_steps": 100, "num_iterations": iterations,
        "learning_rate": 1e-3, "num_train_epochs": 9, **over,
    }  # fmt: skip
    cls, config = (FixedStock, GRPOConfig) if kind == "stock" else (FixedEffi, EffiGRPOConfig)
    if kind == "effi":
        settings["safe_checkpoints"] = "sync"
    args = grpo_args(folder, config, **settings)
    # Of one length: the width of the padding moves positions, which a model computes in fp32.
    prompts = Dataset.from_dict({"prompt": [f"{i}{i + 1 if i < 9 else 0}+1=" for i in range(PROMPTS)]})
    trainer = run_grpo(
        cls, args, model=tiny_qwen3().double(), reward_funcs=reward, train_dataset=prompts,
        callbacks=[StopAt(last)], train=False,
    )  # fmt: skip
    if kind == "stock":
        SafeCheckpointer().attach(trainer)
    trainer.train(resume_from_checkpoint="auto")
    return weights_of(trainer.model), said


def refusal(folder: str, **over: Any) -> str:
    layout = over.pop("layout")
    try:
        part(folder, "effi", layout, UPDATES, **over)
    except MismatchError as error:
        return str(error)
    return ""


#: (processes, (rows, accumulation, micro-batches per generation), last update)
PARTS = [(2, (1, 4, 4), 2), (1, (1, 8, 8), 3), (2, (1, 4, 4), 6)]
CASES = {
    # 4 prompts of 2 completions per generation; 2 generations per pass: update 3 is in the second.
    "stock": ("stock", PARTS, 1, {}),
    # Each generation twice: update 3 lies inside of it, and its rollouts are dealt to the other processes.
    "effi, inside of a generation": ("effi", PARTS, 2, {}),
    "effi, filter": ("effi", [(2, (1, 4, 4), 3), (1, (1, 8, 8), 6)], 2, {"difficulty_range": (0, 1)}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_weights_are_those_of_the_uninterrupted_run(tmp_path: Path, case: str) -> None:
    kind, parts, iterations, over = CASES[case]
    whole, _ = run_distributed(part, 1, str(tmp_path / "whole"), kind, (1, 8, 8), UPDATES, iterations, **over)[0]
    for world, layout, last in parts:
        results = run_distributed(part, world, str(tmp_path / "run"), kind, layout, last, iterations, **over)
        assert all("made anew" not in text for _, said in results for text in said)
    found = results[0][0]
    assert max(float((whole[name] - found[name]).abs().max()) for name in whole) <= 1e-9
    start = {name: value.double() for name, value in weights_of(tiny_qwen3()).items()}
    assert max(float((whole[name] - start[name]).abs().max()) for name in whole) > 1e-3


def test_another_layout_is_refused_with_settings_that_fit(tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    run_distributed(part, 2, folder, "effi", (1, 4, 4), 1, 2)
    state = json.loads((tmp_path / "run" / "checkpoint-1" / "effi_state.json").read_text())
    assert state["layout"]["world_size"] == 2 and state["inside_block"]
    one = {"layout": (1, 8, 8), "iterations": 2}
    for over, words in (
        ({"layout": (1, 4, 8)}, "rows per update: 8 before .* 4 now .*Set gradient_accumulation_steps=8, or ignore"),
        ({"layout": (1, 8, 4)}, "rows per generation: 8 before .* 4 now .*Set steps_per_generation=8, or ignore"),
    ):
        assert re.search(words, refusal(folder, **{**one, **over})), words


def test_each_quantity_is_refused_with_its_setting(tmp_path: Path) -> None:
    before = GenerationLayout(1, 2, steps_per_generation=4, accumulation_steps=4, num_iterations=2, world_size=2)
    for now, words in (
        ({"rows_per_step": 3, "steps_per_generation": 2, "accumulation_steps": 2}, "Resume on 2 processes with"),
        ({"num_generations": 4}, "num_generations: 2 before, 4 now. .*Set num_generations=2, or"),
        ({"num_iterations": 1}, "num_iterations: 2 before, 1 now. .*Set num_iterations=2, or"),
        ({"oversample": 2}, "prune_oversample: 1 before, 2 now. .*Set prune_rate and prune_allocation as they were"),
    ):
        settings = {"steps_per_generation": 8, "accumulation_steps": 8, "num_iterations": 2, **now}
        layout = GenerationLayout(**{"rows_per_step": 1, "num_generations": 2, **settings})
        with pytest.raises(MismatchError, match=words):
            check_same_updates(tmp_path / "checkpoint-1", before, layout, SimpleNamespace())


def test_what_chooses_by_the_number_of_processes_is_refused(tmp_path: Path) -> None:
    before = GenerationLayout(1, 2, steps_per_generation=4, accumulation_steps=4, world_size=2)
    now = GenerationLayout(1, 2, steps_per_generation=8, accumulation_steps=8)
    three = GenerationLayout(1, 2, steps_per_generation=4, accumulation_steps=4, world_size=6)
    wide = GenerationLayout(2, 2, steps_per_generation=4, accumulation_steps=4)

    def check(one: GenerationLayout, other: GenerationLayout, pruner: Any = None, filters: Any = None) -> None:
        rollouts = SimpleNamespace(selects=True, objects=SimpleNamespace(rollout_pruner=pruner, group_filter=filters))
        check_same_updates(tmp_path / "checkpoint-1", one, other, rollouts)

    check(before, now, AdvantagePruner(0.5, scope="global"), PassRateBand(0, 1))
    with pytest.raises(MismatchError, match="pruned among the completions of each of 2 processes.*scope='global'"):
        check(before, now, AdvantagePruner(0.5))
    with pytest.raises(
        MismatchError, match="to 8 micro-batches .* deals them to 4.*Keep per_device_train_batch_size=1"
    ):
        check(before, wide, filters=PassRateBand(0, 1))
    with pytest.raises(MismatchError, match="by multiples of 3 prompts, .* would by 1. .*num_generations=2"):
        check(three, GenerationLayout(1, 2, steps_per_generation=12, accumulation_steps=12, world_size=2),
              filters=PassRateBand(0, 1))  # fmt: skip


def test_rollouts_that_cannot_be_dealt_are_made_anew_which_is_said(tmp_path: Path) -> None:
    """An update takes 2 of the 3 micro-batches of a generation, in turns."""
    part(str(tmp_path), "effi", (2, 2, 3), 1)
    _, said = part(str(tmp_path), "effi", (1, 4, 6), 2)
    assert any("the rest of that generation is made anew: its rows cannot be dealt" in text for text in said)
    assert any("with several updates per generation" in text for text in said)


def test_a_layout_that_is_none_is_a_broken_file(tmp_path: Path) -> None:
    for entry in ({"rows_per_step": 0}, {"rows_per_step": 1, "num_generations": 2, "colour": 1}, "two", [1]):
        with pytest.raises(BrokenFileError, match="holds no layout of a GRPO run"):
            stored_layout(tmp_path / "effi_state.json", {"layout": entry})
    assert stored_layout(tmp_path / "effi_state.json", {}) is None
