"""Two gloo ranks read the same of prompts, and choose alike with what they read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_effi import EffiGRPOConfig, EffiGRPOTrainer
from hf_effi.trainers.grpo.context import PromptReader
from tests.helpers import assert_bitwise_equal, grpo_args, run_distributed, run_grpo, weights_of
from tests.training.test_selection_model import BUILD, train, without_time

ROWS = [5, 0, 11, 3, 9]  # an odd number


def read(folder: Path) -> dict[str, torch.Tensor]:
    trainer = run_grpo(EffiGRPOTrainer, grpo_args(folder, EffiGRPOConfig), train=False)
    found = {}
    for layer in ("last", "mlp"):
        context = PromptReader(trainer, tokens_per_forward=40)
        found[layer] = context.read_prompts(ROWS, lambda states, ids: states[-1], layer)
        found[f"{layer}, one row"] = context.read_prompts(ROWS[:1], lambda states, ids: states[-1], layer)
    found["spread"] = context.spread(ROWS, lambda rows: torch.tensor(rows).unsqueeze(1))
    return found


def everything(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"read": read(folder)}
    for name, build in BUILD.items():
        selector = build()
        trainer = train(folder / name, selector, max_steps=3)
        found[name] = {
            "weights": weights_of(trainer.model),
            "state": selector.state_dict(),
            "log": without_time(trainer.state.log_history),
        }
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_distributed(everything, 2, tmp_path_factory.mktemp("ranks"))


def test_what_is_read_is_equal_on_all_ranks_and_at_any_number_of_them(
    ranks: list[dict[str, Any]], tmp_path: Path
) -> None:
    alone = read(tmp_path)
    for name, expected in alone.items():
        first, second = (rank["read"][name] for rank in ranks)
        assert torch.equal(first, second), name
        assert torch.allclose(first, expected, atol=1e-5), name
    assert alone["spread"].flatten().tolist() == ROWS


@pytest.mark.parametrize("name", BUILD)
def test_ranks_choose_alike(ranks: list[dict[str, Any]], name: str) -> None:
    first, second = (rank[name] for rank in ranks)
    assert_bitwise_equal(first["weights"], second["weights"], what=name)
    assert repr(first["state"]) == repr(second["state"])
    assert first["log"] and first["log"][0].keys() == second["log"][0].keys()
