"""Baselines and advantage transforms: hand-computed values, golden values of the specifications, a bandit, edges."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_effi.errors import RefusedError
from hf_effi.functional.rollouts import (
    aggregate_steps,
    duration_weights,
    entropic_advantages,
    standardized,
    token_advantages,
    token_energies,
    variance_ratio,
    weighted_advantages,
)
from hf_effi.protocols import RolloutGroups, TokenStats
from hf_effi.selection import OPO, OTB, DurationWeights, EntropicAdvantages, OBLRBaseline, ProcessRewards

NAN = math.nan


def groups_of(rewards: Any, lengths: Any = None, **over: Any) -> RolloutGroups:
    values = torch.tensor(rewards, dtype=torch.float32)
    tokens = torch.full(values.shape, 3) if lengths is None else torch.tensor(lengths)
    return RolloutGroups(values, over.pop("advantages", torch.zeros_like(values)), tokens, step=0, **over)


def with_stats(rewards: Any, probs: Any, squares: Any, mask: Any = None, **over: Any) -> RolloutGroups:
    logps, sums = torch.tensor(probs).log(), torch.tensor(squares)
    inside = torch.ones_like(logps, dtype=torch.bool) if mask is None else torch.tensor(mask, dtype=torch.bool)
    stats = TokenStats(logps.masked_fill(~inside, 0.0), sums * inside, inside, over.pop("ratios", None))
    return groups_of(rewards, inside.sum(2).tolist(), token_stats=stats, **over)


# --- OPO and leave-one-out -------------------------------------------------------------------------------------------


def test_opo_by_hand() -> None:
    found = OPO()(groups_of([[1.0, 0.0, 0.5], [0.0, 0.0, 1.0]], [[4, 2, 2], [1, 1, 8]]))
    assert torch.allclose(found, torch.tensor([[0.375, -0.625, -0.125], [-0.8, -0.8, 0.2]]))


def test_unscorable_absent_and_empty_completions() -> None:
    present = torch.tensor([[True, True, True], [True, True, False]])
    found = OPO()(groups_of([[1.0, NAN, 0.0], [1.0, 0.0, NAN]], [[3, 9, 1], [1, 1, 0]], present=present))
    assert found.tolist() == [[0.25, 0.0, -0.75], [0.5, -0.5, 0.0]]
    # No token in the loss anywhere: the plain mean.
    assert OPO()(groups_of([[1.0, 0.0]], [[0, 0]])).tolist() == [[0.5, -0.5]]


@pytest.mark.parametrize("reward", [0.1, 1 / 3, -7.7])
def test_equal_rewards_have_no_advantage_at_all(reward: float) -> None:
    groups = groups_of([[reward] * 5, [reward, NAN, NAN, NAN, NAN], [NAN] * 5], [[1, 2, 3, 4, 5]] * 3)
    for transform in (OPO(), OBLRBaseline(), EntropicAdvantages()):
        assert not transform(groups).any(), transform
    stats = TokenStats(torch.full((3, 5, 4), -0.3), torch.full((3, 5, 4), 0.4), torch.ones(3, 5, 4).bool())
    with_them = groups_of([[reward] * 5, [reward, NAN, NAN, NAN, NAN], [NAN] * 5], token_stats=stats)
    assert not OTB()(with_them).any() and not OBLRBaseline("energies")(with_them).any()


def test_leave_one_out_by_hand() -> None:
    rewards, weights = torch.tensor([[1.0, 0.0, 4.0]]), torch.tensor([[2.0, 1.0, 0.0]])
    assert weighted_advantages(rewards, weights, leave_one_out=True).tolist() == [
        [1.0, -1.0, pytest.approx(4 - 2 / 3)]
    ]
    # Those that are left weigh nothing: their plain mean.
    assert weighted_advantages(torch.tensor([[1.0, 0.0, 4.0]]), torch.tensor([[5.0, 0.0, 0.0]]), True)[0, 0] == -1.0
    # Alone in its group: nothing to compare with.
    assert weighted_advantages(torch.tensor([[1.0]]), torch.ones(1, 1), True).tolist() == [[0.0]]


def test_oblr_without_leaving_out_is_opo() -> None:
    groups = groups_of([[1.0, 0.0, 0.5, 1.0]], [[4, 2, 7, 1]])
    assert torch.equal(OBLRBaseline(leave_one_out=False)(groups), OPO()(groups))
    assert not torch.equal(OBLRBaseline()(groups), OPO()(groups))


def test_empty() -> None:
    for shape in ((0, 4), (2, 0)):
        rewards = torch.zeros(shape)
        assert weighted_advantages(rewards, rewards).shape == entropic_advantages(rewards).shape == shape
        assert standardized(rewards).shape == shape
    assert token_advantages(torch.zeros(1, 2), torch.zeros(1, 2, 0), torch.zeros(1, 2, 0).bool()).shape == (1, 2, 0)


@pytest.mark.parametrize("weights", [[[1.0, -1.0]], [[1.0, NAN]], [[math.inf, 1.0]], [[1.0]]])
def test_bad_weights(weights: Any) -> None:
    with pytest.raises(ValueError, match="weights must"):
        weighted_advantages(torch.tensor([[1.0, 0.0]]), torch.tensor(weights))


# --- the bandit: b* has the least variance ---------------------------------------------------------------------------


def second_moment(baseline: float, policy: Tensor, rewards: Tensor) -> float:
    """`E ||(r - b) grad log pi||^2`, in closed form over the arms; the mean of the gradient does not depend on `b`."""
    gradients = torch.eye(len(policy)).double() - policy
    return float((policy * (rewards - baseline).square() * gradients.square().sum(1)).sum())


@pytest.mark.parametrize("first", [0.2, 0.5, 0.9])
def test_the_weighted_baseline_minimises_the_variance_of_a_two_armed_bandit(first: float) -> None:
    policy, rewards = torch.tensor([first, 1 - first]).double(), torch.tensor([1.0, 0.2]).double()
    norms = (torch.eye(2).double() - policy).square().sum(1)
    best = float((policy * norms * rewards).sum() / (policy * norms).sum())
    at_best = second_moment(best, policy, rewards)
    # `pi_1 ||g_1||^2` = `2 pi_1 pi_2^2`: weights are those of the other arm.
    assert best == pytest.approx((1 - first) * 1.0 + first * 0.2)
    for other in (best - 0.05, best + 0.05, float((policy * rewards).sum())):
        assert second_moment(other, policy, rewards) >= at_best - 1e-12
    # A large group measures it, and its sample variance is the least as well.
    generator = torch.Generator().manual_seed(0)
    arms = torch.multinomial(policy, 40_000, replacement=True, generator=generator)
    group, weights = rewards[arms].unsqueeze(0), norms[arms].unsqueeze(0)
    ours, plain = weighted_advantages(group, weights), standardized(group, "none")
    assert float((group - ours)[0, 0]) == pytest.approx(best, abs=0.01)
    assert variance_ratio(ours, plain, weights) <= 1.0
    if first != 0.5:
        assert variance_ratio(ours, plain, weights) < 0.9


def test_leaving_out_leaves_the_gradient_unbiased() -> None:
    """The mean over all groups of two arms, in closed form: the others do not depend on a completion's own arm."""
    policy, rewards = torch.tensor([0.3, 0.7]).double(), torch.tensor([1.0, 0.2]).double()
    gradients = torch.eye(2).double() - policy
    true = (policy * rewards) @ gradients
    found = {}
    for leave in (True, False):
        mean = torch.zeros(2).double()
        for arms in torch.cartesian_prod(*[torch.arange(2)] * 3):
            chance = policy[arms].prod()
            weights = gradients.square().sum(1)[arms].unsqueeze(0)
            advantages = weighted_advantages(rewards[arms].unsqueeze(0), weights, leave)[0]
            mean += chance * (advantages.unsqueeze(1) * gradients[arms]).mean(0)
        found[leave] = mean
    # (Groups of one arm have no advantage in either: what is left out of an equal group is that reward itself.)
    assert torch.allclose(found[True], true, atol=1e-12)
    assert not torch.allclose(found[False], true, atol=1e-3)


