"""Eigenvalues of matrices that are known, thresholds against the optimizers of torch, and warm-ups by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import sharpness as bench_sharpness
from bench import sharpness_warmups as bench_warmups
from hf_effi.functional.sharpness import (
    adam_preconditioner,
    adam_threshold,
    difference_product,
    double_backward_product,
    scaled_product,
    sgd_threshold,
    suggest_warmup,
    top_eigenvalue,
    vector_dot,
)
from hf_effi.optim.stability import read_stability
from tests.unit.test_schedule_free import Moves


def diagonal(*values: float) -> Any:
    matrix = torch.tensor(values)
    return lambda vector: [matrix * vector[0]]


def random_start(size: int, seed: int = 0) -> list[torch.Tensor]:
    return [torch.randn(size, generator=torch.Generator().manual_seed(seed))]


# --- the eigenvalue --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "largest"),
    [
        ((1.0, 4.0, 10.0), 10.0),
        ((-100.0, 4.0, 10.0), 10.0),  # strong negative curvature hides nothing
        ((-3.0, -2.0, -1.0), -1.0),
        ((0.0, 0.0, 0.0), 0.0),
        ((5.0, 5.0, 5.0), 5.0),
        ((7.0,), 7.0),
    ],
)
def test_the_largest_eigenvalue_of_a_diagonal(values: tuple[float, ...], largest: float) -> None:
    found = top_eigenvalue(diagonal(*values), random_start(len(values)), tolerance=1e-6)
    assert found.value == pytest.approx(largest, abs=1e-5)
    assert found.products <= len(values) + 1 and found.residual <= 1e-5
    assert found.vector is not None and vector_dot(found.vector, found.vector) == pytest.approx(1.0)


def test_a_search_ends_at_the_products_and_says_how_far_it_is() -> None:
    matrix = torch.linspace(0, 1, 200)
    few, many = (
        top_eigenvalue(lambda v: [matrix * v[0]], random_start(200), iterations=count, tolerance=0.0)
        for count in (3, 40)
    )
    assert (few.products, many.products) == (3, 40)
    assert few.residual > 10 * many.residual and few.value < many.value == pytest.approx(1.0, abs=1e-3)
    for found in (few, many):  # an eigenvalue lies within the residual
        assert (matrix - found.value).abs().min() <= found.residual * found.value + 1e-6


def test_it_begins_with_the_vector_of_the_last_search() -> None:
    first = top_eigenvalue(diagonal(1.0, 4.0, 10.0), random_start(3))
    assert first.vector is not None
    again = top_eigenvalue(diagonal(1.1, 4.0, 10.1), first.vector)
    assert again.products == 1 and again.value == pytest.approx(10.1, rel=1e-5)


@pytest.mark.parametrize("at", [1, 2])
def test_a_product_that_is_not_finite_gives_nan_and_no_vector(at: int) -> None:
    calls = []

    def product(vector: Any) -> list[torch.Tensor]:
        calls.append(1)
        return [torch.tensor([1.0, 4.0, math.nan if len(calls) == at else 10.0]) * vector[0]]

    found = top_eigenvalue(product, random_start(3))
    assert math.isnan(found.value) and math.isnan(found.residual) and found.vector is None


@pytest.mark.parametrize(
    ("start", "over", "words"),
    [
        ([0.0, 0.0], {}, "start has the norm 0"),
        ([math.nan, 0.0], {}, "start has the norm nan"),
        ([1.0, 0.0], {"iterations": 0}, "iterations=0"),
        ([1.0, 0.0], {"tolerance": -1.0}, "tolerance=-1"),
    ],
)
def test_a_search_that_cannot_be(start: list[float], over: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        top_eigenvalue(diagonal(1.0, 2.0), [torch.tensor(start)], **over)


# --- products --------------------------------------------------------------------------------------------------------


def small_net() -> tuple[Any, list[torch.Tensor], torch.Tensor]:
    """Return a loss, its weights, and the whole Hessian."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(32, 4, generator=generator), torch.randn(32, 2, generator=generator)
    weights = [torch.randn(shape, generator=generator).requires_grad_() for shape in ((4, 5), (5, 2))]

    def loss_at(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
        return ((torch.tanh(x @ one) @ two - y) ** 2).mean()

    blocks = torch.autograd.functional.hessian(loss_at, tuple(weights))
    sizes = [weight.numel() for weight in weights]
    rows = [torch.cat([blocks[i][j].reshape(sizes[i], sizes[j]) for j in (0, 1)], 1) for i in (0, 1)]
    return lambda: loss_at(*weights), weights, torch.cat(rows)


@pytest.mark.parametrize("kind", ["differences", "double backward"])
def test_a_small_net_has_the_eigenvalue_of_its_whole_hessian(kind: str) -> None:
    loss, weights, hessian = small_net()
    before = [weight.detach().clone() for weight in weights]
    if kind == "differences":
        product = difference_product(lambda: list(torch.autograd.grad(loss(), weights)), weights)
    else:
        product = double_backward_product(loss, weights)
    start = [torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) for weight in weights]
    found = top_eigenvalue(product, start, iterations=40)
    assert found.value == pytest.approx(float(torch.linalg.eigvalsh(hessian)[-1]), rel=1e-3)
    scales = [torch.full_like(weight, 0.5 + number) for number, weight in enumerate(before)]
    flat = torch.cat([scale.flatten() for scale in scales])
    scaled = top_eigenvalue(scaled_product(product, scales), start, iterations=40)
    assert scaled.value == pytest.approx(float(torch.linalg.eigvalsh(flat[:, None] * hessian * flat)[-1]), rel=1e-3)
    assert all(torch.equal(now, old) for now, old in zip(weights, before, strict=True))


