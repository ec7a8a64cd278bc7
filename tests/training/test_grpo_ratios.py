"""
Importance ratios of the vLLM correction, with a stand-in for the engine: joined by their mode, padded as TRL pads
them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer

from hf_effi.functional.rollouts import AdvantagePruner
from hf_effi.trainers.grpo.config import EffiGRPOConfig
from hf_effi.trainers.grpo.rows import Ratios
from hf_effi.trainers.grpo.trainer import EffiGRPOTrainer
from tests.helpers import TableReward, grpo_args, prompt_dataset, run_distributed, run_grpo

GROUP = 4
MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


class Engine(GRPOTrainer):
    """Generates as without vLLM, and gives made-up log-probs of the engine. Calls after the first are cut short."""

    #: Most tokens of the completions of each call of a generation; the last goes on.
    widths: tuple[int, ...] = (8,)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.use_vllm = True
        self.calls = 0

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        self.use_vllm = False
        try:
            ids, _ = super()._generate_single_turn(*args, **kwargs)
        finally:
            self.use_vllm = True
        width = self.widths[min(self.calls, len(self.widths) - 1)]
        self.calls += 1
        ids = [row[:width] for row in ids]
        return ids, [[-2.0 - 0.7 * (token % 7) for token in row] for row in ids]


class Records(EffiGRPOTrainer, Engine):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.trained: list[dict[str, Any]] = []
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        self.calls = 0
        batch = super()._generate_and_score_completions(inputs)
        self.trained.append(batch)
        return batch


def train(folder: Any, cls: type = Records, reward: Any = None, size: int = 16, **over: Any) -> Any:
    settings = {"per_device_train_batch_size": 8, "num_generations": GROUP, "max_steps": 1, "optim": "sgd"}
    settings |= {"learning_rate": 1.0, "max_grad_norm": 0.0}
    kwargs = {name: over.pop(name) for name in ("rollout_pruner",) if name in over}
    config = EffiGRPOConfig if issubclass(cls, EffiGRPOTrainer) else GRPOConfig
    return run_grpo(
        cls,
        grpo_args(folder, config, **{**settings, **over}),
        reward_funcs=reward or TableReward([[1.0, 0.0, 0.0, 0.0], [0.0] * 4]),
        train_dataset=prompt_dataset(size),
        **kwargs,
    )


def expected_ratio(batch: dict[str, Any], mode: str) -> torch.Tensor:
    """TRL's formula on the joined rows."""
    difference = (batch["old_per_token_logps"] - batch["sampling_per_token_logps"]) * batch["completion_mask"]
    if mode.startswith("sequence"):
        difference = difference.sum(1, keepdim=True)
    ratio = difference.exp()
    return ratio.clamp(max=3.0) if mode.endswith("truncate") else ratio.masked_fill(ratio > 3.0, 0.0)


@pytest.mark.parametrize("widths", [(8, 1), (8, 3, 1), (1, 8), (1,)])
@pytest.mark.parametrize("mode", MODES)
def test_rounds_of_any_width_are_joined_as_if_they_were_one(tmp_path: Any, mode: str, widths: tuple) -> None:
    class Cut(Records):
        pass

    Cut.widths = widths
    over = {"difficulty_range": (0, 1), "difficulty_max_rounds": 4, "vllm_importance_sampling_mode": mode}
    trainer = train(tmp_path, Cut, gradient_accumulation_steps=2, **over)
    assert trainer.state.log_history[0]["effi/gen_rounds"] > 1
    (batch,) = trainer.trained
    ratio, lengths = batch["importance_sampling_ratio"], batch["completion_mask"].sum(1)
    assert ratio.shape == ((16, 1) if mode.startswith("sequence") else batch["completion_mask"].shape)
    assert len(widths) == 1 or len(set(lengths.tolist())) > 1
    assert torch.allclose(ratio, expected_ratio(batch, mode), rtol=1e-5)
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