# --- OTB -------------------------------------------------------------------------------------------------------------


def test_energies_by_hand() -> None:
    """Over a vocabulary of two with `pi` = (3/4, 1/4): `||e_y - pi||^2`."""
    logps = torch.tensor([[0.75, 0.25, 0.75]]).log()
    squares, mask = torch.full((1, 3), 0.625), torch.tensor([[True, False, True]])
    assert torch.allclose(token_energies(logps, squares, mask), torch.tensor([[0.125, 0.125, 0.25]]).double())
    ratios = torch.tensor([[2.0, 9.0, 0.0]])
    assert torch.allclose(token_energies(logps, squares, mask, ratios), torch.tensor([[0.5, 0.5, 0.5]]).double())


def test_otb_by_hand() -> None:
    # energies of the tokens: row 0: .125, .125; row 1: 1.125, .125 (and then it goes on alone)
    groups = with_stats(
        [[1.0, 0.0]],
        [[[0.75, 0.75, 0.75], [0.25, 0.75, 0.25]]],
        [[[0.625] * 3] * 2],
        [[[1, 1, 0], [1, 1, 1]]],
    )
    found = OTB()(groups)
    first, second = 0.125 / 1.25, 0.25 / 1.5
    expected = [[[1 - first, 1 - second, 0.0], [-first, -second, -second]]]
    assert torch.allclose(found, torch.tensor(expected), atol=1e-6)
    assert OTB("zero")(groups)[0, 1, 2] == 0.0  # its own reward, nothing taken off
    assert OTB("zero")(groups_like(groups, [[0.0, 1.0]]))[0, 1, 2] == 1.0


