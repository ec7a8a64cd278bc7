"""CPPO completion pruning through `trainer.train()`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer

from hf_effi.functional.rollouts import AdvantagePruner
from hf_effi.trainers.grpo.config import EffiGRPOConfig
from hf_effi.trainers.grpo.trainer import EffiGRPOTrainer
from tests.helpers import (
    assert_bitwise_equal,
    binary_hash_reward,
    grpo_args,
    prompt_dataset,
    run_grpo,
    save_tiny,
    tiny_qwen3,
    tiny_tokenizer,
)
from tests.training.test_grpo_filter import Spy, metric

GROUP = 4


def train(tmp_path: Any, cls: type = Spy, rewards: Any = binary_hash_reward, **over: Any) -> Any:
    settings = {"per_device_train_batch_size": 8, "num_generations": GROUP, "gradient_accumulation_steps": 2}
    config = GRPOConfig if cls is GRPOTrainer else EffiGRPOConfig
    kwargs = {name: over.pop(name) for name in ("rollout_pruner", "train_dataset") if name in over}
    return run_grpo(cls, grpo_args(tmp_path, config, **{**settings, **over}), reward_funcs=rewards, **kwargs)


class Recorder(AdvantagePruner):
    """Keeps every advantage vector and mask."""

    calls: list = []

    def keep(self, groups: Any) -> torch.Tensor:
        mask = super().keep(groups)
        self.calls.append((groups.advantages.reshape(-1).clone(), mask.reshape(-1)))
        return mask


@pytest.mark.parametrize("scope", ["group", "rank", "global"])
@pytest.mark.parametrize("rate", [0.5, 0.75])
def test_allocation_keeps_trained_rows_constant_and_divides_the_steps(tmp_path: Any, scope: str, rate: float) -> None:
    factor = round(1 / (1 - rate))
    data = prompt_dataset(32)
    over = {"max_steps": -1, "num_train_epochs": 1, "train_dataset": data}
    trainer = train(tmp_path, prune_rate=rate, prune_scope=scope, **over)
    stock = train(tmp_path, GRPOTrainer, **over)
    assert trainer.state.max_steps == stock.state.max_steps // factor
    assert metric(trainer, "effi/rows_generated") == [16.0 * factor] * trainer.state.max_steps
    for batch in trainer.batches:
        assert batch["advantages"].numel() == 16
        assert batch["num_items_in_batch"] == batch["completion_mask"].sum()
    assert metric(trainer, "effi/dropped/pruned") == [16.0 * (factor - 1)] * trainer.state.max_steps


@pytest.mark.parametrize("scope", ["group", "rank", "global"])
def test_trained_rows_are_the_top_of_their_pool(tmp_path: Any, scope: str) -> None:
    Recorder.calls = []
    trainer = train(tmp_path, rollout_pruner=Recorder(0.5, scope=scope), max_steps=2)
    size = {"group": GROUP, "rank": 16, "global": 16}[scope]
    for (advantages, mask), batch in zip(Recorder.calls, trainer.batches, strict=True):
        for pool, kept in zip(advantages.split(size), mask.split(size), strict=True):
            assert pool[kept].abs().min() >= pool[~kept].abs().max()
        assert sorted(batch["advantages"].tolist()) == sorted(advantages[mask].tolist())


def test_without_allocation_fewer_rows_are_trained(tmp_path: Any) -> None:
    trainer = train(tmp_path, prune_rate=0.75, prune_allocation=False)
    assert [batch["advantages"].numel() for batch in trainer.batches] == [4, 4, 4]
    assert metric(trainer, "effi/rows_generated") == [16.0] * 3


def test_log_probs_only_for_kept_rows(tmp_path: Any) -> None:
    trainer = train(tmp_path, prune_rate=0.75, prune_allocation=False, num_iterations=2, exact_savings="off")
    assert trainer.batches[0]["old_per_token_logps"].shape[0] == 4
    first, second = (entry["effi/tokens_real"] for entry in trainer.state.log_history[:2])
    assert first == 2 * second  # one no-grad pass and one training pass over the same 4 rows


def test_old_log_probs_of_kept_rows_are_those_of_stock(tmp_path: Any) -> None:
    over = {"num_iterations": 2, "max_steps": 1, "exact_savings": "off"}
    pruned = train(tmp_path, prune_rate=0.5, prune_allocation=False, **over).batches[0]
    whole = train(tmp_path, **over).batches[0]
    for row in range(len(pruned["advantages"])):
        length = int(pruned["completion_mask"][row].sum())
        text = pruned["completion_ids"][row, :length]
        prompt = pruned["prompt_ids"][row][pruned["prompt_mask"][row].bool()]
        match = [
            i
            for i in range(len(whole["advantages"]))
            if int(whole["completion_mask"][i].sum()) == length
            and torch.equal(whole["completion_ids"][i, :length], text)
            and torch.equal(whole["prompt_ids"][i][whole["prompt_mask"][i].bool()], prompt)
        ]
        assert match
        expected = whole["old_per_token_logps"][match[0], :length]
        assert torch.allclose(pruned["old_per_token_logps"][row, :length], expected, atol=1e-6)


@pytest.mark.parametrize("peft", [False, True])
def test_reference_log_probs_only_for_kept_rows(tmp_path: Any, peft: bool) -> None:
    from peft import LoraConfig

    save_tiny(tiny_qwen3(), tiny_tokenizer(), tmp_path / "model")
    over = {"beta": 0.04, "max_steps": 1, "num_generations": GROUP, "per_device_train_batch_size": 8}
    kwargs: dict[str, Any] = {"model": str(tmp_path / "model")}
    if peft:
        kwargs["peft_config"] = LoraConfig(r=2, target_modules=["q_proj"])
    pruned = run_grpo(
        Spy, grpo_args(tmp_path, EffiGRPOConfig, prune_rate=0.5, prune_allocation=False, **over), **kwargs
    ).batches[0]
    whole = run_grpo(Spy, grpo_args(tmp_path, EffiGRPOConfig, exact_savings="off", **over), **kwargs).batches[0]
    assert pruned["ref_per_token_logps"].shape[0] == 4 and whole["ref_per_token_logps"].shape[0] == 8
    totals = (whole["ref_per_token_logps"] * whole["completion_mask"]).sum(1).tolist()
    for total in (pruned["ref_per_token_logps"] * pruned["completion_mask"]).sum(1).tolist():
        assert total < 0 and min(abs(total - other) for other in totals) < 1e-4


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "bnpo"])
def test_original_normalizer_counts_dropped_rows_as_rows_without_gradient(tmp_path: Any, loss_type: str) -> None:
    # One micro-batch, so that the loss can be written down: the pruned step with the original normaliser must equal
    # the stock step whose pruned rows have advantage zero.
    over = {"gradient_accumulation_steps": 1, "max_steps": 1, "loss_type": loss_type, "optim": "sgd"}
    over |= {"learning_rate": 1.0, "max_grad_norm": 0.0}

    class Zeroed(GRPOTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            out = super()._generate_and_score_completions(inputs)
            mask = AdvantagePruner(0.5, scope="rank").keep_rows(out["advantages"], GROUP, 1, step=1)
            return {**out, "advantages": out["advantages"] * mask}

    expected = run_grpo(
        Zeroed, grpo_args(tmp_path, GRPOConfig, per_device_train_batch_size=8, num_generations=GROUP, **over)
    )
    got = train(tmp_path, prune_rate=0.5, prune_allocation=False, prune_normalizer="original", **over)
    for a, b in zip(expected.model.parameters(), got.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=2e-6)


def test_balance_signs_keeps_both(tmp_path: Any) -> None:
    table = {"rewards": lambda completions, **k: [1.0, 0.0, 0.0, 0.0] * (len(completions) // 4)}
    over = {"prune_rate": 0.5, "prune_scope": "group", **table}
    one_sided = train(tmp_path, prune_balance_signs=False, **over)
    balanced = train(tmp_path, prune_balance_signs=True, **over)
    assert metric(balanced, "effi/prune/groups_with_one_sign") == [0.0] * 3
    assert metric(balanced, "effi/prune/positive_fraction") == [0.5] * 3
    assert metric(one_sided, "effi/prune/abs_advantage_kept") >= metric(balanced, "effi/prune/abs_advantage_kept")


def test_rate_zero_is_stock_to_the_bit(tmp_path: Any) -> None:
    stock = train(tmp_path, GRPOTrainer)
    ours = train(tmp_path, prune_rate=0.0, exact_savings="off")
    assert_bitwise_equal(stock.model, ours.model)


def test_filter_goes_before_pruning(tmp_path: Any) -> None:
    from tests.helpers import TableReward

    trainer = train(
        tmp_path,
        rewards=TableReward([[0.0] * 4, [1.0, 0.0, 0.0, 0.0]]),
        prune_rate=0.5,
        difficulty_range=(0, 1),
        difficulty_max_rounds=6,
    )
    for batch in trainer.batches:
        assert batch["advantages"].numel() == 16
        assert (batch["advantages"] != 0).all()


def test_random_metric_is_the_control(tmp_path: Any) -> None:
    trainer = train(tmp_path, prune_rate=0.5, prune_metric="random")
    assert [batch["advantages"].numel() for batch in trainer.batches] == [16] * 3
    again = train(tmp_path, prune_rate=0.5, prune_metric="random")
    assert_bitwise_equal(trainer.model, again.model)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "bnpo", "cispo", "vespo", "luspo"])
def test_pruning_composes_with_every_loss_and_reuse(tmp_path: Any, loss_type: str) -> None:
    trainer = train(
        tmp_path,
        cls=EffiGRPOTrainer,
        prune_rate=0.75,
        loss_type=loss_type,
        num_iterations=2,
        steps_per_generation=4,
        train_dataset=prompt_dataset(64),
    )
    losses = metric(trainer, "loss")
    assert len(losses) == 3 and all(abs(loss) < 100 for loss in losses)
    assert max(metric(trainer, "grad_norm")) > 0
