import json
import math
import random

import pytest
import torch

import hf_effi.functional.schedules as S
from hf_effi.functional.schedules.planner_bound import (
    best_cooldown_fraction,
    lr_transfer,
    omega,
    omega_curve,
    plan_extension,
    wsd_shape,
)
from hf_effi.functional.schedules.planner_loss import (
    AnnealingLaw,
    LossCurve,
    MultiPowerLaw,
    annealing_areas,
    curve_from_trainer_state,
    fit_annealing_law,
    fit_multi_power_law,
)


def linear(n):
    return [1 - t / n for t in range(n)]


def cosine(n):
    return [(1 + math.cos(math.pi * t / n)) / 2 for t in range(n)]


@pytest.mark.parametrize(
    ("shape", "lr", "value"),
    [
        ([1.0] * 400, 0.018176, 0.137545),
        (wsd_shape(400, 0.05), 0.020715, 0.123623),
        (wsd_shape(400, 0.10), 0.022630, 0.116136),
        (wsd_shape(400, 0.20), 0.025374, 0.109323),
        (wsd_shape(400, 0.40), 0.030070, 0.103762),
        (wsd_shape(400, 0.60), 0.035101, 0.101567),
        (wsd_shape(400, 0.80), 0.041264, 0.100766),
        (linear(400), 0.049563, 0.100630),
        (cosine(400), 0.048242, 0.103386),
        ([1.0] * 100, 0.040234, 0.248543),
        (wsd_shape(100, 0.20), 0.049544, 0.223028),
        (linear(100), 0.097255, 0.203608),
        (cosine(100), 0.094695, 0.209114),
    ],
)
def test_bound_goldens(shape, lr, value):
    bound = omega(shape)
    assert bound.best_lr == pytest.approx(lr, rel=5e-3) and bound.best == pytest.approx(value, rel=5e-4)
    for factor in (0.9, 1.1):
        assert bound.at(factor * bound.best_lr) > bound.best
    assert omega([3 * e for e in shape]).at(bound.best_lr / 3) == pytest.approx(bound.best)


def test_bound_of_a_constant_has_a_closed_form():
    for total in (1, 7, 50):
        bound = omega([1.0] * total)
        harmonic = sum(1 / k for k in range(1, total))
        assert bound.distance == pytest.approx(1 / (2 * total))
        assert bound.noise == pytest.approx(0.5) and bound.last == pytest.approx(harmonic / 2)
    assert omega([1.0], [3.0], 2.0).best_lr == pytest.approx(2 / 3)
    harmonic = sum(1 / k for k in range(1, 400))
    assert omega([1.0] * 400).best / omega(linear(400)).best == pytest.approx(math.sqrt(1 + harmonic) / 2, rel=0.02)


@pytest.mark.parametrize(
    ("ratio", "factor", "fraction"), [(1.5, 0.637, 0.445), (2, 0.532, 0.635), (3, 0.430, 0.875), (4, 0.375, 1.0)]
)
def test_extension_table(ratio, factor, fraction):
    plan = plan_extension(4000, int(4000 * ratio))
    assert plan.plateau_factor == pytest.approx(factor, abs=1e-2)
    assert plan.cooldown_fraction == pytest.approx(fraction, abs=1e-2)
    assert plan.gain_cooldown < plan.gain_plateau < 1


def test_lr_transfer_table():
    table = {0.1: 0.455, 0.2: 0.51, 0.4: 0.607, 0.6: 0.708, 0.8: 0.833}
    for fraction, ratio in table.items():
        assert lr_transfer(linear(400), wsd_shape(400, fraction)) == pytest.approx(ratio, abs=6e-3)
    assert lr_transfer(linear(400), cosine(400)) == pytest.approx(0.973, abs=1e-3)


def test_retuned_cooldown_is_as_long_as_possible_and_curve_falls():
    assert best_cooldown_fraction(400) > 0.8
    curve = [value for _, value in omega_curve(wsd_shape(400, 0.2), 0.0254, 40)]
    assert curve[-1] < curve[31] < curve[5], "the bound drops in the cooldown"


def test_free_optimum_of_the_bound_is_near_linear():
    logs = torch.zeros(20, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logs], max_iter=300, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        eta = logs.exp()
        tail = eta.flip(0).cumsum(0).flip(0)
        noise = eta.square().flip(0).cumsum(0).flip(0)
        value = 1 / (2 * tail[0]) + noise[0] / (2 * tail[0])
        value = value + 0.5 * (eta[:-1] / tail[1:] * noise[:-1] / tail[:-1]).sum()
        value.backward()
        return value

    optimizer.step(closure)
    found = logs.detach().exp()
    assert omega(found.tolist()).at(1.0) <= omega(linear(20)).best <= 1.1 * omega(found.tolist()).at(1.0)
    # A straight line down, but for the last update, which nothing comes after.
    slopes = found[1:-1] - found[:-2]
    assert float(slopes.max() / slopes.min()) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("bad", [[], [0.0, 0.0], [1.0, -1.0], [math.nan]])