def groups_like(groups: RolloutGroups, rewards: Any) -> RolloutGroups:
    return groups_of(rewards, groups.lengths.tolist(), token_stats=groups.token_stats)


def test_otb_squares_the_ratios() -> None:
    probs, squares = [[[0.5], [0.5]]], [[[0.5], [0.5]]]
    plain = OTB()(with_stats([[1.0, 0.0]], probs, squares))
    assert plain.tolist() == [[[0.5], [-0.5]]]
    ratios = torch.tensor([[[2.0], [1.0]]])
    assert torch.allclose(
        OTB()(with_stats([[1.0, 0.0]], probs, squares, ratios=ratios)), torch.tensor([[[0.2], [-0.8]]])
    )


def test_otb_of_unscorable_and_absent_completions() -> None:
    stats = TokenStats(torch.full((1, 3, 2), -0.7), torch.full((1, 3, 2), 0.5), torch.ones(1, 3, 2).bool())
    present = torch.tensor([[True, True, False]])
    found = OTB()(groups_of([[1.0, NAN, 5.0]], token_stats=stats, present=present))
    assert not found.any()  # one known reward is nothing to compare with
    found = OTB()(groups_of([[1.0, 0.0, NAN]], token_stats=stats))
    assert torch.allclose(found[0], torch.tensor([[0.5, 0.5], [-0.5, -0.5], [0.0, 0.0]]))


def test_otb_of_certain_tokens_is_the_plain_mean() -> None:
    """Without energy there is no weight: 0/0 is not what comes out."""
    found = OTB()(with_stats([[1.0, 0.0, 0.0]], [[[1.0]] * 3], [[[1.0]] * 3]))
    assert torch.allclose(found.flatten(), torch.tensor([2 / 3, -1 / 3, -1 / 3]))


def test_oblr_energies_by_hand() -> None:
    groups = with_stats([[1.0, 0.0, 0.0]], [[[0.75], [0.25], [0.25]]], [[[0.625]] * 3])
    found = OBLRBaseline("energies")(groups)
    assert torch.allclose(found, torch.tensor([[1.0, -0.1, -0.1]]), atol=1e-6)
    with pytest.raises(ValueError, match=r"reads groups.token_stats, which are not there"):
        OBLRBaseline("energies")(groups_of([[1.0, 0.0]]))
    with pytest.raises(ValueError, match="OTB reads groups.token_stats"):
        OTB()(groups_of([[1.0, 0.0]]))


