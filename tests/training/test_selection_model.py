"""PCL and GAIN-RL through `trainer.train()`: the prompts that they choose, and exact resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import TrainerCallback

from hf_effi import EffiGRPOConfig, EffiGRPOTrainer
from hf_effi.errors import RefusedError
from hf_effi.functional.rollouts import PassRateBand, ShuffledPrompts
from hf_effi.hub.recipe import recipe_of
from hf_effi.selection import HIVE, PCL, VIP, BufferedPrompts, GainRL
from tests.helpers import (
    assert_bitwise_equal,
    binary_hash_reward,
    grpo_args,
    prompt_dataset,
    run_grpo,
    tiny_gpt2,
    tiny_qwen3,
    tiny_tokenizer,
)

ROWS = 24
BUILD: dict[str, Callable[[], Any]] = {
    "pcl": lambda: PCL(ROWS, seed=3),
    "pcl_model": lambda: PCL(ROWS, value="model", value_model=tiny_gpt2(), seed=3, learning_rate=1e-3),
    "gain_rl": lambda: GainRL(ROWS, subset=5, seed=3),
    "hive": lambda: HIVE(PCL(ROWS, seed=3)),
    "stream": lambda: BufferedPrompts(PCL(10, seed=3), 10),
    "stream_model": lambda: BufferedPrompts(
        PCL(10, value="model", value_model=tiny_gpt2(), value_tokenizer=tiny_tokenizer(), candidates=2), 10
    ),
}


def train(
    folder: Path, selector: Any, resume: Path | None = None, rewards: Any = None, data: Any = None, **over: Any
) -> Any:
    kwargs = {name: over.pop(name) for name in ("rollout_allocator", "group_filter", "callbacks") if name in over}
    args = grpo_args(folder, EffiGRPOConfig, **over)
    if data is None and isinstance(selector, BufferedPrompts):
        data = prompt_dataset(ROWS).to_iterable_dataset()
    return run_grpo(
        EffiGRPOTrainer,
        args,
        reward_funcs=rewards or binary_hash_reward,
        train_dataset=prompt_dataset(ROWS) if data is None else data,
        resume_from_checkpoint=resume and str(resume),
        prompt_selector=selector,
        **kwargs,
    )


def without_time(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in e.items() if not any(w in k for w in ("time", "seconds"))} for e in log if "loss" in e]


def right_for_short_rows(prompts: list[str], **kwargs: Any) -> list[float]:
    """Prompts of rows 0-7 are solved half the time, the others never."""
    rows = [int(text.split(":")[0]) for text in prompts]
    return [float(place % 2) if row < 8 else 0.0 for place, row in enumerate(rows)]


@pytest.mark.parametrize("name", BUILD)
def test_resume_anywhere_equals_the_uninterrupted_run(tmp_path: Path, name: str) -> None:
    over = {"save_strategy": "steps", "save_steps": 1, "max_steps": 8, "num_iterations": 2}  # two steps a generation
    whole = train(tmp_path / "whole", BUILD[name](), **over)
    for stop in (3, 6):  # inside a generation, and between two
        resumed = train(tmp_path / "resumed", BUILD[name](), tmp_path / "whole" / f"checkpoint-{stop}", **over)
        assert_bitwise_equal(whole.model, resumed.model, what=f"resumed at {stop}")
        assert without_time(whole.state.log_history) == without_time(resumed.state.log_history)
    if name == "hive":
        kept, offered = (
            [e[f"effi/select/entropy_{what}"] for e in whole.state.log_history if "effi/select/explored" in e]
            for what in ("kept", "offered")
        )
        assert len(kept) == 4 and all(a > b for a, b in zip(kept, offered, strict=True))
        assert {"hive", "pcl"} <= set(recipe_of(whole)["methods"])
        return
    if name.startswith("stream"):
        read = [e["effi/select/rows_read"] for e in whole.state.log_history if "effi/select/rows_read" in e]
        assert read == [10.0, 12.0, 14.0, 16.0]
        return
    named = {key for entry in whole.state.log_history for key in entry if key.startswith("effi/select/")}
    assert named == {
        "gain_rl": {f"effi/select/{x}" for x in ("mean_rank", "accuracy", "angle")},
    }.get(name, {f"effi/select/{x}" for x in ("filter_seconds", "explored", "value_selected", "explained_variance")})


def test_pcl_with_one_candidate_is_the_shuffled_stream(tmp_path: Path) -> None:
    plain = train(tmp_path, ShuffledPrompts(ROWS, seed=3))
    read = train(tmp_path, PCL(ROWS, candidates=1, explore=0.0, seed=3))
    assert_bitwise_equal(plain.model, read.model)


def test_pcl_learns_which_prompts_can_be_solved(tmp_path: Path) -> None:
    served: list[int] = []

    def reward(prompts: list[str], **kwargs: Any) -> list[float]:
        served.extend(int(text.split(":")[0]) for text in prompts[::2])
        return right_for_short_rows(prompts)

    selector = PCL(ROWS, explore=0.0, learning_rate=0.1, value_steps=8, seed=3)
    trainer = train(tmp_path, selector, rewards=reward, max_steps=30, learning_rate=0.0)
    assert len(served) == 60
    share = sum(row < 8 for row in served[-30:]) / 30
    assert share > 0.55 > 8 / ROWS
    explained = [
        e["effi/select/explained_variance"] for e in trainer.state.log_history if "effi/select/explained_variance" in e
    ]
    assert all(value <= 1 for value in explained)


def test_gain_rl_serves_its_order(tmp_path: Path) -> None:
    served: list[int] = []

    def reward(prompts: list[str], **kwargs: Any) -> list[float]:
        served.extend(int(text.split(":")[0]) for text in prompts[::2])
        return [1.0] * len(prompts)

    selector = GainRL(ROWS, subset=2, width=1e-3, step=2.5 / ROWS)  # so narrow that it takes the nearest ranks
    trainer = train(tmp_path, selector, rewards=reward, max_steps=4, learning_rate=0.0)
    order = selector._order.tolist()
    ranks = [order.index(row) for row in served]
    assert set(ranks[:2]) == {0, 1}
    means = [e["effi/select/mean_rank"] for e in trainer.state.log_history if "loss" in e]
    for step, mean in enumerate(means):
        assert all(abs(rank - mean) <= 2 for rank in ranks[2 * step : 2 * step + 2])
    assert means == sorted(means) and means[-1] > 4
    # The scores are for the taking: as a column they replace the pass.
    data = prompt_dataset(ROWS)
    scored = Dataset.from_dict({**data[:], "angle": selector.scores.tolist()})
    again = GainRL(ROWS, scores_column="angle", subset=2)
    train(tmp_path, again, data=scored, max_steps=1)
    assert again._order.tolist() == order


def test_conversations_and_refills(tmp_path: Path) -> None:
    for selector in (PCL(ROWS, explore=0.0), GainRL(ROWS)):
        args = grpo_args(tmp_path, EffiGRPOConfig, difficulty_range=(0, 1), difficulty_max_rounds=3)
        trainer = run_grpo(
            EffiGRPOTrainer,
            args,
            model=tiny_qwen3(end_tokens=10),
            train_dataset=prompt_dataset(ROWS, conversational=True),
            prompt_selector=selector,
        )
        assert trainer.state.global_step == 3


@pytest.mark.parametrize("rows", [ROWS, 7])
def test_a_buffered_stream_serves_no_row_twice_in_a_pass(tmp_path: Path, rows: int) -> None:
    served: list[str] = []

    def reward(prompts: list[str], **kwargs: Any) -> list[float]:
        served.extend(prompts[::2])
        return right_for_short_rows(prompts)

    data = prompt_dataset(rows)
    selector = BufferedPrompts(PCL(6, candidates=3, seed=1), 6)
    train(tmp_path, selector, rewards=reward, data=data.to_iterable_dataset(), max_steps=8, num_train_epochs=4)
    assert len(served) == 16 and selector._rows.count == 6 + 14  # the last two are still in their places
    if rows == ROWS:
        assert len(set(served)) == 16 and set(served) <= set(data["prompt"][:20])
        assert served != data["prompt"][:16]
    else:
        assert max(map(served.count, served)) <= 4  # nearly three passes


def test_filters_and_callbacks_can_read_the_rows_of_all_rounds_of_a_stream(tmp_path: Path) -> None:
    read: list[int] = []

    class Reads(TrainerCallback):
        def on_rollouts(self, *args: Any, groups: Any, **kwargs: Any) -> None:
            assert len(set(groups.column("prompt"))) == len(groups.rows)
            read.append(len(groups.rows))

    wrong: Any = lambda completions, **kwargs: [0.0] * len(completions)  # noqa: E731
    selector = BufferedPrompts(PCL(6, seed=1), 6)
    over = {"group_filter": PassRateBand(0, 1), "difficulty_max_rounds": 3, "callbacks": [Reads()]}
    train(tmp_path, selector, rewards=wrong, **over)
    assert read == [6, 6, 6]


def test_what_a_stream_needs_is_said(tmp_path: Path) -> None:
    stream = prompt_dataset(ROWS).to_iterable_dataset()
    with pytest.raises(RefusedError, match="hf_effi.selection.BufferedPrompts, which reads rows ahead"):
        train(tmp_path, PCL(ROWS), data=stream)
    with pytest.raises(RefusedError, match="rollout_allocator=VIP divides completions by what was seen"):
        train(tmp_path, BufferedPrompts(PCL(8), 8), data=stream, rollout_allocator=VIP())
    with pytest.raises(RefusedError, match="is for streaming datasets, and this one has 24 rows: pass PCL itself"):
        train(tmp_path, BufferedPrompts(PCL(8), 8), data=prompt_dataset(ROWS))
