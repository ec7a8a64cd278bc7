"""Advantage transforms through `trainer.train()`: what reaches the loss is what the pure function says."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import GRPOTrainer

from hf_effi.functional.rollouts import (
    entropic_advantages,
    standardized,
    token_advantages,
    token_energies,
    weighted_advantages,
)
from hf_effi.selection import (
    OPO,
    OTB,
    DurationWeights,
    EntropicAdvantages,
    MilestoneReward,
    OBLRBaseline,
    ProcessRewards,
    side_column,
)
from hf_effi.trainers.grpo.config import EffiGRPOConfig
from hf_effi.trainers.grpo.trainer import EffiGRPOTrainer
from tests.helpers import TableReward, assert_bitwise_equal, binary_hash_reward, grpo_args, length_reward, run_grpo

GROUP = 4
LOSSES = ("dapo", "grpo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo")


class Spy(EffiGRPOTrainer):
    """Records what reaches the loss, and the rewards."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.batches: list[dict[str, Any]] = []
        self.rewards: list[torch.Tensor] = []
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        if self.model.training:
            self.batches.append(batch)
            self.rewards.append(self._rollouts.rewards.clone())
        return batch


def train(tmp_path: Any, transform: Any = None, reward: Any = length_reward, cls: type = Spy, **over: Any) -> Any:
    settings = {"per_device_train_batch_size": 8, "num_generations": GROUP, **over}
    names = ("model", "resume_from_checkpoint", "rollout_pruner", "group_filter")
    kwargs = {name: settings.pop(name) for name in names if name in settings}
    if cls is not GRPOTrainer:
        kwargs["advantage_transform"] = transform
    config = EffiGRPOConfig if cls is not GRPOTrainer else grpo_args(tmp_path).__class__
    return run_grpo(cls, grpo_args(tmp_path, config, **settings), reward_funcs=reward, **kwargs)


