"""Max-variance down-sampling, its control, and the two levels of D3S: brute force, ties, NaN, groups of any size."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from hf_effi.functional.rollouts import (
    between,
    keep_by_variance,
    kept_rows,
    ragged_advantages,
    score_threshold,
    token_weights,
)
from hf_effi.protocols import RolloutGroups, RolloutPruner
from hf_effi.selection import D3S, MaxVariancePruner, RandomPruner

NAN = math.nan


def variance(values):
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values)


def groups_of(rewards, loss_tokens=None, present=None, **over):
    rewards = torch.as_tensor(rewards, dtype=torch.float32)
    present = torch.ones_like(rewards, dtype=torch.bool) if present is None else present
    advantages = ragged_advantages(rewards.unsqueeze(-1), torch.ones(1), present)
    lengths = torch.where(present, 5, 0)
    loss_tokens = lengths if loss_tokens is None else loss_tokens
    rewards = rewards.masked_fill(~present, NAN)
    advantages = torch.where(loss_tokens > 0, advantages, 0.0)
    return RolloutGroups(rewards, advantages, lengths, step=0, loss_tokens=loss_tokens, present=present, **over)


class TestKeepByVariance:
    def test_is_the_brute_force_optimum(self):
        generator = torch.Generator().manual_seed(0)
        for case in range(200):
            values = torch.randint(-3, 4, (8,), generator=generator).float()
            if case % 2:
                values = torch.randn(8, generator=generator)
            for keep in range(1, 9):
                mask = keep_by_variance(values, keep)
                best = max(variance(c) for c in itertools.combinations(values.tolist(), keep))
                assert int(mask.sum()) == keep
                assert variance(values[mask].tolist()) == pytest.approx(best, abs=1e-6)

    def test_binary_rewards_are_halved_as_far_as_there_are(self):
        for right in range(9):
            rewards = torch.tensor([1.0] * right + [0.0] * (8 - right))
            kept = rewards[keep_by_variance(rewards, 4)]
            assert int(kept.sum()) == min(max(right, 0), 4, max(2, 4 - (8 - right)))

    def test_of_equally_good_subsets_the_one_with_more_high_values(self):
        # 1 high and 2 low have the variance of 2 high and 1 low
        assert keep_by_variance(torch.tensor([0.0, 1.0, 0.0, 1.0]), 3).tolist() == [True, True, False, True]
        assert keep_by_variance(torch.tensor([0.0, 1.0]), 1).tolist() == [False, True]

    def test_all_equal_and_all_kept(self):
        assert keep_by_variance(torch.full((4,), 0.3), 2).tolist() == [True, True, False, False]
        assert keep_by_variance(torch.randn(4), 4).all()
        assert keep_by_variance(torch.tensor([2.0]), 1).tolist() == [True]

    def test_ties_go_to_the_lower_row_on_both_sides(self):
        values = torch.tensor([0.5, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0])
        assert keep_by_variance(values, 4).nonzero().flatten().tolist() == [1, 2, 3, 4]

    def test_unscorable_rows_only_where_nothing_else_is_left_and_dead_ones_last(self):
        values = torch.tensor([NAN, 1.0, 5.0, 0.0, 0.5])
        live = torch.tensor([True, True, False, True, True])
        order = [[1, 3], [1, 3, 4], [0, 1, 3, 4], [0, 1, 2, 3, 4]]
        for keep, expected in zip(range(2, 6), order, strict=True):
            assert keep_by_variance(values, keep, live).nonzero().flatten().tolist() == expected
        assert keep_by_variance(torch.full((3,), NAN), 2).tolist() == [True, True, False]

    def test_a_large_offset_does_not_hide_small_differences(self):
        values = torch.tensor([1.0, 0.0, 0.4, 0.6], dtype=torch.float64) + 1e8
        assert keep_by_variance(values, 2).tolist() == [True, True, False, False]

    @pytest.mark.parametrize("keep", [0, 5, True, 2.0])
    def test_keep_outside_its_range(self, keep):
        with pytest.raises(ValueError, match=r"whole number in \[1, 4\]"):
            keep_by_variance(torch.zeros(4), keep)


def test_kept_rows_and_schedule():
    assert [kept_rows(8, f) for f in (0.01, 0.125, 0.126, 0.5, 1.0)] == [1, 1, 2, 4, 8]
    assert kept_rows(0, 0.5) == 0
    assert [between(0.2, 1.0, rho) for rho in (-1.0, 0.0, 1.0, 9.0)] == [0.2, 0.2, 1.0, 1.0]


class TestPruners:
    def test_each_group_alone_or_the_batch(self):
        groups = groups_of([[1.0, 0, 0, 0], [1.0, 1, 1, 1], [1.0, 1, 0, 0]])
        kept = MaxVariancePruner(keep=2).keep(groups)
        assert kept.tolist() == [[True, True, False, False], [True, True, False, False], [True, False, True, False]]
        whole = MaxVariancePruner(keep=1, scope="global", adv_stats="full").keep(groups)
        pooled = keep_by_variance(groups.advantages.reshape(-1), 3)
        assert torch.equal(whole.reshape(-1), pooled) and not whole[1].any()

    def test_groups_of_different_size(self):
        present = torch.tensor([[True] * 4, [True, True, True, False], [True, False, False, False]])
        groups = groups_of([[1.0, 0, 0, 0], [0.5, 0.1, 0.9, 7], [0.2, 0, 0, 0]], present=present)
        assert MaxVariancePruner(keep=2).keep(groups).tolist() == [
            [True, True, False, False], [False, True, True, False], [True, False, False, False]
        ]  # fmt: skip
        assert MaxVariancePruner(keep_fraction=0.5).keep(groups).sum(1).tolist() == [2, 2, 1]
        for scope in ("group", "global"):
            kept = RandomPruner(keep_fraction=0.5, scope=scope).keep(groups)
            assert not (kept & ~present).any() and int(kept.sum()) == (5 if scope == "group" else 4)

    def test_everything_kept_is_no_pruning(self):
        groups = groups_of([[1.0, 0, 0, NAN], [1.0, 1, 1, 1]])
        for pruner in (MaxVariancePruner(4), MaxVariancePruner(keep_fraction=1.0), RandomPruner(4), D3S(1.0, 1.0)):
            assert pruner.keep(groups).all() and isinstance(pruner, RolloutPruner)

    def test_random_is_seeded_by_the_generation_and_uniform(self):
        groups = groups_of([[1.0, 0, 0, 0]] * 2)
        pruner = RandomPruner(keep=1, seed=3)
        masks = [pruner.keep(replace(groups, generation=count)) for count in range(400)]
        assert torch.equal(masks[7], RandomPruner(keep=1, seed=3).keep(replace(groups, generation=7)))
        share = torch.stack(masks).float().mean(0)
        assert ((share - 0.25).abs() < 0.1).all()
        dead = torch.tensor([[0, 5, 0, 0]] * 2)
        assert pruner.keep(groups_of([[1.0, 0, 0, 0]] * 2, loss_tokens=dead))[:, 1].all()

    def test_share_follows_the_progress(self):
        groups = groups_of([[float(i) for i in range(8)]])
        for pruner in (MaxVariancePruner(keep_fraction=(0.25, 0.75)), RandomPruner(keep_fraction=(0.25, 0.75))):
            kept = [int(pruner.keep(replace(groups, progress=rho)).sum()) for rho in (0.0, 0.5, 1.0)]
            assert kept == [2, 4, 6]

    def test_d3s_across_groups_is_brute_force_on_the_batch(self):
        generator = torch.Generator().manual_seed(1)
        for _ in range(20):
            groups = groups_of(torch.randint(0, 3, (3, 4), generator=generator).float())
            kept = D3S(0.5, 1.0, "global").keep(groups)
            flat = groups.advantages.reshape(-1).tolist()
            best = max(variance(chosen) for chosen in itertools.combinations(flat, 6))
            assert variance(groups.advantages[kept].tolist()) == pytest.approx(best, rel=1e-5)

    def test_d3s_schedule(self):
        d3s = D3S(completions=(0.25, 1.0), tokens=(0.2, 1.0))
        groups = groups_of([[float(i) for i in range(8)]])
        assert [int(d3s.keep(replace(groups, progress=rho)).sum()) for rho in (0.0, 1.0)] == [2, 8]
        assert [d3s.token_share(rho) for rho in (0.0, 0.5, 1.0)] == [0.2, 0.6, 1.0]
        assert d3s.chooses_tokens and not D3S(tokens=1.0).chooses_tokens and d3s.adv_stats == "full"

    @pytest.mark.parametrize(
        ("make", "words"),
        [
            (lambda: MaxVariancePruner(), "give one of keep="),
            (lambda: MaxVariancePruner(2, 0.5), "give one of keep="),
            (lambda: MaxVariancePruner(1), "at least 2"),
            (lambda: MaxVariancePruner(True), "at least 2"),
            (lambda: MaxVariancePruner(2.0), "at least 2"),
            (lambda: MaxVariancePruner(keep_fraction=0.0), r"outside \(0, 1\]"),
            (lambda: MaxVariancePruner(keep_fraction=NAN), r"outside \(0, 1\]"),
            (lambda: MaxVariancePruner(keep_fraction=(0.1, 0.2, 0.3)), "or two"),
            (lambda: MaxVariancePruner(2, scope="rank"), "scope must be one of"),
            (lambda: MaxVariancePruner(2, adv_stats="all"), "adv_stats must be one of"),
            (lambda: MaxVariancePruner(2, scope="global"), "Set adv_stats='full'"),
            (lambda: RandomPruner(2, seed=-1), "seed=-1"),
            (lambda: D3S(completions="half"), "completions"),
            (lambda: D3S(tokens=(0.2, 1.5)), "tokens=1.5"),
        ],
    )
    def test_bad_arguments_are_named(self, make, words):
        with pytest.raises(ValueError, match=words):
            make()

    def test_more_than_a_group_has_is_named(self):
        with pytest.raises(ValueError, match="keep=5 completions of a group of 4"):
            MaxVariancePruner(5).keep(groups_of([[1.0, 0, 0, 0]]))


class TestTokens:
    @pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.99, 1.0])
    def test_threshold_keeps_the_share(self, share):
        scores = torch.rand(101, generator=torch.Generator().manual_seed(0))
        kept = scores >= score_threshold(scores, share)
        assert int(kept.sum()) == max(1, math.ceil(101 * share - 1e-9))
        assert not len(scores[~kept]) or scores[kept].min() > scores[~kept].max()

    def test_no_token_and_ties(self):
        assert score_threshold(torch.tensor([]), 0.5) == math.inf
        assert (torch.ones(4) >= score_threshold(torch.ones(4), 0.25)).all()

    @pytest.mark.parametrize("loss_type", ["grpo", "sapo", "bnpo", "dapo", "cispo", "vespo", "dr_grpo", "luspo"])
    def test_weights_make_the_average_one_over_kept_tokens(self, loss_type):
        generator = torch.Generator().manual_seed(0)
        losses = torch.rand(3, 6, generator=generator)
        mask = (torch.arange(6) < torch.tensor([[6], [4], [2]])).long()
        kept = (torch.rand(3, 6, generator=generator) < 0.5) & mask.bool()
        kept[2] = False  # a row without a kept token
        share = float(kept.sum() / mask.sum())
        weighted = losses * token_weights(kept, mask, loss_type, share)
        of_row = (losses * kept).sum(1)
        if loss_type in ("grpo", "sapo"):
            got = ((weighted * mask).sum(1) / mask.sum(1)).mean()
            expected = (of_row / kept.sum(1).clamp(min=1)).mean()
        elif loss_type in ("luspo", "dr_grpo"):
            got, expected = (weighted * mask).sum(), of_row.sum()
        else:
            got, expected = (weighted * mask).sum() / mask.sum(), of_row.sum() / kept.sum()
        torch.testing.assert_close(got, expected)

    def test_all_kept_is_a_weight_of_one(self):
        mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
        for loss_type in ("grpo", "bnpo", "dapo", "dr_grpo"):
            assert torch.equal(token_weights(mask.bool(), mask, loss_type, 1.0), mask.float())

    def test_another_loss_is_named(self):
        with pytest.raises(ValueError, match="loss_type='ppo' is none of grpo"):
            token_weights(torch.ones(1, 1).bool(), torch.ones(1, 1), "ppo", 1.0)
