"""
`mask_truncated_completions`: a completion that is not in the loss has no advantage, for anything that chooses or
counts.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer

from hf_effi.functional.rollouts import AdvantagePruner, row_advantages
from hf_effi.trainers.grpo.config import EffiGRPOConfig
from hf_effi.trainers.grpo.trainer import EffiGRPOTrainer
from tests.helpers import TableReward, binary_hash_reward, grpo_args, prompt_dataset, run_grpo, tiny_qwen3

GROUP = 4
END = set(tiny_qwen3(end_tokens=10).generation_config.eos_token_id)


def finished(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """Few completions are cut, and get a reward so low that their |advantage| is the largest of their group."""
    return [0.1 * (len(ids) % 5) if ids[-1] in END else -5.0 for ids in completion_ids]


class Stock(GRPOTrainer):
    """Keeps what TRL returns, before anything is chosen."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.generated: list[dict[str, Any]] = []
        self.trained: list[dict[str, Any]] = []
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        self.generated.append(dict(batch))
        return batch


class Records:
    """Keeps what reaches the loss."""

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        self.trained.append(batch)
        return batch


class Watched(Records, EffiGRPOTrainer, Stock):
    """Both: TRL's batch below our choices, and ours above."""


def train(tmp_path: Any, cls: type = Watched, reward: Any = finished, **over: Any) -> Any:
    settings = {"per_device_train_batch_size": 8, "num_generations": GROUP, "mask_truncated_completions": True}
    settings |= {"max_completion_length": 6}
    kwargs = {name: over.pop(name) for name in ("rollout_pruner", "group_filter") if name in over}
    config = GRPOConfig if cls is Stock else EffiGRPOConfig
    return run_grpo(
        cls,
        grpo_args(tmp_path, config, **{**settings, **over}),
        reward_funcs=reward,
        train_dataset=prompt_dataset(32),
        **kwargs,
    )


def live(batch: dict[str, Any]) -> torch.Tensor:
    return batch["completion_mask"].sum(1) > 0


def has_gradient(batch: dict[str, Any]) -> torch.Tensor:
    return live(batch) & (batch["advantages"] != 0)


