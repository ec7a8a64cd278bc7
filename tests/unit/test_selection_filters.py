"""Filters of groups, the chain that they make, and the advantages of REINFORCE."""

from __future__ import annotations

import math

import pytest
import torch

from hf_effi.functional.rollouts import GroupDecision, PassRateBand, band_edges, distance_to_bands, ragged_advantages
from hf_effi.protocols import AdvantageTransform, GroupFilter, RolloutGroups
from hf_effi.selection import FilterChain, LengthBand, ReinforceAdvantages, SourceBands, ZeroVariance

NAN = math.nan
DEAD, EASY, HARD, MIXED = [0.0] * 4, [1.0] * 4, [1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]


def groups_of(rewards, lengths=None, sources=None, other=None, loss_tokens=None, present=None):
    rewards = torch.tensor(rewards)
    per_func = rewards.unsqueeze(-1) if other is None else torch.stack([rewards, torch.tensor(other)], dim=-1)
    weighted = per_func.nansum(-1).masked_fill(torch.isnan(per_func).all(-1), NAN)
    lengths = torch.full(rewards.shape, 5) if lengths is None else torch.tensor(lengths)
    loss_tokens = lengths if loss_tokens is None else torch.tensor(loss_tokens)
    advantages = ragged_advantages(per_func, torch.ones(per_func.size(-1)), present)
    return RolloutGroups(
        rewards,
        torch.where(loss_tokens > 0, advantages, 0.0),
        lengths,
        step=0,
        loss_tokens=loss_tokens,
        weighted_rewards=weighted,
        rewards_per_func=per_func,
        reward_names=("right", "short")[: per_func.size(-1)],
        present=present,
        rows=tuple(range(len(rewards))),
        lookup=None if sources is None else lambda name, rows: [sources[row] for row in rows],
    )


class TestZeroVariance:
    def test_is_the_open_band(self):
        groups = groups_of([DEAD, EASY, MIXED, [NAN] * 4, HARD], loss_tokens=[[5] * 4] * 4 + [[0] * 4])
        assert ZeroVariance().decide(groups).reasons == (
            "zero_variance", "zero_variance", "kept", "unscorable", "no_loss_tokens"
        )  # fmt: skip
        band = PassRateBand(0, 1)
        assert ZeroVariance().decide(groups).reasons == band.decide(groups).reasons
        assert ZeroVariance().fill_order(groups) == band.fill_order(groups)

    def test_looks_at_the_reward_of_ones_choice(self):
        other = [[0.1, 0.2, 0.3, 0.4], [0.5] * 4]
        groups = groups_of([EASY, MIXED], other=other)
        assert ZeroVariance().decide(groups).keep.tolist() == [False, True]
        assert ZeroVariance("short").decide(groups).keep.tolist() == [True, False]
        assert PassRateBand(0.2, 0.4, reward="short").decide(groups).reasons == ("kept", "too_easy")
        with pytest.raises(ValueError, match="reward='long' is not a reward function of this run"):
            ZeroVariance("long").decide(groups)
        with pytest.raises(ValueError, match="name of a reward function, got 3"):
            ZeroVariance(3)

    def test_places_that_are_not_there_do_not_count(self):
        present = torch.tensor([[True, True, False, False], [True] * 4])
        groups = groups_of([[1.0, 1.0, NAN, NAN], MIXED], present=present)
        assert ZeroVariance().decide(groups).keep.tolist() == [False, True]


class TestSourceBands:
    bands = SourceBands("source", {"hard": (0.2, 0.5), "easy": (0.5, 1.0)})

    def test_each_source_has_its_band(self):
        groups = groups_of([HARD, HARD, MIXED, EASY, DEAD], sources=["hard", "easy", "easy", "easy", "hard"])
        assert self.bands.decide(groups).reasons == (
            "kept", "source_too_hard", "kept", "source_too_easy", "source_too_hard"
        )  # fmt: skip

    def test_fill_order_prefers_a_gradient_then_the_middle_of_the_band(self):
        groups = groups_of([HARD, MIXED, DEAD, MIXED], sources=["easy", "easy", "hard", "hard"])
        assert self.bands.fill_order(groups) == [3, 1, 0, 2]

    def test_a_source_without_a_band(self):
        groups = groups_of([HARD, MIXED], sources=["hard", "new"])
        with pytest.raises(ValueError, match="holds the source 'new', and bands= names hard, easy"):
            self.bands.decide(groups)
        assert SourceBands("source", {"hard": (0, 1)}, default=(0.6, 1)).decide(groups).reasons == (
            "kept", "source_too_hard"
        )  # fmt: skip

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (("", {"a": (0, 1)}), "name of a column"),
            (("source", {}), "1 to 64 sources"),
            (("source", {"a": (0.5, 0.2)}), "0 <= low < high <= 1"),
            (("source", {"a": (0.5, NAN)}), "0 <= low < high <= 1"),
            (("source", {"a": (False, True)}), "two numbers"),
            (("source", {"a": 0.5}), "two numbers"),
            (("source", {"a": (0, 1)}, "01"), "two numbers"),
        ],
    )
    def test_bad_arguments_are_named(self, arguments, words):
        with pytest.raises(ValueError, match=words):
            SourceBands(*arguments)


