"""A stream of prompts is laid out and resumed as a map-style dataset is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from trl import GRPOTrainer

from hf_effi.trainers.grpo.config import EffiGRPOConfig
from hf_effi.trainers.grpo.trainer import EffiGRPOTrainer
from tests.helpers import assert_bitwise_equal, binary_hash_reward, grpo_args, prompt_dataset, run_grpo

#: What differs from 4 rows of groups of 2, accumulation 1; and how many distinct prompts a generation then has.
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "accumulation": ({"gradient_accumulation_steps": 2}, 8),
    "reuse": ({"num_iterations": 2}, 4),
    "split": ({"steps_per_generation": 4, "gradient_accumulation_steps": 2, "prune_scope": "global"}, 16),
    "quarter": ({"prune_rate": 0.75}, 8),
}


def train(folder: Path, data: Dataset | IterableDataset, resume: Path | None = None, **over: Any) -> tuple[Any, list]:
    seen: list[list[str]] = []

    def reward(prompts: list[str], **kwargs: Any) -> list[float]:
        seen.append(list(prompts))
        return binary_hash_reward(prompts=prompts, **kwargs)

    args = grpo_args(folder, EffiGRPOConfig, **{"prune_rate": 0.5, "shuffle_dataset": False, **over})
    trainer = run_grpo(
        EffiGRPOTrainer, args, reward_funcs=reward, train_dataset=data, resume_from_checkpoint=resume and str(resume)
    )
    return trainer, seen


@pytest.mark.parametrize("case", CASES)
def test_a_stream_serves_the_prompts_of_the_dataset(tmp_path: Path, case: str) -> None:
    over, distinct = CASES[case]
    data = prompt_dataset(2 * distinct + 3)  # the last three fill no generation
    # The third generation is the first one of the second pass.
    steps = {"reuse": 5, "split": 5}.get(case, 3)
    runs = [train(tmp_path, rows, max_steps=steps, **over) for rows in (data, data.to_iterable_dataset())]
    for _, seen in runs:
        assert len(seen) == 3 and all(len(dict.fromkeys(prompts)) == distinct for prompts in seen)
        assert [p for prompts in seen[:2] for p in dict.fromkeys(prompts)] == data["prompt"][: 2 * distinct]
        assert all(prompts.count(p) == 2 for prompts in seen for p in prompts)
    assert runs[0][1] == runs[1][1]
    assert_bitwise_equal(runs[0][0].model, runs[1][0].model)


@pytest.mark.parametrize(
    ("over", "stops"), [({"num_iterations": 2}, (1, 5)), ({"gradient_accumulation_steps": 2}, (2, 5))]
)
def test_a_stream_is_resumed_in_any_pass_and_inside_a_generation(
    tmp_path: Path, over: dict[str, Any], stops: tuple[int, ...]
) -> None:
    # Two generations per pass, each in another order: buffered shuffling draws from the seed and the pass.
    size = 2 * CASES["reuse" if "num_iterations" in over else "accumulation"][1]
    over = {"shuffle_dataset": True, "max_steps": 7, "save_strategy": "steps", "save_steps": 1, **over}
    whole, seen = train(tmp_path / "whole", prompt_dataset(size).to_iterable_dataset(), **over)
    assert seen[2:4] != seen[:2]
    for stop in stops:
        resumed, _ = train(
            tmp_path / "resumed",
            prompt_dataset(size).to_iterable_dataset(),
            tmp_path / "whole" / f"checkpoint-{stop}",
            **over,
        )
        assert_bitwise_equal(whole.model, resumed.model, what=f"resumed at {stop}")
        logs = [
            [{k: v for k, v in entry.items() if "time" not in k} for entry in t.state.log_history if "loss" in entry]
            for t in (whole, resumed)
        ]
        assert logs[0] == logs[1]


def test_stock_resumes_a_stream_in_another_pass(tmp_path: Path) -> None:
    """The intended difference from stock: it takes it that any run on a stream is in its first pass."""
    over = {"shuffle_dataset": True, "max_steps": 6, "save_strategy": "steps", "save_steps": 5}
    seen: list[list[str]] = []

    def reward(prompts: list[str], **kwargs: Any) -> list[float]:
        seen.append(list(prompts))
        return binary_hash_reward(prompts=prompts, **kwargs)

    for resume in (None, str(tmp_path / "checkpoint-5")):
        rows = prompt_dataset(4).to_iterable_dataset()  # two generations per pass
        args = grpo_args(tmp_path, **over)
        run_grpo(GRPOTrainer, args, reward_funcs=reward, train_dataset=rows, resume_from_checkpoint=resume)
    whole, resumed = seen[:6], seen[6:]
    assert resumed == [whole[2]] != [whole[5]]  # the first generation of the second pass, for the last of the third


def test_a_stream_that_fills_no_generation_is_named(tmp_path: Path) -> None:
    for data, what in ((prompt_dataset(3), "3 prompts"), (prompt_dataset(3).to_iterable_dataset(), "stream")):
        with pytest.raises(
            ValueError, match=f"{what}.* 4 .*one generation batch|{what}.*one generation batch needs 4"
        ):
            train(tmp_path, data)