def metric(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


PRUNING = [
    {"prune_rate": 0.75},
    {"prune_rate": 0.5, "prune_scope": "group"},
    {"prune_rate": 0.5, "prune_scope": "global", "prune_balance_signs": True},
    {"prune_rate": 0.5, "prune_metric": "random"},
    {"prune_rate": 0.5, "prune_metric": "largest", "prune_allocation": False},
]


@pytest.mark.parametrize("over", PRUNING, ids=[" ".join(map(str, over.values())) for over in PRUNING])
def test_pruning_keeps_rows_in_the_loss_as_long_as_there_are_any(tmp_path: Any, over: dict[str, Any]) -> None:
    trainer = train(tmp_path, **over)
    seen_cut = 0
    for whole, kept in zip(trainer.generated, trainer.trained, strict=True):
        alive = int(live(whole).sum())
        seen_cut += len(live(whole)) - alive
        assert int(live(kept).sum()) == min(alive, len(live(kept)))
        assert kept["num_items_in_batch"] == kept["completion_mask"].sum()
    assert seen_cut > 0 < max(metric(trainer, "grad_norm"))
    assert metric(trainer, "effi/rows_trained") == [float(has_gradient(batch).sum()) for batch in trainer.trained]


def test_an_own_pruner_is_told_which_rows_are_alive(tmp_path: Any) -> None:
    class Asks(AdvantagePruner):
        def keep(self, groups: Any) -> Any:
            told.append((groups.advantages.reshape(-1), groups.live.reshape(-1)))
            return super().keep(groups)

    told: list[Any] = []
    trainer = train(tmp_path, rollout_pruner=Asks(0.5), max_steps=1)
    (advantages, alive), (whole,) = told[0], trainer.generated
    assert torch.equal(advantages, whole["advantages"].masked_fill(~live(whole), 0.0))
    assert torch.equal(alive, live(whole))


def test_a_pruner_of_the_old_form_is_told_the_new_one(tmp_path: Any) -> None:
    class Old:
        def keep(self, advantages: Any, group_size: int, num_pools: int, step: int) -> Any:
            return torch.ones_like(advantages, dtype=torch.bool)

    with pytest.raises(TypeError, match=r"Old.keep\(advantages, group_size, ...\) is the old form"):
        train(tmp_path, rollout_pruner=Old())


def test_a_pruner_that_keeps_nothing_is_named(tmp_path: Any) -> None:
    class Nothing:
        def keep(self, groups: Any) -> torch.Tensor:
            return torch.zeros_like(groups.rewards, dtype=torch.bool)

    with pytest.raises(ValueError, match=r"Nothing.keep must return a boolean mask of shape .* with at least one"):
        train(tmp_path, rollout_pruner=Nothing())


def test_the_filter_drops_groups_that_cannot_teach_and_refills_them(tmp_path: Any) -> None:
    # Rewards differ in every group, so that only the mask can make one dead.
    table = TableReward([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    over = {"max_completion_length": 3, "difficulty_range": (0, 1), "difficulty_max_rounds": 8}
    trainer = train(tmp_path, reward=table, per_device_train_batch_size=16, **over)
    assert metric(trainer, "effi/underfilled") == [0.0] * 3
    assert (
        sum(metric(trainer, "effi/dropped/no_loss_tokens")) > 0 == sum(metric(trainer, "effi/dropped/zero_variance"))
    )
    for batch in trainer.trained:
        assert has_gradient(batch).view(-1, GROUP).any(1).all()


def test_an_own_filter_sees_lengths_and_what_of_them_is_in_the_loss(tmp_path: Any) -> None:
    from hf_effi.functional.rollouts import GroupDecision

    seen: list[Any] = []

    class Looks:
        def decide(self, groups: Any) -> GroupDecision:
            seen.append(groups)
            keep = groups.live.any(1)
            return GroupDecision(keep, tuple("kept" if k else "cut" for k in keep.tolist()))

        def fill_order(self, groups: Any) -> list[int]:
            return list(range(len(groups.rewards)))

    trainer = train(
        tmp_path, group_filter=Looks(), difficulty_max_rounds=1, difficulty_underfill="shrink", max_steps=1
    )
    (groups,), (whole,) = seen[:1], trainer.generated
    assert torch.equal(groups.loss_tokens.flatten(), whole["completion_mask"].sum(1))
    cut = ~live(whole)
    assert 0 < int(cut.sum()) < len(cut)
    # A cut completion is as long as it may be, and has nothing in the loss.
    assert (groups.lengths.flatten()[cut] == 6).all() and torch.equal(groups.lengths.flatten() == 6, cut)
    assert torch.equal(groups.has_gradient.flatten(), has_gradient(whole))


def test_metrics_count_what_has_a_gradient(tmp_path: Any) -> None:
    trainer = train(tmp_path, max_completion_length=3)
    for entry, whole in zip(trainer.state.log_history, trainer.generated, strict=False):
        flags = has_gradient(whole)
        assert entry["effi/rows_trained"] == float(flags.sum()) < entry["effi/rows_generated"] == 8.0
        assert entry["effi/effective_ratio"] == entry["effi/rows_trained"] / 8
        assert entry["effi/frac_zero_var_groups"] == float((~flags.view(-1, GROUP).any(1)).float().mean())
    assert max(metric(trainer, "effi/frac_zero_var_groups")) > 0


def weights(trainer: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "vespo", "bnpo"])
def test_skipping_cut_rows_is_stock(tmp_path: Any, loss_type: str) -> None:
    over = {"loss_type": loss_type, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "max_steps": 2}
    over |= {"num_iterations": 2, "reward": binary_hash_reward, "gradient_accumulation_steps": 2}
    stock, ours = train(tmp_path, Stock, **over), train(tmp_path, Watched, **over)
    assert "skip" in ours.exact_savings
    assert metric(ours, "effi/rows_trained")[0] < metric(ours, "effi/rows_generated")[0]
    assert torch.allclose(weights(stock), weights(ours), atol=1e-5)


def test_log_probs_of_rows_in_the_loss_are_those_of_stock(tmp_path: Any) -> None:
    class All:
        def keep(self, groups: Any) -> torch.Tensor:
            return torch.ones_like(groups.rewards, dtype=torch.bool)

    # The log-probs are put off until rows were chosen, and taken from batches that were cut to what is in the loss.
    over = {"num_iterations": 2, "max_steps": 1, "gradient_accumulation_steps": 1}
    (whole,) = train(tmp_path, Stock, **over).generated
    (kept,) = train(tmp_path, rollout_pruner=All(), **over).trained
    columns, alive = kept["completion_ids"].size(1), live(whole)
    assert columns < whole["completion_ids"].size(1) and 0 < int(alive.sum()) < len(alive)
    mask = whole["completion_mask"][:, :columns]
    assert torch.equal(kept["completion_mask"], mask)
    expected = whole["old_per_token_logps"][:, :columns] * mask
    alive = has_gradient(whole)  # the others are not forwarded
    assert torch.allclose((kept["old_per_token_logps"] * mask)[alive], expected[alive], atol=1e-5)


def test_advantages_per_token_of_a_subclass(tmp_path: Any) -> None:
    class PerToken(Stock):
        """Only the first token of a completion has an advantage, and every fourth row has none at all."""

        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
            batch = super()._generate_and_score_completions(inputs)
            rows, columns = batch["completion_ids"].shape
            batch["advantages"] = torch.zeros(rows, columns)
            batch["advantages"][:, 0] = torch.arange(rows) % 4 * (1.0 - 2.0 * (torch.arange(rows) % 2))
            self.generated[-1] = dict(batch)
            return batch

    class Ours(Records, EffiGRPOTrainer, PerToken):
        pass

    trainer = train(tmp_path, Ours, prune_rate=0.5, max_steps=2)
    for whole, kept in zip(trainer.generated, trainer.trained, strict=True):
        sizes = row_advantages(whole).abs().sort(descending=True).values
        assert row_advantages(kept).abs().sort(descending=True).values.tolist() == sizes[: len(sizes) // 2].tolist()
        assert kept["advantages"].shape == kept["completion_ids"].shape
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
