"""Pruners, the token level of D3S, filters and allocators through `trainer.train()`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer

from hf_effi import EffiGRPOConfig, EffiGRPOTrainer
from hf_effi.errors import RefusedError
from hf_effi.functional.rollouts import GroupDecision, keep_by_variance, ragged_advantages
from hf_effi.selection import (
    D3S,
    PCL,
    VIP,
    BetaRates,
    BufferedPrompts,
    EmbeddingRates,
    FilterChain,
    Knapsack,
    LengthBand,
    MaxVariancePruner,
    PassRateBand,
    RandomPruner,
    ReinforceAdvantages,
    Screening,
    SourceBands,
    ZeroVariance,
)
from tests.helpers import (
    TableReward,
    assert_bitwise_equal,
    binary_hash_reward,
    grpo_args,
    length_reward,
    prompt_dataset,
    run_grpo,
    save_tiny,
    tiny_qwen3,
    tiny_tokenizer,
)
from tests.training.test_selection_seams import GROUP, Listener, Spy, metric, train

DEAD, EASY, HARD, MIXED = [0.0] * 4, [1.0] * 4, [1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]
LOSSES = ("dapo", "grpo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo")


def by_row(rows: list[list[float]], size: int = 40) -> TableReward:
    return TableReward({row["prompt"]: rows[i % len(rows)] for i, row in enumerate(prompt_dataset(size))})


# --- pruners ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pruner",
    [MaxVariancePruner(GROUP), MaxVariancePruner(keep_fraction=1.0), RandomPruner(GROUP), D3S(1.0, 1.0)],
    ids=["count", "share", "random", "d3s"],
)
def test_everything_kept_is_stock_to_the_bit(tmp_path: Path, pruner: Any) -> None:
    plain = train(tmp_path, binary_hash_reward, cls=GRPOTrainer, max_steps=2)
    ours = train(tmp_path, binary_hash_reward, max_steps=2, exact_savings="off", rollout_pruner=pruner)
    assert_bitwise_equal(plain.model, ours.model)
    assert metric(ours, "effi/dropped/pruned") == [0.0] * 2 and not metric(ours, "effi/prune/token_share")


@pytest.mark.parametrize("stats", ["subset", "full"])
def test_pods_trains_on_the_subset_of_largest_variance(tmp_path: Path, stats: str) -> None:
    listener = Listener()
    rows = [[0.9, 0.1, 0.5, 0.4], HARD, MIXED, DEAD]
    trainer = train(
        tmp_path, by_row(rows), callbacks=[listener], rollout_pruner=MaxVariancePruner(2, adv_stats=stats), max_steps=2
    )
    for (_, groups), batch in zip(listener.told, trainer.batches, strict=True):
        keep = torch.stack([keep_by_variance(group, 2) for group in groups.rewards])
        measured = keep if stats == "subset" else None
        expected = ragged_advantages(groups.rewards.unsqueeze(-1), torch.ones(1), measured)[keep]
        assert batch["advantages"].tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    assert metric(trainer, "effi/dropped/pruned") == [8.0] * 2


def test_d3s_across_groups_leaves_dead_groups_out(tmp_path: Path) -> None:
    pruner = D3S(0.25, 1.0, "global")
    trainer = train(tmp_path, TableReward([HARD, DEAD, DEAD, DEAD]), rollout_pruner=pruner, max_steps=2)
    for batch in trainer.batches:
        assert sorted(batch["advantages"].tolist()) == pytest.approx([-0.5, -0.5, -0.5, 1.5], abs=1e-3)


def test_shares_follow_the_steps_of_the_run(tmp_path: Path) -> None:
    trainer = train(tmp_path, binary_hash_reward, rollout_pruner=D3S((0.25, 1.0), (0.25, 1.0)), max_steps=4)
    assert metric(trainer, "effi/dropped/pruned") == [12.0, 8.0, 4.0, 0.0]  # of 16, at progress 0, 1/4, 2/4, 3/4
    shares = metric(trainer, "effi/prune/token_share")
    assert len(shares) == 4 and all(share >= 0.25 * (step + 1) - 0.2 for step, share in enumerate(shares))


@pytest.mark.parametrize(
    "pruner",
    [MaxVariancePruner(2), RandomPruner(keep=2, seed=5), D3S((0.25, 1.0), (0.25, 1.0), "global")],
    ids=["pods", "random", "d3s"],
)
def test_resume_inside_a_generation(tmp_path: Path, pruner: Any) -> None:
    over = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "num_iterations": 2, "rollout_pruner": pruner}
    whole = train(tmp_path / "a", binary_hash_reward, **over)
    resumed = train(tmp_path / "b", binary_hash_reward, resume=str(tmp_path / "a" / "checkpoint-1"), **over)
    assert_bitwise_equal(whole.model, resumed.model)


def test_the_control_draws_other_rows_in_each_generation_and_the_same_by_the_seed(tmp_path: Path) -> None:
    runs = [
        train(tmp_path, by_row([[0.1, 0.2, 0.3, 0.4]]), rollout_pruner=RandomPruner(1, seed=seed), max_steps=3)
        for seed in (0, 0, 1)
    ]
    drawn = [[batch["advantages"].tolist() for batch in run.batches] for run in runs]
    assert drawn[0] == drawn[1] != drawn[2] and drawn[0][0] != drawn[0][1]


# --- the token level of D3S ------------------------------------------------------------------------------------------


class TopTokens(GRPOTrainer):
    """Stock, with the rule written down: the best tokens by |advantage| * entropy, and the loss over these."""

    over_kept = True

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        self.advantages = inputs["advantages"]
        return super()._compute_loss(model, inputs)

    def get_high_entropy_mask(self, entropies: Any, mask: Any, threshold: float) -> Any:
        scores = self.advantages.abs().unsqueeze(1) * entropies.detach()
        ranked = sorted(((float(scores[i, j]), i, j) for i, j in mask.nonzero().tolist()), reverse=True)
        count = math.ceil(len(ranked) * (1 - threshold) - 1e-9)
        least = ranked[count - 1][0]
        weights = torch.zeros_like(entropies)
        for score, i, j in ranked:
            weights[i, j] = float(score >= least)
        if not self.over_kept:
            return weights
        if self.loss_type in ("grpo", "sapo"):
            for i in range(len(mask)):
                weights[i] *= float(mask[i].sum()) / max(1.0, float(weights[i].sum()))
        elif self.loss_type not in ("dr_grpo", "luspo"):
            weights *= float(mask.sum()) / float(weights.sum())
        return weights


class TopTokensOriginal(TopTokens):
    over_kept = False


def one_step(cls: type, folder: Path, **over: Any) -> Any:
    """One SGD step at LR 1: the update is the gradient."""
    settings = {"per_device_train_batch_size": 8, "num_generations": GROUP, "max_steps": 1, "optim": "sgd"}
    settings |= {"learning_rate": 1.0, "max_grad_norm": 0.0}
    objects = {name: over.pop(name) for name in ("rollout_pruner",) if name in over}
    config = EffiGRPOConfig if issubclass(cls, EffiGRPOTrainer) else GRPOConfig
    if not (folder / "model").exists():
        save_tiny(tiny_qwen3(end_tokens=10), tiny_tokenizer(), folder / "model")
    args = grpo_args(folder, config, **{**settings, **over})
    return run_grpo(cls, args, model=str(folder / "model"), reward_funcs=by_row([MIXED, DEAD], 16), **objects)


def difference(one: Any, other: Any) -> float:
    start = list(tiny_qwen3(end_tokens=10).parameters())

    def update(trainer: Any) -> torch.Tensor:
        pairs = zip(trainer.model.parameters(), start, strict=True)
        return torch.cat([(after - before).detach().double().flatten() for after, before in pairs])

    expected = update(other)
    assert expected.norm() > 1e-3
    return float((update(one) - expected).norm() / expected.norm())


@pytest.mark.parametrize("loss_type", LOSSES)
def test_tokens_with_the_largest_advantage_times_entropy_are_trained_on(tmp_path: Path, loss_type: str) -> None:
    over = {"loss_type": loss_type, "gradient_accumulation_steps": 2}
    expected = one_step(TopTokens, tmp_path, top_entropy_quantile=0.2, **over)
    all_tokens = one_step(GRPOTrainer, tmp_path, **over)
    over |= {"rollout_pruner": D3S(1.0, 0.2)}
    ours = one_step(EffiGRPOTrainer, tmp_path, exact_savings="off", **over)
    assert difference(ours, expected) < 1e-5 and difference(ours, all_tokens) > 0.1
    assert 0.2 <= metric(ours, "effi/prune/token_share")[0] < 1 and ours.top_entropy_quantile == 1.0


@pytest.mark.parametrize(
    ("savings", "loss_type"), [("trim,skip", "dapo"), ("skip", "grpo"), ("pack", "dapo"), ("auto", "grpo")]
)
def test_exact_savings_leave_its_gradient_as_it_is(tmp_path: Path, savings: str, loss_type: str) -> None:
    over = {"loss_type": loss_type, "gradient_accumulation_steps": 2, "rollout_pruner": D3S(1.0, 0.2)}
    runs = [one_step(EffiGRPOTrainer, tmp_path, exact_savings=name, **over) for name in ("off", savings)]
    assert difference(runs[1], runs[0]) < 1e-5
    assert savings != "auto" or "sort" not in runs[1].exact_savings and "skip" in runs[1].exact_savings


def test_tokens_that_are_dropped_can_count_as_tokens_without_a_loss(tmp_path: Path) -> None:
    expected = one_step(TopTokensOriginal, tmp_path, top_entropy_quantile=0.2, loss_type="grpo")
    over = {"loss_type": "grpo", "rollout_pruner": D3S(1.0, 0.2)}
    assert difference(one_step(EffiGRPOTrainer, tmp_path, prune_normalizer="original", **over), expected) < 1e-5
    assert difference(one_step(EffiGRPOTrainer, tmp_path, **over), expected) > 0.1


def test_kl_is_over_all_tokens(tmp_path: Path) -> None:
    over = {"loss_type": "grpo", "beta": 0.1, "num_iterations": 2, "max_steps": 2}
    expected = one_step(TopTokens, tmp_path, top_entropy_quantile=0.2, **over)
    assert difference(one_step(EffiGRPOTrainer, tmp_path, rollout_pruner=D3S(1.0, 0.2), **over), expected) < 1e-4


def test_evaluation_has_every_token(tmp_path: Path) -> None:
    trainer = train(tmp_path, binary_hash_reward, rollout_pruner=D3S(1.0, 0.2), max_steps=1)
    losses = []
    for pruned in (trainer, train(tmp_path, binary_hash_reward, max_steps=1)):
        pruned.model.load_state_dict(trainer.model.state_dict())
        torch.manual_seed(3)
        losses.append(pruned.evaluate(prompt_dataset(8))["eval_loss"])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("over", "words"),
    [
        ({"top_entropy_quantile": 0.5}, "top_entropy_quantile=0.5, which chooses tokens too. Set it to 1.0"),
        ({"loss_token_budget": 64}, "loss_token_budget=64: tokens of all rows of a micro-batch compete"),
        ({"entropy_coef": 0.1}, "an entropy bonus"),
        ({"exact_savings": "sort"}, "'sort' is not exact here: D3S ranks the tokens of all rows"),
    ],
)
def test_what_does_not_go_with_the_token_level_is_refused(tmp_path: Path, over: dict[str, Any], words: str) -> None:
    with pytest.raises(RefusedError, match=words):
        train(tmp_path, rollout_pruner=D3S(), **over)
    train(tmp_path, binary_hash_reward, rollout_pruner=D3S(0.5, 1.0), max_steps=1, **over)


# --- filters ---------------------------------------------------------------------------------------------------------


def test_a_chain_filters_and_counts_each_reason(tmp_path: Path) -> None:
    listener = Listener()
    trainer = train(
        tmp_path,
        TableReward([MIXED, HARD, MIXED, DEAD]),
        group_filters=[PassRateBand(0.4, 0.6), LengthBand([(0, 0.5)])],
        callbacks=[listener],
        difficulty_max_rounds=1,
        difficulty_underfill="shrink",
        max_steps=3,
    )
    assert isinstance(trainer.group_filter, FilterChain)
    assert metric(trainer, "effi/dropped/too_hard") == [2.0 * GROUP] * 3
    for (_, groups), batch in zip(listener.told, trainer.batches, strict=True):
        lengths = groups.lengths.sum(1)[[0, 2]]
        kept = 1 if lengths[0] != lengths[1] else 2
        assert len(batch["advantages"]) == kept * GROUP
        assert trainer.group_filter.decide(groups).counts().get("too_long", 0) == 2 - kept
    assert sum(metric(trainer, "effi/dropped/too_long")) > 0


def test_a_filter_reads_the_reward_of_its_choice_and_a_column(tmp_path: Path) -> None:
    table = by_row([MIXED, HARD, DEAD, HARD])
    over = {"difficulty_max_rounds": 1, "difficulty_underfill": "shrink", "max_steps": 2, "exact_savings": "off"}
    args = grpo_args(
        tmp_path, EffiGRPOConfig, per_device_train_batch_size=8, num_generations=GROUP, gradient_accumulation_steps=2,
        difficulty_reward="length_reward", **over
    )  # fmt: skip
    listener = Listener()
    trainer = run_grpo(
        Spy,
        args,
        reward_funcs=[table, length_reward],
        train_dataset=prompt_dataset(40),
        callbacks=[listener],
        group_filters=[
            ZeroVariance("table_reward"),
            SourceBands("level", {0: (0.4, 0.6), 1: (0.1, 0.3)}, default=(0.9, 1), reward="table_reward"),
        ],
    )
    for (rows, groups), batch in zip(listener.told, trainer.batches, strict=True):
        # levels 0 and 1 have the rewards MIXED and HARD, which lie in their bands; 2 is dead and 3 too hard
        kept = [i for i, row in enumerate(rows) if row % 4 in (0, 1)]
        if kept:
            assert len(batch["advantages"]) == GROUP * len(kept)
            assert [r == "kept" for r in trainer.group_filter.decide(groups).reasons].count(True) == len(kept)
    assert sum(metric(trainer, "effi/dropped/zero_variance")) + sum(metric(trainer, "effi/dropped/source_too_hard"))


def test_lspo_keeps_short_and_long_groups(tmp_path: Path) -> None:
    listener = Listener()
    trainer = train(
        tmp_path,
        by_row([MIXED]),
        group_filters=[LengthBand()],
        callbacks=[listener],
        difficulty_max_rounds=1,
        difficulty_underfill="shrink",
        max_steps=3,
    )
    for (_, groups), batch in zip(listener.told, trainer.batches, strict=True):
        lengths = groups.lengths.float().mean(1).tolist()
        kept = [index for index, reason in enumerate(trainer.group_filter.decide(groups).reasons) if reason == "kept"]
        assert lengths.index(min(lengths)) in kept and len(batch["advantages"]) == GROUP * len(kept)
        assert len(set(lengths)) < 4 or lengths.index(max(lengths)) not in kept


# --- Reinforce-Rej and RAFT++ ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [-1.0, 0.0])
def test_reinforce_rej_and_raft(tmp_path: Path, wrong: float) -> None:
    trainer = train(
        tmp_path,
        by_row([MIXED, EASY, HARD, DEAD]),
        advantage_transform=ReinforceAdvantages(wrong),
        group_filters=[ZeroVariance()],
        difficulty_max_rounds=8,
        max_steps=2,
        exact_savings="off",
    )
    for batch in trainer.batches:
        groups = [group.tolist() for group in batch["advantages"].view(-1, GROUP)]
        known = [[1.0, 1.0, wrong, wrong], [1.0, wrong, wrong, wrong]]
        assert len(groups) == 4 and all(group in known for group in groups)


def test_reinforce_is_the_gradient_of_stock_with_these_advantages(tmp_path: Path) -> None:
    class Written(GRPOTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            out = super()._generate_and_score_completions(inputs)
            groups = out["advantages"].view(-1, GROUP)
            equal = (groups == groups[:, :1]).all(1, keepdim=True)
            out["advantages"] = torch.where(equal, 0.0, torch.sign(groups)).view(-1)
            return out

    over = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "scale_rewards": "none"}
    over |= {"per_device_train_batch_size": 8, "num_generations": GROUP, "gradient_accumulation_steps": 2}
    rewards = [MIXED, EASY, HARD, DEAD]
    ours = run_grpo(
        EffiGRPOTrainer,
        grpo_args(tmp_path, EffiGRPOConfig, **over),
        reward_funcs=by_row(rewards, 16),
        advantage_transform=ReinforceAdvantages(),
    )
    stock = run_grpo(Written, grpo_args(tmp_path, GRPOConfig, **over), reward_funcs=by_row(rewards, 16))
    assert difference(ours, stock) < 1e-5


# --- allocators ------------------------------------------------------------------------------------------------------


def allocators() -> dict[str, Any]:
    def embeddings(context: Any) -> Any:
        return [[float(level), 0.0] for level in context.column("level")]

    return {
        "vip": VIP(low=2, high=8),
        "rloo": VIP("rloo", rates=BetaRates((0.5, 0.5), forget=0.1), solver="relaxed"),
        "gaussian": VIP(rates=EmbeddingRates(embeddings)),
        "knapsack": Knapsack(warmup_passes=0.2, high=8),
    }


@pytest.mark.parametrize("name", allocators())
def test_prompts_that_can_teach_more_get_more_completions(tmp_path: Path, name: str) -> None:
    listener = Listener()
    rewards = by_row([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0], [1.0, 1.0]], size=8)
    trainer = train(
        tmp_path,
        rewards,
        rollout_allocator=allocators()[name],
        callbacks=[listener],
        train_dataset=prompt_dataset(8),
        num_train_epochs=4,
        max_steps=-1,
    )
    sizes: dict[int, list[int]] = {row: [] for row in range(8)}
    for rows, groups in listener.told:
        assert int(groups.sizes.sum()) == 16
        for row, size in zip(rows, groups.sizes.tolist(), strict=True):
            sizes[row].append(size)
    later = {row: sum(found[-2:]) for row, found in sizes.items()}
    assert (later[0] + later[4]) / 2 > (later[1] + later[3] + later[5] + later[7]) / 4
    assert metric(trainer, "effi/select/group_size_max")[-1] > metric(trainer, "effi/select/group_size_min")[-1]


@pytest.mark.parametrize("name", allocators())
def test_an_allocator_resumes_in_the_middle_of_an_epoch_and_of_a_generation(tmp_path: Path, name: str) -> None:
    over = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, "num_iterations": 2}
    whole = train(tmp_path / "a", binary_hash_reward, rollout_allocator=allocators()[name], **over)
    folder = str(tmp_path / "a" / "checkpoint-3")
    resumed = train(tmp_path / "b", binary_hash_reward, rollout_allocator=allocators()[name], resume=folder, **over)
    assert_bitwise_equal(whole.model, resumed.model)
    one, other = (run.rollout_allocator.rates.predict(list(range(40))) for run in (whole, resumed))
    assert torch.equal(one, other)


def test_pods_prunes_groups_of_several_sizes(tmp_path: Path) -> None:
    trainer = train(
        tmp_path,
        binary_hash_reward,
        rollout_allocator=VIP(),
        rollout_pruner=MaxVariancePruner(2),
        group_filters=[ZeroVariance()],
        max_steps=3,
    )
    assert all(len(batch["advantages"]) <= 8 for batch in trainer.batches)


def test_a_source_band_refills_from_a_stream(tmp_path: Path) -> None:
    """The rows of the first round have left the buffer when the groups of all rounds are filtered."""
    trainer = train(
        tmp_path,
        train_dataset=prompt_dataset(40).to_iterable_dataset(),
        prompt_selector=BufferedPrompts(PCL(candidates=2), 8),
        group_filters=[SourceBands("level", {0: (0.3, 1)}, default=(0.3, 1))],
        difficulty_max_rounds=3,
        reward=by_row([DEAD, HARD, MIXED]),
    )
    assert max(metric(trainer, "effi/gen_rounds")) > 1


@pytest.mark.parametrize("objects", [{"rollout_allocator": VIP()}, {"screening": Screening(2)}], ids=["vip", "screen"])
def test_trls_share_of_equal_groups_is_that_of_whole_groups(tmp_path: Path, objects: dict[str, Any]) -> None:
    """TRL is given one completion at a time then, and every group of one has equal rewards; the doctor reads this."""
    trainer = train(tmp_path, reward=by_row([MIXED]), **objects)
    assert metric(trainer, "frac_reward_zero_std") == [0.0] * len(metric(trainer, "reward"))
    trainer = train(tmp_path, reward=by_row([MIXED[::-1], EASY]), rollout_allocator=VIP())
    assert metric(trainer, "frac_reward_zero_std")[0] == 0.5


def test_a_pruner_that_keeps_more_than_a_group_is_refused_before_training(tmp_path: Path) -> None:
    for pruner in (MaxVariancePruner(GROUP + 1), RandomPruner(GROUP + 1)):
        with pytest.raises(ValueError, match=f"keep={GROUP + 1} completions of a group of {GROUP}"):
            args = grpo_args(tmp_path, EffiGRPOConfig, num_generations=GROUP)
            run_grpo(EffiGRPOTrainer, args, rollout_pruner=pruner, train=False)


class Steep:
    """Gives all but two completions of each other prompt to the last one."""

    def allocate(self, rows: Any, budget: int) -> list[int]:
        return [2] * (len(rows) - 1) + [budget - 2 * (len(rows) - 1)]

    def observe(self, rows: list[int], groups: Any) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Large:
    """Keeps groups of more than two completions."""

    def decide(self, groups: Any) -> GroupDecision:
        reasons = tuple("kept" if size > 2 else "small" for size in groups.sizes.tolist())
        return GroupDecision(torch.tensor([reason == "kept" for reason in reasons]), reasons)

    def fill_order(self, groups: Any) -> list[int]:
        return list(range(len(groups.rewards)))


@pytest.mark.parametrize("underfill", ["fill", "shrink"])
def test_no_more_rows_are_trained_on_than_a_generation_has(tmp_path: Path, underfill: str) -> None:
    """Four rounds keep a group of ten each: they would be 40 rows where the micro-batches hold 16."""
    trainer = train(
        tmp_path,
        rollout_allocator=Steep(),
        group_filters=[Large()],
        difficulty_max_rounds=4,
        difficulty_underfill=underfill,
        steps_per_generation=2,
        max_steps=1,
    )
    assert len(trainer.batches[0]["advantages"]) == 10
    assert metric(trainer, "effi/underfilled") == [0.0]  # there were enough, and they did not fit
    dropped = {name: sum(metric(trainer, f"effi/dropped/{name}")) for name in ("small", "surplus")}
    assert dropped == {"small": 24.0, "surplus": 30.0} and metric(trainer, "effi/rows_generated") == [64.0]


@pytest.mark.parametrize(
    ("argument", "cls"),
    [
        ("prompt_selector", PCL),
        ("group_filter", ZeroVariance),
        ("rollout_pruner", MaxVariancePruner),
        ("rollout_allocator", VIP),
        ("advantage_transform", ReinforceAdvantages),
    ],
)
def test_a_class_is_no_object(tmp_path: Path, argument: str, cls: type) -> None:
    with pytest.raises(TypeError, match=f"{argument} is the class {cls.__name__}. Pass an object"):
        run_grpo(EffiGRPOTrainer, grpo_args(tmp_path, EffiGRPOConfig), train=False, **{argument: cls})