# --- entropic --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([0.0, 0.0, 0.0, 1.0], [-0.798, -0.798, -0.798, 11.849]),
        ([0.0, 0.25, 0.5, 1.0], [-0.9325, -0.8292, -0.5439, 10.434]),
        ([0.0, 0.0, 1.0, 1.0], [-1.0, -1.0, 2.0, 2.0]),
        ([0.0, 1.0, 1.0, 1.0], [-1.0, 0.5, 0.5, 0.5]),
        ([2.0, 2.0, 2.0, 3.0], [-0.798, -0.798, -0.798, 11.849]),
        ([0.0, 0.0, 0.0, 10.0], [-0.798, -0.798, -0.798, 11.849]),
        ([0.3, 0.3, 0.3, 0.3], [0.0, 0.0, 0.0, 0.0]),
        ([0.0, 1.0], [-1.0, 1.0]),
        ([0.0, NAN, 1.0], [-1.0, 0.0, 1.0]),
        ([NAN, 1.0], [0.0, 0.0]),
    ],
)
def test_entropic_goldens(rewards: list[float], expected: list[float]) -> None:
    found = EntropicAdvantages()(groups_of([rewards]))
    assert found.tolist()[0] == pytest.approx(expected, abs=2e-3)


def test_entropic_reaches_the_divergence_and_does_not_change_with_scale() -> None:
    generator = torch.Generator().manual_seed(1)
    rewards = torch.rand(50, 8, generator=generator, dtype=torch.float64)
    for kl in (0.05, math.log(2), 1.5):
        found = entropic_advantages(rewards, kl)
        # A + 1 = (n - 1) q / (1 - q), so that the weights can be read off.
        odds = (found + 1) / 7
        q = odds / (1 + odds)
        assert torch.allclose(q.sum(1), torch.ones(50).double())
        assert torch.allclose(torch.xlogy(q, q).sum(1) + math.log(8), torch.full((50,), kl).double(), atol=1e-9)
        assert torch.allclose(entropic_advantages(3.0 * rewards - 7.0, kl), found, atol=1e-6)


def test_entropic_extremes_are_finite() -> None:
    for rewards in ([[0.0, 3e38]], [[-3e38, 0.0, 3e38]], [[0.0, 1e-30, 2e-30]], [[1.0, 1.0 + 1e-7, 1.0]]):
        assert bool(entropic_advantages(torch.tensor(rewards)).isfinite().all()), rewards
    with pytest.raises(ValueError, match="kl=0.0 is outside"):
        EntropicAdvantages(0.0)
    with pytest.raises(ValueError, match="kl=nan"):
        entropic_advantages(torch.zeros(1, 2), NAN)


# --- steps -----------------------------------------------------------------------------------------------------------


def test_step_goldens() -> None:
    def decayed(scores: list[float], outcome: float) -> float:
        values = torch.tensor(scores)
        return float(aggregate_steps(values, torch.ones_like(values).bool(), "decayed", torch.tensor(outcome)))

    assert decayed([1.0, 1.0, -1.0], 1.0) == pytest.approx(7 / 9)
    assert decayed([1.0, -1.0], -1.0) == pytest.approx(-0.25)
    assert decayed([], -1.0) == -1.0
    scores, mask = torch.tensor([[0.9, 0.5, 0.8], [7.0, 0.3, NAN]]), torch.tensor([[True] * 3, [False, True, False]])
    for how, expected in {"min": [0.5, 0.3], "prod": [0.36, 0.3], "mean": [2.2 / 3, 0.3], "last": [0.8, 0.3]}.items():
        assert aggregate_steps(scores, mask, how).tolist() == pytest.approx(expected), how
        assert bool(aggregate_steps(scores, torch.zeros(2, 3).bool(), how).isnan().all())
        assert bool(aggregate_steps(torch.zeros(2, 0), torch.zeros(2, 0).bool(), how).isnan().all())
    # Steps that are missing in between do not count as places.
    gap = torch.tensor([1.0, NAN, 1.0, -1.0])
    found = aggregate_steps(gap, ~gap.isnan(), "decayed", torch.tensor(1.0))
    assert float(found) == pytest.approx(7 / 9)


