"""Group filters and pruning by hand-computed values and brute force."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from hf_effi.functional.rollouts import (
    AdvantagePruner,
    PassRateBand,
    ShuffledPrompts,
    equal_reward_groups,
    fill_order,
    group_pass_rates,
    keep_by_advantage,
    keep_groups_by_pass_rate,
    next_refill_size,
    pruned_count,
)

NAN = float("nan")


def rates_to_rewards(*successes: int, size: int = 8) -> torch.Tensor:
    return torch.tensor([[1.0] * s + [0.0] * (size - s) for s in successes])


class TestPassRate:
    def test_every_count_of_eight_with_the_recommended_band(self) -> None:
        decision = keep_groups_by_pass_rate(rates_to_rewards(*range(9)), 0.2, 0.8)
        # 0.2-0.8 with 8 completions means 2 to 6 right.
        assert decision.keep.tolist() == [False, False, True, True, True, True, True, False, False]
        assert decision.reasons == ("too_hard",) * 2 + ("kept",) * 5 + ("too_easy",) * 2
        assert decision.counts() == {"too_easy": 2, "too_hard": 2}

    @pytest.mark.parametrize(
        ("low", "high", "kept"), [(0.2, 0.8, [1, 2, 3, 4]), (0.25, 0.75, [2, 3]), (0.4, 1, [2, 3, 4])]
    )
    def test_ends_are_inclusive_except_0_and_1(self, low: float, high: float, kept: list[int]) -> None:
        rewards = rates_to_rewards(*range(6), size=5)
        assert keep_groups_by_pass_rate(rewards, low, high).keep.nonzero().flatten().tolist() == kept

    def test_open_unit_interval_is_the_zero_variance_filter_for_any_reward(self) -> None:
        rewards = torch.tensor([[-3.0, -3.0], [-3.0, 5.0], [0.5, 0.5], [0.0, 1.0]])
        decision = keep_groups_by_pass_rate(rewards, 0, 1)
        assert decision.keep.tolist() == [False, True, False, True]
        assert decision.reasons[0] == "zero_variance"

    def test_graded_group_inside_the_band_without_variance_is_dropped(self) -> None:
        assert keep_groups_by_pass_rate(torch.full((1, 4), 0.5), 0.2, 0.8).reasons == ("zero_variance",)

    def test_unscorable_rows_are_not_wrong_answers(self) -> None:
        rewards = torch.tensor([[1.0, NAN, NAN, 0.0], [NAN, NAN, NAN, NAN], [1.0, NAN, NAN, 1.0]])
        assert group_pass_rates(rewards)[0] == 0.5
        assert keep_groups_by_pass_rate(rewards, 0.2, 0.8).reasons == ("kept", "unscorable", "too_easy")

    def test_single_completion_groups_never_pass(self) -> None:
        assert not keep_groups_by_pass_rate(torch.tensor([[0.5]]), 0.2, 0.8).keep.any()

    @pytest.mark.parametrize("band", [(0.8, 0.2), (0.5, 0.5), (-0.1, 0.5), (0.2, 1.1)])
    def test_reversed_or_outside_bands_are_named(self, band: tuple[float, float]) -> None:
        with pytest.raises(ValueError, match=r"0 <= low < high <= 1, got \("):
            PassRateBand(*band)

    def test_reward_outside_the_unit_interval_is_named_with_the_fix(self) -> None:
        with pytest.raises(ValueError, match=r"got 2\. Name the 0/1 correctness reward with `difficulty_reward`"):
            keep_groups_by_pass_rate(torch.tensor([[2.0, 0.0]]), 0.2, 0.8)

    def test_equal_groups_use_exact_equality(self) -> None:
        tiny = torch.tensor([[0.1, 0.1], [0.1, math.nextafter(0.1, 1)]], dtype=torch.float64)
        assert equal_reward_groups(tiny).tolist() == [True, False]

    def test_fill_order_prefers_variance_near_the_middle(self) -> None:
        rewards = torch.cat([rates_to_rewards(0, 8, 1, 7, 5), torch.full((1, 8), NAN)])
        assert fill_order(rewards, 0.4, 0.6) == [4, 2, 3, 0, 1, 5]


class TestRefill:
    def test_size_follows_the_acceptance_rate(self) -> None:
        assert next_refill_size(missing=4, kept=4, generated=8, cap=100) == 10
        assert next_refill_size(missing=4, kept=8, generated=8, cap=100) == 5

    def test_size_is_bounded(self) -> None:
        assert next_refill_size(missing=8, kept=1, generated=100, cap=16) == 16
        assert next_refill_size(missing=1, kept=99, generated=100, cap=16) == 2
        assert next_refill_size(missing=3, kept=0, generated=16, cap=16) == 16


def brute_force(advantages: list[float], keep: int) -> float:
    return max(sum(abs(a) for a in chosen) for chosen in itertools.combinations(advantages, keep))


class TestPruning:
    @pytest.mark.parametrize("scope", ["group", "rank", "global"])
    @pytest.mark.parametrize("rate", [0.25, 0.5, 0.75])
    def test_kept_set_is_the_brute_force_optimum_of_every_pool(self, scope: str, rate: float) -> None:
        generator = torch.Generator().manual_seed(3)
        for _ in range(20):
            # Few distinct values, so that ties are everywhere.
            advantages = torch.randint(-3, 4, (16,), generator=generator).float()
            mask = AdvantagePruner(rate, scope=scope).keep_rows(advantages, group_size=4, num_pools=2, step=0)
            size = {"group": 4, "rank": 8, "global": 16}[scope]
            for pool, kept in zip(advantages.split(size), mask.split(size), strict=True):
                assert int(kept.sum()) == pruned_count(size, rate)
                assert float(pool[kept].abs().sum()) == brute_force(pool.tolist(), int(kept.sum()))

    def test_ties_go_to_the_lower_row(self) -> None:
        assert keep_by_advantage(torch.tensor([1.0, -1.0, 1.0, -1.0]), 2).tolist() == [True, True, False, False]

    def test_rare_outcome_is_kept_and_balance_mends_it(self) -> None:
        # 16 completions, 4 right: top-|A| keeps the 4 right ones only.
        rewards = torch.tensor([1.0] * 4 + [0.0] * 12)
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        assert keep_by_advantage(advantages, 4).nonzero().flatten().tolist() == [0, 1, 2, 3]
        balanced = keep_by_advantage(advantages, 4, balance_signs=True).nonzero().flatten().tolist()
        assert balanced == [0, 1, 4, 5]

    def test_balance_takes_what_there_is(self) -> None:
        assert keep_by_advantage(torch.tensor([3.0, 2.0, 1.0, 0.0]), 3, balance_signs=True).tolist() == [
            True,
            True,
            True,
            False,
        ]

    def test_largest_prunes_the_other_end(self) -> None:
        assert keep_by_advantage(torch.tensor([3.0, -2.0, 0.1]), 1, metric="largest").tolist() == [False, False, True]

    def test_random_is_seeded_and_uniform(self) -> None:
        pruner = AdvantagePruner(0.75, metric="random", scope="global", seed=1)
        masks = [pruner.keep_rows(torch.zeros(8), 4, 1, step=step) for step in range(400)]
        assert torch.equal(masks[3], pruner.keep_rows(torch.ones(8), 4, 1, step=3))
        share = torch.stack(masks).float().mean(0)
        assert ((share - 0.25).abs() < 0.1).all()

    @pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, NAN])
    def test_rate_outside_its_range(self, rate: float) -> None:
        with pytest.raises(ValueError, match=r"prune_rate must be in \[0, 1\)"):
            AdvantagePruner(rate)

    def test_empty_pool_is_named(self) -> None:
        with pytest.raises(ValueError, match=r"keep must be in \[1, 4\]"):
            keep_by_advantage(torch.zeros(4), 0)

    def test_unknown_words_are_named(self) -> None:
        with pytest.raises(ValueError, match="prune_metric must be one of"):
            AdvantagePruner(0.5, metric="top")
        with pytest.raises(ValueError, match="prune_scope must be one of"):
            AdvantagePruner(0.5, scope="node")


class TestShuffledPrompts:
    def test_no_row_twice_in_a_pass_and_passes_differ(self) -> None:
        prompts = ShuffledPrompts(50, seed=4)
        first, second = prompts.select(50), prompts.select(50)
        assert sorted(first) == sorted(second) == list(range(50))
        assert first != second

    def test_resume_goes_on_in_the_middle_of_a_pass(self) -> None:
        whole = ShuffledPrompts(7, seed=1).select(20)
        stopped = ShuffledPrompts(7, seed=1)
        stopped.select(9)
        resumed = ShuffledPrompts(7, seed=99)
        resumed.load_state_dict(stopped.state_dict())
        assert resumed.select(11) == whole[9:]

    def test_another_dataset_is_refused(self) -> None:
        with pytest.raises(ValueError, match="over 7 rows, this dataset has 8"):
            ShuffledPrompts(8).load_state_dict(ShuffledPrompts(7).state_dict())