def test_weights_have_their_bits_back_also_when_the_gradient_fails() -> None:
    weight = torch.randn(5, generator=torch.Generator().manual_seed(0))
    before, calls = weight.clone(), []

    def gradient() -> list[torch.Tensor]:
        calls.append(weight.clone())
        if len(calls) == 2:
            raise RuntimeError("no gradient")
        return [weight.clone()]

    with pytest.raises(RuntimeError, match="no gradient"):
        difference_product(gradient, [weight])([torch.ones(5)])
    assert not torch.equal(calls[0], calls[1]) and torch.equal(weight, before)


def test_products_at_the_edges() -> None:
    weight = torch.zeros(2, requires_grad=True)  # of norm 0, moved all the same
    moved = difference_product(lambda: [3 * weight.detach()], [weight])
    assert moved([torch.tensor([1.0, 2.0])])[0].tolist() == pytest.approx([3.0, 6.0])
    assert moved([torch.zeros(2)])[0].tolist() == [0.0, 0.0]
    unused = torch.ones(1, requires_grad=True)
    flat = double_backward_product(lambda: (2 * weight).sum(), [weight, unused])
    assert [part.tolist() for part in flat([torch.ones(2), torch.ones(1)])] == [[0.0, 0.0], [0.0]]
    with pytest.raises(ValueError, match="bfloat16"):
        difference_product(lambda: [], [torch.ones(2, dtype=torch.bfloat16)])
    with pytest.raises(ValueError, match="step=0"):
        difference_product(lambda: [], [weight], step=0.0)
    assert vector_dot([], []) == 0.0


# --- thresholds ------------------------------------------------------------------------------------------------------


