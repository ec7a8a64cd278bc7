"""
Two gloo ranks choose alike from what is in the loss, serve no prompt twice, and average over the same original rows.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_effi.functional.rollouts import ShuffledPrompts
from tests.helpers import (
    TableReward,
    assert_bitwise_equal,
    run_distributed,
    save_tiny,
    tiny_qwen3,
    tiny_tokenizer,
    weights_of,
)
from tests.training import test_grpo_loss_mask as masks
from tests.training import test_grpo_normalizer as normalizer
from tests.training import test_grpo_prompts as prompts

METHODS: dict[str, dict[str, Any]] = {
    "rank": {"prune_rate": 0.5, "prune_scope": "rank"},
    "group": {"prune_rate": 0.5, "prune_scope": "group"},
    "global": {"prune_rate": 0.75, "prune_scope": "global", "max_completion_length": 5},
    "random": {"prune_rate": 0.5, "prune_metric": "random"},
    "filter": {"difficulty_range": (0, 1), "difficulty_max_rounds": 6, "max_completion_length": 2},
    "nothing": {},
}


def masked() -> dict[str, Any]:
    found = {}
    for name, over in METHODS.items():
        # Rewards that differ in every group, so that only the mask can make one dead.
        reward = TableReward([[1.0, 0.0, 0.0, 0.0]]) if name == "filter" else masks.finished
        trainer = masks.train(Path(tempfile.mkdtemp()), reward=reward, max_steps=2, **over)
        found[name] = {
            "weights": weights_of(trainer.model),
            "generated": [int(masks.live(batch).sum()) for batch in trainer.generated],
            "kept": [int(masks.live(batch).sum()) for batch in trainer.trained],
            "gradient": [int(masks.has_gradient(batch).sum()) for batch in trainer.trained],
            "log": trainer.state.log_history,
        }
    return found


def served() -> list[Any]:
    found = []
    for selector in (None, prompts.Recording(40, seed=2)):
        by_step: dict[int, list[str]] = defaultdict(list)

        def dead(completions: Any, trainer_state: Any, by_step: Any = by_step, **kwargs: Any) -> list[float]:
            by_step[trainer_state.global_step] += kwargs["prompts"][:: prompts.GROUP]
            return [0.0] * len(completions)

        over = {"prompt_selector": selector, "per_device_train_batch_size": 6, "max_steps": 3}
        prompts.train(tempfile.mkdtemp(), dead, difficulty_range=(0, 1), difficulty_max_rounds=4, **over)
        told = [] if selector is None else [(rows, groups.pass_rates.tolist()) for rows, groups in selector.told]
        found.append((dict(by_step), told))
    return found


def averaged(folder: Path) -> list[torch.Tensor]:
    found = []
    for loss_type in ("dapo", "grpo"):
        over = {"loss_type": loss_type, "beta": 0.1, "gradient_accumulation_steps": 2}
        expected = normalizer.one_step(normalizer.AllRows, folder, **over)
        over |= {"prune_rate": 0.5, "prune_allocation": False, "prune_normalizer": "original"}
        found += [normalizer.update(expected), normalizer.update(normalizer.one_step(normalizer.Ours, folder, **over))]
    return found


def everything(folder: Path) -> dict[str, Any]:
    return {"masked": masked(), "served": served(), "averaged": averaged(folder)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two ranks did; one start of two processes for all tests."""
    folder = tmp_path_factory.mktemp("ranks")
    save_tiny(tiny_qwen3(end_tokens=10), tiny_tokenizer(), folder / "model")
    return run_distributed(everything, 2, folder)


def test_rows_outside_of_the_loss_are_known_to_all_ranks(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["masked"] for rank in ranks)
    for name, one in first.items():
        other = second[name]
        assert_bitwise_equal(one["weights"], other["weights"], what=name)
        trained = [a + b for a, b in zip(one["gradient"], other["gradient"], strict=True)]
        assert [e["effi/rows_trained"] for e in one["log"] if "effi/rows_trained" in e] == trained
        if name in ("rank", "group", "global", "random"):
            generated = [a + b for a, b in zip(one["generated"], other["generated"], strict=True)]
            kept = [a + b for a, b in zip(one["kept"], other["kept"], strict=True)]
            assert kept == [min(16, alive) for alive in generated], name
        if name == "filter":
            assert sum(e.get("effi/dropped/no_loss_tokens", 0) for e in one["log"]) > 0
    dead = [
        [e["effi/frac_zero_var_groups"] for e in rank["nothing"]["log"] if "loss" in e] for rank in (first, second)
    ]
    assert dead[0] == dead[1]


def test_no_prompt_twice_over_the_ranks(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["served"] for rank in ranks)
    for (one, told), (other, told_other) in zip(first, second, strict=True):
        assert told == told_other
        for step, mine in one.items():
            of_step = mine + other[step]
            assert len(of_step) == 24 and len(set(of_step)) == 24
    rows = [row for chosen, _ in first[1][1] for row in chosen]
    assert rows[:24] == ShuffledPrompts(40, seed=2).select(24)


def test_the_loss_is_averaged_over_the_original_rows_of_all_ranks(ranks: list[dict[str, Any]]) -> None:
    for expected, ours in [rank["averaged"][i : i + 2] for rank in ranks for i in (0, 2)]:
        assert expected.norm() > 1e-3
        assert float((ours - expected).norm() / expected.norm()) < 1e-5
