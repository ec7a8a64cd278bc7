"""`prune_normalizer="original"`: the gradient of all rows, of which the pruned ones have no loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer

from hf_effi.functional.rollouts import AdvantagePruner
from hf_effi.trainers.grpo.config import EffiGRPOConfig
from hf_effi.trainers.grpo.trainer import EffiGRPOTrainer
from tests.helpers import TableReward, binary_hash_reward, grpo_args, run_grpo, save_tiny, tiny_qwen3, tiny_tokenizer

GROUP = 4
LOSSES = ("dapo", "grpo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo")
PRUNER = AdvantagePruner(0.5, scope="rank")


class MovedReference(GRPOTrainer):
    """A reference that differs from the policy: on the first step the KL term would have no gradient."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.ref_model is not None:
            generator = torch.Generator().manual_seed(3)
            with torch.no_grad():
                for weight in self.ref_model.parameters():
                    weight += 0.1 * torch.randn(weight.shape, generator=generator)


class Ours(EffiGRPOTrainer, MovedReference):
    pass


class AllRows(MovedReference):
    """Stock, where the rows that pruning would drop are present and have neither an advantage nor a KL term."""

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        out = super()._generate_and_score_completions(inputs)
        kept = PRUNER.keep_rows(out["advantages"], GROUP, 1, step=1)
        out["advantages"] = out["advantages"] * kept
        if "ref_per_token_logps" in out:
            ids = torch.cat([out["prompt_ids"], out["completion_ids"]], 1)
            mask = torch.cat([out["prompt_mask"], out["completion_mask"]], 1)
            with torch.no_grad():
                own, _, _ = self._get_per_token_logps_and_entropies(
                    self.model, ids, mask, out["completion_ids"].size(1)
                )
            out["ref_per_token_logps"] = torch.where(kept.unsqueeze(1), out["ref_per_token_logps"], own)
        return out


def one_step(cls: type, folder: Any, reward: Any = binary_hash_reward, **over: Any) -> Any:
    """One SGD step at LR 1: the update is the gradient."""
    settings = {"per_device_train_batch_size": 8, "num_generations": GROUP, "max_steps": 1, "optim": "sgd"}
    settings |= {"learning_rate": 1.0, "max_grad_norm": 0.0}
    config = EffiGRPOConfig if issubclass(cls, EffiGRPOTrainer) else GRPOConfig
    if not (folder / "model").exists():
        save_tiny(tiny_qwen3(end_tokens=10), tiny_tokenizer(), folder / "model")
    args = grpo_args(folder, config, **{**settings, **over})
    return run_grpo(cls, args, model=str(folder / "model"), reward_funcs=reward)


def update(trainer: Any) -> torch.Tensor:
    start = tiny_qwen3(end_tokens=10)
    pairs = zip(trainer.model.parameters(), start.parameters(), strict=True)
    return torch.cat([(after - before).detach().double().flatten() for after, before in pairs])


def difference(one: Any, other: Any, factor: float = 1.0) -> float:
    expected = factor * update(other)
    assert expected.norm() > 1e-3
    return float((update(one) - expected).norm() / expected.norm())


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_pruned_rows_count_as_rows_without_a_loss(tmp_path: Any, loss_type: str, beta: float) -> None:
    # `bnpo` divides by the tokens of each micro-batch, so that only a single one can be written down.
    over = {"loss_type": loss_type, "beta": beta, "gradient_accumulation_steps": 1 if loss_type == "bnpo" else 2}
    expected = one_step(AllRows, tmp_path, **over)
    over |= {"prune_rate": 0.5, "prune_allocation": False, "prune_normalizer": "original"}
    ours = one_step(Ours, tmp_path, **over)
    assert difference(ours, expected) < 1e-5
    kept = one_step(Ours, tmp_path, **{**over, "prune_normalizer": "kept"})
    assert difference(kept, expected) > 0.1


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_filtered_and_refilled_rows_do_not_enter(tmp_path: Any, loss_type: str, beta: float) -> None:
    """Half of the rows of the chosen groups are kept, however many groups it took to find those."""
    table = [[0.0] * 4, [1.0, 0.0, 0.0, 0.0], [1.0] * 4]
    over = {"difficulty_range": (0, 1), "difficulty_max_rounds": 6, "loss_type": loss_type, "beta": beta}
    # Completions of one length, so that a share of rows is a share of tokens.
    over |= {"prune_rate": 0.5, "gradient_accumulation_steps": 2, "generation_kwargs": {"min_new_tokens": 8}}
    runs = [
        one_step(Ours, tmp_path, TableReward(table), prune_normalizer=kind, **over) for kind in ("original", "kept")
    ]
    log = runs[0].state.log_history[0]
    assert log["effi/gen_rounds"] > 1 and log["effi/rows_generated"] > 32 and log["effi/underfilled"] == 0
    assert difference(*runs, factor=0.5) < 1e-5


def test_an_entropy_bonus_is_averaged_over_the_original_rows_too(tmp_path: Any) -> None:
    over = {"prune_rate": 0.5, "prune_allocation": False, "entropy_coef": 0.5, "loss_type": "grpo"}
    runs = [one_step(Ours, tmp_path, prune_normalizer=kind, **over) for kind in ("original", "kept")]
    assert difference(*runs, factor=0.5) < 1e-5


def test_fewer_rows_than_micro_batches_are_averaged_over_themselves(tmp_path: Any) -> None:
    """Three rows in four micro-batches of up to three rows: each as often as the others."""

    class FirstThree:
        def keep(self, groups: Any) -> torch.Tensor:
            return (torch.arange(groups.rewards.numel()) < 3).view_as(groups.rewards)

    class Zeroed(GRPOTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            out = super()._generate_and_score_completions(inputs)
            out["advantages"] = out["advantages"] * (torch.arange(len(out["advantages"])) < 3)
            return out

    over = {"loss_type": "grpo", "max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0}
    over |= {"num_generations": GROUP, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 4}
    table = [[1.0, 0.0, 0.5, 0.0]]
    args = grpo_args(tmp_path, EffiGRPOConfig, **over)
    ours = run_grpo(EffiGRPOTrainer, args, reward_funcs=TableReward(table), rollout_pruner=FirstThree())
    stock = run_grpo(Zeroed, grpo_args(tmp_path, GRPOConfig, **over), reward_funcs=TableReward(table))
    assert difference(ours, stock, factor=12 / 3) < 1e-5


def test_the_factor_survives_a_resume_inside_a_generation(tmp_path: Any) -> None:
    over = {"prune_rate": 0.5, "prune_normalizer": "original", "num_iterations": 2, "loss_type": "dapo"}
    over |= {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 4}
    args = grpo_args(tmp_path / "whole", EffiGRPOConfig, num_generations=GROUP, **over)
    whole = run_grpo(EffiGRPOTrainer, args)
    args = grpo_args(tmp_path / "resumed", EffiGRPOConfig, num_generations=GROUP, **over)
    resumed = run_grpo(EffiGRPOTrainer, args, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert torch.equal(update(whole), update(resumed))