def grows(optimizer: torch.optim.Optimizer, weight: torch.Tensor, curvature: float) -> bool:
    """Train `curvature / 2 * w^2`, and return whether the weight runs away."""
    for _ in range(600):
        weight.grad = curvature * weight.detach()
        optimizer.step()
    return not abs(float(weight.detach())) < 1.0


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.5},
        {"momentum": 0.8, "nesterov": True},
    ],
    ids=str,
)
def test_sgd_of_torch_runs_away_above_its_threshold_and_not_below(settings: dict[str, Any]) -> None:
    for share, away in ((0.97, False), (1.03, True)):
        weight = torch.ones(1, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([weight], lr=0.1, **settings)
        assert grows(optimizer, weight, share * sgd_threshold(0.1, **settings)) is away


@pytest.mark.parametrize(("share", "away"), [(0.97, False), (1.03, True)])
def test_adam_of_torch_runs_away_above_its_threshold_and_not_below(share: float, away: bool) -> None:
    weight = torch.full((1,), 1e-3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=0.1, betas=(0.9, 0.5), eps=1e-12)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    state, curvature = optimizer.state[weight], share * adam_threshold(0.1) * 2.0
    for _ in range(400):
        weight.grad = curvature * weight.detach()
        # So many updates that nothing is corrected, and a second moment that is 4 in each: P = 2.
        state["step"].fill_(1e6)
        state["exp_avg_sq"].copy_(8.0 - weight.grad**2)
        optimizer.step()
    assert (not abs(float(weight.detach())) < 1e-3) is away


def test_goldens_of_the_thresholds() -> None:
    assert sgd_threshold(0.1) == 20.0
    assert adam_threshold(0.001, 0.9) == pytest.approx(38_000.0)
    assert adam_threshold(1.0, 0.0) == 2.0
    assert sgd_threshold(0.0) == adam_threshold(0.0) == math.inf
    for call, words in (
        (lambda: sgd_threshold(-1.0), "lr=-1"),
        (lambda: sgd_threshold(0.1, 1.0), "momentum=1"),
        (lambda: sgd_threshold(0.1, nesterov=True), "nesterov=True needs momentum"),
        (lambda: adam_threshold(0.1, 1.0), "beta1=1"),
        (lambda: adam_preconditioner(torch.ones(1), 0), "step=0"),
        (lambda: adam_preconditioner(torch.ones(1), 1, (0.9, 1.0)), "betas.1.=1"),
        (lambda: adam_preconditioner(torch.ones(1), 1, eps=-1.0), "eps=-1"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


@pytest.mark.parametrize("amsgrad", [False, True])
def test_an_update_of_adam_is_its_first_moment_over_the_preconditioner(amsgrad: bool) -> None:
    weight = torch.randn(6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.0, amsgrad=amsgrad)
    for step in range(1, 4):
        weight.grad = torch.randn(6, generator=torch.Generator().manual_seed(step))
        before = weight.detach().clone()
        optimizer.step()
        stability = read_stability(optimizer)
        # What the scale says of this update: S^2 = 1 / P.
        update = -0.1 * optimizer.state[weight]["exp_avg"] * stability.scales[0] ** 2
        torch.testing.assert_close(weight.detach() - before, update, rtol=1e-4, atol=1e-6)


# --- what is read from optimizers ------------------------------------------------------------------------------------


def stepped(make: Any, **groups: Any) -> Any:
    weights = [torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)]
    optimizer = make([{"params": [weights[0]]}, {"params": [weights[1]], **groups}])
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    return optimizer


def test_sgd_is_read_with_its_momentum_and_other_rates_are_brought_to_the_largest() -> None:
    optimizer = stepped(lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9), lr=0.025)
    found = read_stability(optimizer)
    assert (found.lr, found.factor, found.scales) == (0.1, pytest.approx(3.8), [1.0, 0.5]) and found.preconditions
    assert found.rho(38.0) == pytest.approx(1.0)
    assert not read_stability(stepped(lambda groups: torch.optim.SGD(groups, lr=0.1))).preconditions


def test_adam_is_read_with_its_betas_and_through_a_wrapper() -> None:
    optimizer = stepped(lambda groups: torch.optim.AdamW(groups, lr=0.1, eps=0.0), betas=(0.5, 0.999))
    wrapper = type("Wrapper", (), {"__module__": "accelerate.optimizer"})()
    wrapper.optimizer = optimizer
    found = read_stability(wrapper)
    assert found.factor == pytest.approx(38.0) and found.reason == ""
    assert (found.scales[0] ** 2).tolist() == pytest.approx([10.0, 10.0])  # P = 1 * (1 - 0.9)
    # The threshold of this group at an LR of 1 is 6, with P = 1 - 0.5.
    assert (found.scales[1] ** 2).tolist() == pytest.approx([2 * 38 / 6] * 3)


def test_what_has_had_no_gradient_is_left_out() -> None:
    weights = [torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)]
    optimizer = torch.optim.AdamW(weights, lr=0.1, eps=0.0)
    assert read_stability(optimizer).reason == "it has made no update yet, and knows no second moments"
    weights[0].grad = torch.tensor([1.0, 0.0])
    optimizer.step()
    found = read_stability(optimizer)
    assert found.scales[0].tolist() == pytest.approx([math.sqrt(10.0), 0.0]) and found.scales[1] == 0.0


def test_before_a_warm_up_the_rates_are_those_that_it_leads_to() -> None:
    optimizer = stepped(lambda groups: torch.optim.SGD(groups, lr=0.1), lr=0.05)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    found = read_stability(optimizer)
    assert found.lr == 0.0 and found.scales == [1.0, pytest.approx(math.sqrt(0.5))] and found.rho(100.0) == 0.0


