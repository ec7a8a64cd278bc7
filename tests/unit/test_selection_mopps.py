"""MoPPS and BOTS: the arithmetic of posteriors, draws from them, and where the choice concentrates."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hf_effi.functional.rollouts import (
    distance_to_target,
    draw_beta,
    draw_gamma,
    forget_counts,
    implied_rates,
    reference_position,
)
from hf_effi.selection import MoPPS
from tests.helpers.prompt_selectors import Simulated, groups_of

WEAK, STRONG = [0.0, 0.25, 0.5, 0.5], [0.5, 0.75, 0.5, 1.0]


def bots(**over: Any) -> MoPPS:
    return MoPPS(**{"forget": 0.1, "rho": 0.1, "weak": WEAK, "strong": STRONG, **over})


@pytest.mark.parametrize("decay", [1.0, 0.5, 0.9])
def test_the_lambda_of_mopps(decay: float) -> None:
    """`alpha' = lambda * alpha + (1 - lambda) * alpha_0 + s`, of the prompts that were seen."""
    selector = MoPPS(3, forget=1 - decay, prior=(2.0, 3.0))
    alpha, beta = [2.0] * 3, [3.0] * 3
    for step, (row, right) in enumerate([(0, 6), (1, 0), (0, 3), (0, 8)]):
        selector.observe([row], groups_of([right / 8], step=step))
        alpha[row] = decay * alpha[row] + (1 - decay) * 2.0 + right
        beta[row] = decay * beta[row] + (1 - decay) * 3.0 + 8 - right
    assert selector.alpha.tolist() == pytest.approx(alpha) and selector.beta.tolist() == pytest.approx(beta)


@pytest.mark.parametrize(("rate", "rho"), [(0.1, 0.1), (0.5, 0.3)])
def test_the_lambda_and_rho_of_bots(rate: float, rho: float) -> None:
    """`alpha' = (1 - lambda) alpha + lambda alpha_0 + (1 - rho) s + rho s~`, of all prompts in each step."""
    selector = bots(forget=rate, rho=rho, momentum=0.9)
    weak, strong = torch.tensor(WEAK, dtype=torch.float64), torch.tensor(STRONG, dtype=torch.float64)
    alpha, beta, mu = torch.ones(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64), None
    for step, (rows, rates) in enumerate([([0, 1], [0.5, 0.25]), ([3, 1], [1.0, 0.5]), ([2, 0], [0.0, 0.25])]):
        selector.observe(rows, groups_of(rates, step=step))
        seen = torch.tensor(rates, dtype=torch.float64)
        now = (seen.mean() - weak[rows].mean()) / (strong[rows].mean() - weak[rows].mean())
        mu = now if mu is None else 0.9 * mu + 0.1 * now.clamp(-1, 2)
        implied = 8 * (mu * strong + (1 - mu) * weak).clamp(0, 1)
        right, s = implied.clone(), torch.zeros(4, dtype=torch.float64)
        right[rows], s[rows] = 8 * seen, 8 * seen
        wrong, f = 8 - implied, torch.zeros(4, dtype=torch.float64)
        wrong[rows], f[rows] = 8 * (1 - seen), 8 * (1 - seen)
        alpha = (1 - rate) * alpha + rate * 1.0 + (1 - rho) * s + rho * right
        beta = (1 - rate) * beta + rate * 1.0 + (1 - rho) * f + rho * wrong
    assert selector.alpha.tolist() == pytest.approx(alpha.tolist())
    assert selector.beta.tolist() == pytest.approx(beta.tolist())
    assert selector.metrics()["reference_position"] == pytest.approx(float(mu))


def test_bots_without_references_forgets_all_prompts() -> None:
    selector = MoPPS(3, forget=0.5, forget_unseen=True)
    selector.observe([0, 1], groups_of([1.0, 0.0], step=0))
    selector.observe([0], groups_of([1.0], step=1))
    assert selector.alpha.tolist() == [1 + 4 + 8, 1, 1] and selector.beta.tolist() == [1, 1 + 4, 1]


@pytest.mark.parametrize(
    "make", [lambda: MoPPS(4, forget=0.3), bots, lambda: MoPPS(4, forget=0.3, forget_unseen=True)]
)
def test_rounds_of_one_step_count_as_one(make: Any) -> None:
    """Whether prompts come in one round or in two, what is forgotten and implied counts once."""
    once, twice = make(), make()
    for step in range(3):
        once.observe([0, 1, 3], groups_of([0.5, 0.5, 0.25], step=step))
        twice.observe([0, 1], groups_of([0.5, 0.5], step=step))
        twice.observe([3], groups_of([0.25], step=step))
        if not once.position:
            assert once.alpha.tolist() == pytest.approx(twice.alpha.tolist())
            assert once.beta.tolist() == pytest.approx(twice.beta.tolist())
    total = lambda selector: (selector.alpha + selector.beta).tolist()  # noqa: E731
    assert total(once) == pytest.approx(total(twice))  # `mu` of the first round is that of two prompts
    assert once.position == pytest.approx(twice.position)


def test_unscorable_completions_are_no_wrong_answers() -> None:
    selector = MoPPS(2)
    selector.observe([0, 1], groups_of([[1.0, math.nan, 0.0], [math.nan] * 3]))
    assert selector.alpha.tolist() == [2.0, 1.0] and selector.beta.tolist() == [2.0, 1.0]


def test_a_threshold_counts_as_its_answers_do() -> None:
    selector = MoPPS(1, success_at=1.0)
    selector.observe([0], groups_of([[1.1, 0.1, 1.0, -1.0]]))
    assert (selector.alpha.item(), selector.beta.item()) == (3.0, 3.0)


def test_a_warm_start_has_the_counts_of_the_released_code() -> None:
    selector = MoPPS(passed=[3, 0], tried=[4, 4])
    selector.select(1)
    assert selector.alpha.tolist() == [10.0, 1.0] and selector.beta.tolist() == [4.0, 13.0]


# --- draws -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (0.3, 0.6), (5.0, 2.0), (200.0, 50.0)])
def test_draws_have_the_moments_of_beta(a: float, b: float) -> None:
    number = 40_000
    alpha, beta = (torch.full((number,), value, dtype=torch.float64) for value in (a, b))
    drawn = draw_beta(alpha, beta, torch.Generator().manual_seed(0))
    mean, variance = a / (a + b), a * b / ((a + b) ** 2 * (a + b + 1))
    assert bool(((drawn >= 0) & (drawn <= 1)).all())
    assert abs(float(drawn.mean()) - mean) < 4 * math.sqrt(variance / number)
    assert float(drawn.var()) == pytest.approx(variance, rel=0.05)


def test_a_uniform_beta_is_uniform_and_draws_are_reproducible() -> None:
    ones = torch.ones(20_000, dtype=torch.float64)
    first, second = (draw_beta(ones, ones, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.histc(first, 10, 0, 1).sub(2000).abs().max() < 200
    assert draw_gamma(ones[:0], torch.Generator()).tolist() == []
    tiny = torch.full((1000,), 1e-300, dtype=torch.float64)
    assert not draw_beta(tiny, tiny, torch.Generator().manual_seed(0)).isnan().any()


def test_pure_functions() -> None:
    assert forget_counts(torch.tensor([9.0]), 1.0, 1.0).tolist() == [1.0]
    assert forget_counts(torch.tensor([9.0]), 1.0, 0.0).tolist() == [9.0]
    assert distance_to_target(torch.tensor([0.0, 0.3, 0.7, 1.0]), 0.5, (0.3, 0.7)).tolist() == pytest.approx(
        [0.3, 0, 0, 0.3]
    )
    assert reference_position(1.0, 0.0, 0.1) == 2.0 and reference_position(0.0, 0.9, 1.0) == -1.0
    assert implied_rates(torch.tensor([0.2]), torch.tensor([0.8]), 2.0).tolist() == [1.0]


# --- choice ----------------------------------------------------------------------------------------------------------


def test_the_choice_is_the_nearest_of_the_draws() -> None:
    """All rows are candidates: what is chosen has the smallest distances of the same draws."""
    selector = MoPPS(50, explore=0.0, candidates=None, target=0.3)
    selector.select(1)
    selector.alpha.copy_(torch.arange(1, 51))
    selector.beta.copy_(torch.arange(50, 0, -1))
    rows = selector.select(5)
    rates = selector.rates()
    assert float((rates[rows] - 0.3).abs().mean()) < 0.12 < float((rates - 0.3).abs().mean())


@pytest.mark.parametrize("target", [0.5, 0.2, 0.8])
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_what_is_chosen_concentrates_at_the_target(target: float, rate: float) -> None:
    generator = torch.Generator().manual_seed(2)
    world = Simulated(torch.rand(500, generator=generator))
    selector, chosen = MoPPS(500, target=target, forget=rate, explore=0.0, candidates=8), []
    for step in range(150):
        rows = selector.select(16)
        selector.observe(rows, world.answer(rows, step))
        chosen.append(float((world.rates[rows] - target).abs().mean()))
    first, last = sum(chosen[:5]) / 5, sum(chosen[-30:]) / 30
    uniform = float((world.rates - target).abs().mean())
    assert abs(first - uniform) < 0.1
    assert last < (0.12 if rate == 0 else 0.17) and last < 0.65 * uniform
    assert selector.metrics()["correlation"] > -1


@pytest.mark.parametrize("candidates", [1.0, 2.0, 2.5, 4.0])
def test_that_many_candidates_are_drawn_for_each_place(candidates: float) -> None:
    """Half of the rows are at the target. One place gets such a row unless all of its candidates are of the others."""
    selector = MoPPS(40, candidates=candidates, explore=0.0)
    selector.select(1)
    selector.alpha[:], selector.beta[:] = 1.0, 1e6
    selector.alpha[::2], selector.beta[::2] = 1e6, 1e6
    hits = sum(selector.select(1)[0] % 2 == 0 for _ in range(1500)) / 1500
    number = math.ceil(candidates)
    assert abs(hits - (1 - math.comb(20, number) / math.comb(40, number))) < 0.05


def test_predictions_correlate_with_what_is_observed() -> None:
    world = Simulated(torch.rand(200, generator=torch.Generator().manual_seed(3)))
    selector, correlations = MoPPS(200, explore=1.0), []
    for step in range(120):
        rows = selector.select(20)
        selector.observe(rows, world.answer(rows, step))
        correlations.append(selector.metrics().get("correlation", 0.0))
    assert sum(correlations[-30:]) / 30 > 0.8


def test_forgetting_follows_a_policy_that_changes() -> None:
    def error(rate: float) -> float:
        selector = MoPPS(1, forget=rate)
        for step in range(40):
            selector.observe([0], groups_of([0.0 if step < 30 else 1.0], step=step))
        return 1 - float(selector.rates()[0])

    assert error(0.5) < 0.06 < error(0.1) < error(0.0)


def test_a_band_takes_what_is_inside_at_random_and_then_the_nearest() -> None:
    selector = MoPPS(30, band=(0.4, 0.6), explore=0.0, candidates=None)
    selector.select(1)
    selector.alpha[:], selector.beta[:] = 1e6, 9e6
    selector.alpha[10:20], selector.beta[10:20] = 5e6, 5e6
    seen = [selector.select(5) for _ in range(40)]
    assert all(10 <= row < 20 for rows in seen for row in rows)
    assert {row for rows in seen for row in rows} == set(range(10, 20))  # not always the first ones
    assert set(range(10, 20)) < set(selector.select(12))


def test_metrics_of_a_round() -> None:
    selector = MoPPS(4)
    selector.observe([0, 1, 2, 3], groups_of([0.0, 0.5, 0.75, 1.0]))
    metrics = selector.metrics()
    assert {name: metrics[name] for name in ("all_wrong", "middle", "all_right", "observed", "predicted")} == {
        "all_wrong": 0.25, "middle": 0.5, "all_right": 0.25, "observed": 0.5625, "predicted": 0.5
    }  # fmt: skip
    assert "correlation" not in metrics  # all predictions are the prior
    selector.observe([0, 3], groups_of([0.0, 1.0], step=1))
    assert selector.metrics()["correlation"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    "over, words",
    [
        ({"target": 1.5}, "target=1.5"),
        ({"band": (0.7, 0.3)}, r"band=0.7 is outside \[0, 0.3\]"),
        ({"band": 0.3}, r"band=0.3 must be two numbers"),
        ({"band": (0.3, 0.7), "target": 0.4}, "target=0.4 only acts without band="),
        ({"forget": -0.1}, "forget=-0.1"),
        ({"forget_unseen": True}, "forget_unseen=True only acts with forget above 0"),
        ({"candidates": 0.5}, "candidates=0.5"),
        ({"prior": (0, 1)}, "prior=0"),
        ({"passed": [1, 2, 3, 4]}, "passed= and tried= belong together"),
        ({"warm_weight": 2.0}, "warm_weight=2.0 only acts with passed= and tried="),
        ({"rho": 0.1}, "rho=0.1, weak= and strong= belong together"),
        ({"weak": WEAK, "strong": STRONG}, "belong together"),
        ({"rho": 0.1, "weak": WEAK, "strong": STRONG}, "Set forget above 0"),
        ({"rho": 1.0}, r"rho=1.0 is outside \[0, 1\)"),
        ({"momentum": 0.5}, "momentum=0.5 only acts with rho above 0"),
    ],
)
def test_what_is_wrong_is_named(over: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MoPPS(4, **over)


def test_columns_that_cannot_be_are_named() -> None:
    with pytest.raises(TypeError, match="forget_unseen must be True or False, got 1"):
        MoPPS(4, forget=0.1, forget_unseen=1)
    with pytest.raises(ValueError, match="row 1 has passed 5 of tried 4"):
        MoPPS(passed=[1, 5], tried=[4, 4]).select(1)
    with pytest.raises(ValueError, match=r"weak: row 2 has 1.5, which is outside \[0, 1\]"):
        bots(weak=[0.0, 0.0, 1.5, 0.0]).select(1)