class TestLengthBand:
    def test_hand_computed(self):
        # lengths 10, 20, ..., 100: quantiles 0.3, 0.65 and 0.95 are 37, 68.5 and 95.5
        lengths = [[10 * i] * 4 for i in range(1, 11)]
        reasons = LengthBand().decide(groups_of([MIXED] * 10, lengths=lengths)).reasons
        assert reasons == ("kept",) * 3 + ("mid_length",) * 3 + ("kept",) * 3 + ("too_long",)

    def test_dead_groups_are_dropped_first_and_do_not_count(self):
        lengths = [[1] * 4, [10] * 4, [20] * 4, [30] * 4, [1000] * 4]
        reasons = LengthBand().decide(groups_of([DEAD, MIXED, MIXED, MIXED, EASY], lengths=lengths)).reasons
        # of 10, 20, 30 the quantiles are 16, 23 and 29
        assert reasons == ("zero_variance", "kept", "mid_length", "too_long", "zero_variance")

    def test_equal_lengths_are_all_kept_and_one_group_is(self):
        assert LengthBand().decide(groups_of([MIXED] * 4)).keep.all()
        assert LengthBand().decide(groups_of([MIXED])).keep.all()
        assert not LengthBand().decide(groups_of([DEAD])).keep.any()

    def test_mean_over_the_completions_there_are(self):
        present = torch.tensor([[True, True, False, False], [True] * 4])
        groups = groups_of([[1.0, 0.0, NAN, NAN], MIXED], lengths=[[40, 40, 0, 0], [30] * 4], present=present)
        assert LengthBand([(0, 0.5)]).decide(groups).reasons == ("too_long", "kept")

    def test_fill_order_is_by_the_distance_to_a_band(self):
        lengths = [[10 * i] * 4 for i in range(1, 11)] + [[35] * 4]
        order = LengthBand().fill_order(groups_of([MIXED] * 10 + [DEAD], lengths=lengths))
        assert order[-1] == 10 and order.index(9) > order.index(6) and sorted(order) == list(range(11))

    @pytest.mark.parametrize(
        ("bands", "words"),
        [((), "1 to 64 pairs"), (((0.5, 0.6), (0.1, 0.2)), "in order"), (((0, 0.5), (0.5, 1)), "in order"),
         (((0, 1, 2),), "two numbers"), ("01", "1 to 64 pairs"), (((-0.1, 0.5),), "0 <= low")],
    )  # fmt: skip
    def test_bad_bands_are_named(self, bands, words):
        with pytest.raises(ValueError, match=words):
            LengthBand(bands)

    def test_edges_and_distances(self):
        assert band_edges(torch.tensor([4.0]), [(0.0, 0.3)]) == [(-math.inf, 4.0)]
        assert distance_to_bands(torch.tensor([1.0, 9.0]), [(2.0, 3.0), (5.0, 8.0)]).tolist() == [1.0, 1.0]


class Numbered:
    """Rejects some groups of those that it sees, and remembers how many it saw."""

    def __init__(self, word, reject, order=None):
        self.word, self.reject, self.order, self.seen = word, reject, order, 0

    def decide(self, groups):
        self.seen = len(groups.rewards)
        keep = torch.tensor([row not in self.reject for row in groups.rows])
        return GroupDecision(keep, tuple("kept" if kept else self.word for kept in keep.tolist()))

    def fill_order(self, groups):
        return sorted(range(len(groups.rows)), key=lambda i: -groups.rows[i] if self.order else i)