def test_optimizers_without_a_threshold_say_why() -> None:
    cases = {
        "neither SGD nor Adam": stepped(lambda groups: torch.optim.RMSprop(groups, lr=0.1)),
        "it maximizes": stepped(lambda groups: torch.optim.SGD(groups, lr=0.1, maximize=True)),
        "no exp_avg_sq of the shape": stepped(lambda groups: torch.optim.Adamax(groups, lr=0.1)),
        "another point": Moves([torch.ones(1, requires_grad=True)]),
    }
    for words, optimizer in cases.items():
        found = read_stability(optimizer)
        assert words in found.reason and found.scales == [] and math.isnan(found.factor) and not found.preconditions
    with pytest.raises(ValueError, match="nothing to measure"):
        read_stability(SimpleNamespace(param_groups=[{"params": [torch.ones(1)], "lr": 0.1}]))


# --- warm-up ---------------------------------------------------------------------------------------------------------


def test_a_warm_up_by_hand() -> None:
    # Room is 0.8 * 2 = 1.6. At t = 10 the peak is four times too high: the LR may be a quarter, so 40 updates.
    advice = suggest_warmup([(0, 640.0), (10, 640.0), (60, 0.0), (90, 0.0)], peak_lr=0.01, factor=2.0)
    brute = next(
        length
        for length in range(1, 200)
        if all(
            0.01 * min(1.0, t / length) * (640.0 if t <= 10 else max(640.0 * (60 - t) / 50, 0.0)) <= 1.6 + 1e-12
            for t in range(91)
        )
    )
    assert advice.updates == brute > 40 and advice.within_curve and advice.highest_lr == math.inf
    assert suggest_warmup([(10, 640.0)], 0.01, 2.0).updates == 40


@pytest.mark.parametrize(
    ("curve", "peak", "updates", "within"),
    [
        ([(0, 100.0), (50, 100.0)], 0.01, 0, True),  # low enough from the start
        ([(0, 161.0), (1, 100.0)], 0.01, 1, True),  # at 0 it is too high, and nowhere else
        ([(0, 640.0), (50, 640.0)], 0.01, 200, False),  # the curve does not come down
        ([(0, -5.0), (50, -5.0)], 1e3, 0, True),  # curved downward everywhere
        ([(0, 0.0)], 1.0, 0, True),
    ],
)
def test_warm_ups_at_the_edges(curve: Any, peak: float, updates: int, within: bool) -> None:
    advice = suggest_warmup(curve, peak, factor=2.0)
    assert (advice.updates, advice.within_curve) == (updates, within)


@pytest.mark.parametrize(
    ("curve", "over", "words"),
    [
        ([], {}, "curve has the updates"),
        ([(5, 1.0), (5, 1.0)], {}, "curve has the updates"),
        ([(-1, 1.0)], {}, "curve has the updates"),
        ([(0, 1.0), (1, math.nan)], {}, "curve has nan at update 1"),
        ([(0, 1.0)], {"peak_lr": 0.0}, "peak_lr=0"),
        ([(0, 1.0)], {"factor": 0.0}, "factor=0"),
        ([(0, 1.0)], {"safety": 1.5}, "safety=1.5"),
    ],
)
def test_curves_that_say_nothing(curve: Any, over: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        suggest_warmup(curve, **{"peak_lr": 0.1, **over})


# --- the bench -------------------------------------------------------------------------------------------------------


def test_every_part_of_the_bench_runs(capsys: Any) -> None:
    rows = bench_sharpness.main(["--quick"])
    assert {row["part"] for row in rows} == {"run", "advice", "cost"}
    assert "auc_of_early_rho" in capsys.readouterr().out


def test_a_warm_up_that_is_named_is_trained_with() -> None:
    rows = bench_warmups.main(["--quick"])
    assert [row["within_curve"] for row in rows if row["part"] == "advice"] == [True]
    assert bench_warmups.figures(rows)[0]["value"] == 1.0


def test_the_auc_is_the_share_of_pairs_in_the_right_order() -> None:
    rows = [
        {"failed": failed, "rho": rho, "rate": rate}
        for failed, rho, rate in ((True, 3.0, 1), (True, 1.0, 2), (False, 1.0, 1), (False, 0.5, 1), (True, None, 1))
    ]
    assert bench_sharpness.auc(rows, "rho") == round(5.5 / 6, 4)
    assert bench_sharpness.auc(rows, "rho", within="rate") == 1.0
    assert bench_sharpness.auc(rows[:2], "rho") is None