def metric(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_tokens_of_trls_advantages_are_trl(tmp_path: Any) -> None:
    stock = train(tmp_path, cls=GRPOTrainer)
    same = train(tmp_path, lambda groups: groups.advantages, exact_savings="off")
    assert_bitwise_equal(stock.model, same.model)


def test_opo(tmp_path: Any) -> None:
    trainer = train(tmp_path, OPO())
    assert any(len(set(batch["completion_mask"].sum(1).tolist())) > 1 for batch in trainer.batches)
    for batch, rewards in zip(trainer.batches, trainer.rewards, strict=True):
        lengths = batch["completion_mask"].sum(1).view(-1, GROUP).double()
        expected = weighted_advantages(rewards.view(-1, GROUP), lengths)
        assert torch.allclose(batch["advantages"].view(-1, GROUP), expected, atol=1e-6)
        assert torch.allclose((expected.double() * lengths).sum(1), torch.zeros(2).double(), atol=1e-5)


def test_leave_one_out_and_entropic(tmp_path: Any) -> None:
    for transform, function in (
        (EntropicAdvantages(), entropic_advantages),
        (EntropicAdvantages(kl=0.1), lambda rewards: entropic_advantages(rewards, 0.1)),
    ):
        trainer = train(tmp_path, transform, max_steps=1)
        expected = function(trainer.rewards[0].view(-1, GROUP))
        assert torch.allclose(trainer.batches[0]["advantages"].view(-1, GROUP), expected, atol=1e-6)
    trainer = train(tmp_path, OBLRBaseline(), max_steps=1)
    batch = trainer.batches[0]
    lengths = batch["completion_mask"].sum(1).view(-1, GROUP).double()
    expected = weighted_advantages(trainer.rewards[0].view(-1, GROUP), lengths, leave_one_out=True)
    assert torch.allclose(batch["advantages"].view(-1, GROUP), expected, atol=1e-6)


def by_hand(trainer: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and squares of an untrained model, from the logits of the whole vocabulary."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = trainer.model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    columns = batch["completion_ids"].size(1)
    logs = logits[:, -columns - 1 : -1].log_softmax(-1)
    return logs.gather(2, batch["completion_ids"].unsqueeze(2)).squeeze(2), logs.exp().square().sum(-1)


def test_otb_gives_each_token_an_advantage(tmp_path: Any) -> None:
    trainer = train(tmp_path, OTB(), max_steps=1, learning_rate=0.0)
    batch = trainer.batches[0]
    mask = batch["completion_mask"].bool()
    assert batch["advantages"].shape == mask.shape
    energies = token_energies(*by_hand(trainer, batch), mask).view(2, GROUP, -1)
    expected = token_advantages(trainer.rewards[0].view(2, GROUP), energies, mask.view(2, GROUP, -1))
    assert torch.allclose(batch["advantages"].view(2, GROUP, -1), expected, atol=1e-4)
    assert not batch["advantages"][~mask].any()
    shown = list(trainer._logs["advantages"])
    assert len(shown) == 8 and any(shown)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_loss_takes_them(tmp_path: Any, loss_type: str) -> None:
    for transform in (OTB(), OBLRBaseline("energies")):
        trainer = train(tmp_path, transform, loss_type=loss_type, max_steps=1, gradient_accumulation_steps=2)
        (norm,) = metric(trainer, "grad_norm")
        assert math.isfinite(norm) and norm > 0


@pytest.mark.parametrize("transform", [OPO(), OTB(), OBLRBaseline("energies"), EntropicAdvantages()])
def test_exact_savings_change_no_gradient(tmp_path: Any, transform: Any) -> None:
    over = {"optim": "sgd", "learning_rate": 10.0, "max_grad_norm": 0.0, "max_steps": 1}
    table = TableReward([[1.0, 0.0, 0.0, 0.5], [0.1] * 4])
    plain = train(tmp_path, transform, table, exact_savings="off", **over)
    table = TableReward([[1.0, 0.0, 0.0, 0.5], [0.1] * 4])
    saved = train(tmp_path, transform, table, **over)
    for a, b in zip(plain.model.parameters(), saved.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    assert metric(saved, "effi/frac_zero_var_groups") == [0.5] and metric(saved, "effi/rows_trained")[0] <= 4


@pytest.mark.parametrize("name", ["opo", "otb", "entropic", "steps"])
def test_resume_inside_of_a_generation(tmp_path: Path, name: str) -> None:
    transforms = {
        "opo": OPO(),
        "otb": OTB(),
        "entropic": EntropicAdvantages(),
        "steps": ProcessRewards(["first", "second"], how="mean"),
    }
    rewards = [binary_hash_reward]
    if name == "steps":
        rewards += [side_column(first), side_column(second)]

    def run(folder: str, resume: Path | None = None) -> Any:
        return train(
            tmp_path / folder,
            transforms[name],
            rewards,
            max_steps=6,
            num_iterations=2,
            gradient_accumulation_steps=2,
            steps_per_generation=4,
            per_device_train_batch_size=4,
            save_strategy="steps",
            save_steps=1,
            resume_from_checkpoint=resume and str(resume),
        )

    whole = run("whole")
    for stop in (1, 4, 5):
        resumed = run("resumed", tmp_path / "whole" / f"checkpoint-{stop}")
        assert_bitwise_equal(whole.model, resumed.model, what=f"resumed at {stop}")


# --- side columns as signals -----------------------------------------------------------------------------------------


def first(completions: list[str], **kwargs: Any) -> list[float]:
    return [0.1 * len(text) for text in completions]


def second(completions: list[str], **kwargs: Any) -> list[float | None]:
    return [None if len(text) % 2 else 0.5 for text in completions]


def test_process_rewards_from_side_columns(tmp_path: Any) -> None:
    rewards = [binary_hash_reward, side_column(first), side_column(second)]
    trainer = train(tmp_path, ProcessRewards(["first", "second"], how="mean", weight=2.0), rewards, max_steps=1)
    side = trainer._rollouts.side
    steps = torch.stack([side["first"], side["second"]], 1)
    both = (trainer.rewards[0][:, 0] + 2.0 * torch.nanmean(steps, 1)).view(-1, GROUP)
    assert torch.allclose(trainer.batches[0]["advantages"].view(-1, GROUP), standardized(both).float(), atol=1e-5)
    with pytest.raises(ValueError, match="reads the side column 'third'; there are: first, second"):
        train(tmp_path, ProcessRewards(["third"]), rewards, max_steps=1)


def test_duration_weights(tmp_path: Any) -> None:
    plain = train(tmp_path, None, [length_reward, side_column(first)], max_steps=1)
    weighted = train(tmp_path, DurationWeights("first", force=True), [length_reward, side_column(first)], max_steps=1)
    seconds = weighted._rollouts.side["first"]
    expected = plain.batches[0]["advantages"] * (seconds / seconds.mean())
    assert torch.allclose(weighted.batches[0]["advantages"], expected.float(), atol=1e-5)


def test_milestones_reward(tmp_path: Any) -> None:
    def finished(completions: list[str], **kwargs: Any) -> list[float | None]:
        return [1.0 if len(text) < 4 else None for text in completions]

    reward = MilestoneReward([r"\d", r"\d.*\d"], finished, fail=-1.0)
    trainer = train(tmp_path, None, reward, max_steps=1, scale_rewards="none")
    assert {round(float(value), 1) for value in trainer.rewards[0]} <= {1.0, -1.0, -0.9, -0.8}
    assert trainer.reward_func_names == ["milestone_reward"]