class TestFilterChain:
    def test_the_first_that_rejects_gives_the_reason(self):
        first, second = Numbered("a", {0, 1}), Numbered("b", {1, 2})
        chain = FilterChain([first, second])
        decision = chain.decide(groups_of([MIXED] * 4))
        assert decision.reasons == ("a", "a", "b", "kept") and decision.counts() == {"a": 2, "b": 1}
        assert (first.seen, second.seen) == (4, 2) and isinstance(chain, GroupFilter)

    def test_a_later_filter_sees_what_is_left(self):
        lengths = [[1] * 4, [10] * 4, [20] * 4, [30] * 4, [40] * 4]
        groups = groups_of([HARD, MIXED, MIXED, MIXED, MIXED], lengths=lengths)
        chain = FilterChain([PassRateBand(0.4, 0.6), LengthBand([(0, 0.5)])])
        assert chain.decide(groups).reasons == ("too_hard", "kept", "kept", "too_long", "too_long")

    def test_fill_order_composes(self):
        chain = FilterChain([Numbered("a", {0, 3, 5}), Numbered("b", {1, 4}, order=True)])
        groups = groups_of([MIXED, MIXED, MIXED, MIXED, MIXED, DEAD])
        # 2 is kept by both; 4 and 1 by the first, in the order of the second; 0 and 3 by none; 5 has no gradient
        assert chain.fill_order(groups) == [2, 4, 1, 0, 3, 5]

    def test_a_gradient_counts_more_than_the_filters_that_kept_a_group(self):
        chain = FilterChain([PassRateBand(0.4, 0.6), Numbered("b", set())])
        assert chain.fill_order(groups_of([DEAD, HARD, MIXED])) == [2, 1, 0]

    def test_of_one_is_that_one_and_chains_nest(self):
        groups = groups_of([DEAD, HARD, MIXED, EASY, [NAN] * 4])
        for each in (PassRateBand(0.4, 0.6), ZeroVariance(), LengthBand()):
            assert FilterChain([each]).decide(groups).reasons == each.decide(groups).reasons
            assert FilterChain([FilterChain([each])]).fill_order(groups) == FilterChain([each]).fill_order(groups)
        assert FilterChain([PassRateBand(0.4, 0.6)]).fill_order(groups) == PassRateBand(0.4, 0.6).fill_order(groups)

    def test_all_are_rejected(self):
        chain = FilterChain([Numbered("a", {0, 1}), LengthBand()])
        assert chain.decide(groups_of([MIXED] * 2)).reasons == ("a", "a")
        assert chain.fill_order(groups_of([MIXED] * 2)) == [0, 1]

    @pytest.mark.parametrize(
        ("filters", "words"),
        [([], "1 to 64 filters"), ([object()], "no decide and no fill_order"), ([ZeroVariance], "class ZeroVariance")],
    )
    def test_bad_filters_are_named(self, filters, words):
        with pytest.raises(ValueError, match=words):
            FilterChain(filters)


class TestReinforce:
    """The rule of the paper's code: the score, and 0 in groups whose scores do not differ."""

    def brute_force(self, rewards, wrong):
        result = []
        for group in rewards:
            known = {r for r in group if not math.isnan(r)}
            scores = [0.0 if math.isnan(r) else (r if r > 0 else wrong) for r in group]
            result.append([0.0] * len(group) if len(known) < 2 else scores)
        return result

    @pytest.mark.parametrize("wrong", [-1.0, 0.0, -0.25])
    def test_equals_the_rule(self, wrong):
        generator = torch.Generator().manual_seed(0)
        rewards = torch.randint(0, 2, (40, 4), generator=generator).float()
        rewards[torch.rand(40, 4, generator=generator) < 0.2] = NAN
        transform = ReinforceAdvantages(wrong)
        got = transform(groups_of(rewards.tolist()))
        assert got.tolist() == self.brute_force(rewards.tolist(), wrong) and isinstance(transform, AdvantageTransform)

    def test_rewards_of_minus_one_and_one_are_the_advantages(self):
        rewards = [[1.0, -1.0, -1.0, 1.0], [-1.0] * 4]
        assert ReinforceAdvantages()(groups_of(rewards)).tolist() == [rewards[0], [0.0] * 4]
        assert ReinforceAdvantages(reject=False)(groups_of(rewards)).tolist() == rewards

    def test_what_trl_gives_without_scaling_is_centred_and_this_is_not(self):
        groups = groups_of([HARD])
        centred = ragged_advantages(groups.rewards_per_func, torch.ones(1), scale_rewards="none")
        assert centred.tolist() == [[0.75, -0.25, -0.25, -0.25]]
        assert ReinforceAdvantages()(groups).tolist() == [[1.0, -1.0, -1.0, -1.0]]

    def test_a_row_without_a_token_in_the_loss_has_none(self):
        groups = groups_of([HARD], loss_tokens=[[0, 5, 5, 5]])
        assert ReinforceAdvantages()(groups).tolist() == [[0.0, -1.0, -1.0, -1.0]]

    @pytest.mark.parametrize(("over", "words"), [({"wrong": 1.0}, "wrong=1.0"), ({"reject": 1}, "True or False")])
    def test_bad_arguments_are_named(self, over, words):
        with pytest.raises(ValueError, match=words):
            ReinforceAdvantages(**over)