@pytest.mark.parametrize(("low", "high", "padding"), [(None, 3.0, 1.0), (1.5, 3.0, 1.5), (None, 0.5, 0.5)])
def test_the_padding_is_that_of_the_clipping(tmp_path: Any, low: Any, high: Any, padding: float) -> None:
    clips = {"vllm_importance_sampling_clip_min": low, "vllm_importance_sampling_clip_max": high}
    trainer = train(tmp_path, prune_rate=0.5, vllm_importance_sampling_mode="token_truncate", **clips)
    assert Ratios.of(trainer).padding == padding
    trainer.vllm_importance_sampling_mode = "token_mask"
    assert Ratios.of(trainer).padding == float(padding == 1.0)
    trainer.vllm_importance_sampling_mode = "sequence_mask"
    assert Ratios.of(trainer).padding is None


@pytest.mark.parametrize("loss_type", ["vespo", "dapo", "grpo"])
def test_the_joined_batch_has_the_gradient_of_stock(tmp_path: Any, loss_type: str) -> None:
    """VESPO adds up the ratios' logarithms over all columns, so that a padding of 0 would change every weight."""

    class All:
        def keep(self, groups: Any) -> torch.Tensor:
            return torch.ones_like(groups.rewards, dtype=torch.bool)

    over = {"loss_type": loss_type, "gradient_accumulation_steps": 2, "max_steps": 2}
    over |= {"vllm_importance_sampling_mode": "token_truncate"}
    table = [[1.0, 0.0, 0.5, 0.0], [0.0, 1.0, 1.0, 0.5]]
    stock = train(tmp_path, Engine, TableReward(table), **over)
    ours = train(tmp_path, Records, TableReward(table), rollout_pruner=All(), **over)
    pairs = zip(stock.model.parameters(), ours.model.parameters(), strict=True)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)


@pytest.mark.parametrize("savings", ["skip", "off"])
def test_a_sequence_whose_ratio_was_masked_has_no_gradient(tmp_path: Any, savings: str) -> None:
    over = {"vllm_importance_sampling_mode": "sequence_mask", "gradient_accumulation_steps": 2}
    table = TableReward([[1.0, 0.0, 0.5, 0.0], [0.0, 1.0, 1.0, 0.5]])
    ours = train(tmp_path, Records, table, exact_savings=savings, **over)
    (batch,) = ours.trained
    masked = (batch["importance_sampling_ratio"] == 0).squeeze(1)
    assert 0 < int(masked.sum()) < 16
    trained = int(((batch["advantages"] != 0) & ~masked).sum())
    assert ours.state.log_history[0]["effi/rows_trained"] == trained
    stock = train(tmp_path, Engine, TableReward(table.spare), **over)
    pairs = zip(stock.model.parameters(), ours.model.parameters(), strict=True)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)


class MostlyFirst(AdvantagePruner):
    """12 rows of the first rank and 8 of the other, so that rows have to move."""

    def __init__(self) -> None:
        super().__init__(0.5)

    def keep(self, groups: Any) -> torch.Tensor:
        rows = groups.rewards.numel()
        return (torch.arange(rows) < rows // 2 + 4).view_as(groups.rewards)


def across_ranks() -> dict[str, Any]:
    """The second rank has completions of one token."""
    import os
    import tempfile

    class Cut(Records):
        widths = (1,) if os.environ["RANK"] == "1" else (8,)

    found = {}
    for mode in ("token_truncate", "sequence_truncate"):
        over = {"vllm_importance_sampling_mode": mode, "gradient_accumulation_steps": 2}
        table = TableReward([[1.0, 0.0, 0.5, 0.0]])
        trainer = train(tempfile.mkdtemp(), Cut, table, rollout_pruner=MostlyFirst(), **over)
        (batch,) = trainer.trained
        found[mode] = [
            batch["importance_sampling_ratio"],
            expected_ratio(batch, mode),
            batch["completion_mask"].sum(1),
        ]
    return found


def test_rows_that_move_between_ranks_keep_their_ratio() -> None:
    ranks = run_distributed(across_ranks, 2)
    for mode in ranks[0]:
        lengths = torch.cat([rank[mode][2] for rank in ranks])
        assert {1} < set(lengths.tolist())
        for rank in ranks:
            ratio, expected, _ = rank[mode]
            assert len(ratio) == 10 and torch.allclose(ratio, expected, rtol=1e-5)