def test_bound_refuses_bad_lrs(bad):
    with pytest.raises(ValueError, match="Learning rates must be"):
        omega(bad)


# ---- loss laws ----


def test_areas_golden():
    forward, annealing = annealing_areas([1, 1, 1, 0.5, 0], memory=0.9, eta_0=1)
    assert forward == [1, 2, 3, 3.5, 3.5] and annealing == pytest.approx([0, 0, 0, 0.5, 1.45])
    assert set(annealing_areas([0.1, 0.5, 1, 1, 1], memory=0.9)[1]) == {0.0}, "neither warm-up nor plateau anneals"


def curve(law, schedule, peak=1e-3, noise=0.0, seed=0):
    etas = tuple(peak * m for m in schedule.trace())
    steps = tuple(range(20, len(etas) + 1, 10))
    rng = random.Random(seed)
    return LossCurve(etas, steps, tuple(v + rng.gauss(0, noise) for v in law.losses(etas, steps)))


def test_law_recovers_its_parameters_and_ranks_schedules():
    truth = AnnealingLaw(2.0, 0.3, 40.0, 0.5, 0.99, 0.0)
    schedules = [S.cosine(500, warmup_steps=10), S.constant(500, warmup_steps=10)]
    law = fit_annealing_law([curve(truth, s) for s in schedules], memories=(0.95, 0.99, 0.999), bootstrap=0)
    assert law.memory == 0.99
    for name in ("floor", "scale", "gain", "power"):
        assert getattr(law, name) == pytest.approx(getattr(truth, name), rel=0.01)
    unseen = S.wsd(500, warmup_steps=10)
    etas = [1e-3 * m for m in unseen.trace()]
    assert law.losses(etas, [500]) == pytest.approx(truth.losses(etas, [500]), abs=1e-4)
    flat = [1e-3] * 500
    assert law.losses([1e-3 * m for m in schedules[0].trace()], [500]) < law.losses(flat, [500])


def test_law_says_how_sure_it_is():
    truth = AnnealingLaw(2.0, 0.3, 40.0, 0.5, 0.99, 0.0)
    law = fit_annealing_law([curve(truth, S.cosine(400), noise=0.005)], memories=(0.99,), bootstrap=20)
    etas = [1e-3 * m for m in S.wsd(400).trace()]
    prediction = law.predict(etas)
    assert all(a <= b <= c for a, b, c in zip(prediction.low, prediction.losses, prediction.high, strict=True))
    inside = [
        low <= true <= high
        for low, high, true in zip(prediction.low, prediction.high, truth.losses(etas, prediction.steps), strict=True)
    ]
    assert sum(inside) / len(inside) > 0.8


def test_law_refuses_what_it_cannot_tell():
    truth = AnnealingLaw(2.0, 0.3, 40.0, 0.5, 0.99, 0.0)
    with pytest.raises(ValueError, match="falling LR"):
        fit_annealing_law([curve(truth, S.constant(200))])
    with pytest.raises(ValueError, match="too few"):
        fit_annealing_law([LossCurve((1e-3, 5e-4), (1, 2), (3.0, math.nan))])
    with pytest.raises(ValueError, match="outside"):
        LossCurve((1e-3,), (2,), (3.0,))


def test_multi_power_law_predicts_an_unseen_schedule():
    truth = MultiPowerLaw(2.0, 0.3, 0.5, 300.0, 2.0, 0.58, 0.64)
    seen = [curve(truth, S.cosine(400)), curve(truth, S.constant(400))]
    law = fit_multi_power_law(seen)
    etas = [1e-3 * m for m in S.wsd(400).trace()]
    errors = [
        abs(a - b) for a, b in zip(law.losses(etas, range(50, 401)), truth.losses(etas, range(50, 401)), strict=True)
    ]
    assert sum(errors) / len(errors) < 0.01


def test_curve_from_trainer_state(tmp_path):
    history = [{"step": s, "loss": 3.0 - s / 100, "learning_rate": 1e-3 * (1 - s / 50)} for s in range(10, 51, 10)]
    state = {"log_history": history, "stateful_callbacks": {}}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    read = curve_from_trainer_state(tmp_path)
    assert read.steps == (10, 20, 30, 40, 50) and len(read.etas) == 50
    assert read.etas[24] == pytest.approx(1e-3 * 0.5)
    schedule = S.linear(50)
    state["stateful_callbacks"] = {"hf_effi.lr_schedule": {"current": schedule.spec(), "learning_rate": 2e-3}}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    assert curve_from_trainer_state(tmp_path).etas == tuple(2e-3 * m for m in schedule.trace())
    with pytest.raises(ValueError, match="at least 4"):
        curve_from_trainer_state(tmp_path, metric="eval_loss")