@pytest.mark.parametrize(
    ("how", "outcome", "match"),
    [
        ("max", None, "how must be one of"),
        ("decayed", None, "outcome is what how='decayed' adds"),
        ("min", 1.0, "how is 'min'"),
    ],
)
def test_steps_refuse(how: str, outcome: float | None, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        aggregate_steps(torch.ones(2), torch.ones(2).bool(), how, None if outcome is None else torch.tensor(outcome))


def test_process_rewards() -> None:
    side = {"a": torch.tensor([[1.0, 0.5, NAN, NAN]]).double(), "b": torch.tensor([[0.5, NAN, NAN, NAN]]).double()}
    groups = groups_of([[1.0, 0.0, 0.0, NAN]], side=side)
    process = ProcessRewards(["a", "b"], how="mean", weight=2.0, scale="none")
    rewards = process.rewards(groups)
    assert rewards.tolist()[0][:3] == [2.5, 1.0, 0.0] and math.isnan(rewards[0, 3])
    assert process(groups).tolist()[0] == pytest.approx([2.5 - 3.5 / 3, 1.0 - 3.5 / 3, -3.5 / 3, 0.0])
    assert ProcessRewards("a").columns == ("a",)
    # A completion of which only the steps are known is scorable, as with two functions of TRL.
    alone = groups_of([[NAN, 0.0]], side={"a": torch.tensor([[1.0, NAN]]).double()})
    assert ProcessRewards("a").rewards(alone).tolist() == [[1.0, 0.0]]
    decayed = ProcessRewards(["a", "b"], how="decayed", scale="none")
    assert decayed.rewards(groups_of([[1.0, -1.0]], side={n: torch.tensor([[1.0, NAN]]) for n in "ab"})).tolist() == [
        [pytest.approx((1 + 0.5 + 1) / 2), -1.0]
    ]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"columns": []}, "columns must be 1 to 256"),
        ({"columns": ["a", "a"]}, "columns must be"),
        ({"columns": ["a", 3]}, "columns must be"),
        ({"columns": 3}, "columns must be 1 to 256 different names of side columns, got 3"),
        ({"columns": ["a"], "how": "sum"}, "how must be one of"),
        ({"columns": ["a"], "scale": "batch"}, "scale must be one of"),
        ({"columns": ["a"], "weight": 0.0}, "weight=0.0"),
        ({"columns": ["a"], "weight": True}, "weight=True"),
        ({"columns": ["a"], "weight": 10**400}, r"is outside \(0.0, inf\)"),
    ],
)
def test_process_rewards_refuse(arguments: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ProcessRewards(**arguments)


def test_a_missing_side_column_is_named() -> None:
    with pytest.raises(ValueError, match=r"ProcessRewards: there is no side column 'b'; there are: a\. Pass side_col"):
        ProcessRewards(["a", "b"])(groups_of([[1.0, 0.0]], side={"a": torch.zeros(1, 2)}))


# --- durations -------------------------------------------------------------------------------------------------------


def test_duration_weights() -> None:
    assert duration_weights(torch.tensor([1.0, 1.0, 4.0])).tolist() == [0.5, 0.5, 2.0]
    found = duration_weights(torch.tensor([2.0, NAN, 6.0]))
    assert found.tolist() == [0.5, 1.0, 1.5]
    assert duration_weights(torch.zeros(3)).tolist() == [1.0] * 3 and duration_weights(torch.zeros(0)).tolist() == []
    with pytest.raises(ValueError, match="got -1.0"):
        duration_weights(torch.tensor([1.0, -1.0]))


def test_duration_weights_are_refused_in_synchronous_grpo() -> None:
    with pytest.raises(RefusedError, match="generates synchronously and has no such bias"):
        DurationWeights("seconds")
    groups = groups_of(
        [[1.0, 0.0, 0.0]],
        [[1, 1, 0]],
        advantages=torch.tensor([[1.0, -1.0, 0.0]]),
        side={"seconds": torch.tensor([[1.0, 3.0, 99.0]]).double()},
    )
    assert DurationWeights(force=True)(groups).tolist() == [[0.5, -1.5, 0.0]]
    with pytest.raises(ValueError, match="column=''"):
        DurationWeights("", force=True)
    with pytest.raises(ValueError, match="force=1"):
        DurationWeights("seconds", force=1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: OTB("own"), "tail must be one of"),
        (lambda: OBLRBaseline("gradients"), "weights must be one of"),
        (lambda: OBLRBaseline(leave_one_out=1), "leave_one_out=1"),  # type: ignore[arg-type]
        (lambda: standardized(torch.zeros(1, 2), "batch"), "scale must be one of"),
        (lambda: token_advantages(torch.zeros(1, 2), torch.zeros(1, 3, 1), torch.zeros(1, 3, 1).bool()), "shape"),
        (lambda: weighted_advantages(torch.zeros(2), torch.zeros(2)), "must have shape"),
    ],
)
def test_bad_settings(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()
