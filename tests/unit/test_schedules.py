import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    get_cosine_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_inverse_sqrt_schedule,
    get_linear_schedule_with_warmup,
    get_wsd_schedule,
)

import hf_effi.functional.schedules as S
from hf_effi.errors import MismatchError, PastEndWarning


def optimizer(lr=1.0):
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def hf_trace(make, steps):
    opt = optimizer()
    scheduler = make(opt)
    lrs = []
    for _ in range(steps + 1):
        lrs.append(scheduler.get_last_lr()[0])
        opt.step()
        scheduler.step()
    return lrs


# ---- decay shapes ----


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("reciprocal", (0.307692, 0.181818, 0.129032)),
        ("exponential", (0.562341, 0.316228, 0.177828)),
        ("linear", (0.775, 0.55, 0.325)),
        ("cosine", (0.868198, 0.55, 0.231802)),
        ("1-sqrt", (0.55, 0.363604, 0.220577)),
        ("square", (0.94375, 0.775, 0.49375)),
        ("mirror-cosine", (0.681802, 0.55, 0.418198)),
    ],
)
def test_shape_goldens(shape, expected):
    assert [S.decay(shape, x, 0.1) for x in (0.25, 0.5, 0.75)] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("shape", sorted(S.SHAPES))
@pytest.mark.parametrize("floor", [1e-3, 0.1, 0.9])
def test_shapes_fall_from_one_to_floor_and_clamp(shape, floor):
    xs = [i / 200 for i in range(201)]
    values = [S.decay(shape, x, floor, **({"power": 2.0} if shape == "power" else {})) for x in xs]
    assert values[0] == 1 and values[-1] == floor
    assert all(a >= b - 1e-15 for a, b in zip(values, values[1:], strict=False))
    assert S.decay(shape, -3, floor) == 1 and S.decay(shape, 7, floor) == floor
    if shape != "power":
        # The inner formula reaches both ends by itself; the clamp hides nothing.
        assert S.SHAPES[shape](0.0, floor) == pytest.approx(1) and S.SHAPES[shape](1.0, floor) == pytest.approx(floor)


def test_power_shape_one_is_linear():
    assert [S.decay("power", x, 0.1) for x in (0.2, 0.7)] == [S.decay("linear", x, 0.1) for x in (0.2, 0.7)]
    assert S.decay("power", 0.5, 0.0, power=3) == 0.125


# ---- equality with transformers ----


@pytest.mark.parametrize("shape", ["linear", "cosine", "1-sqrt"])
@pytest.mark.parametrize("floor", [0, 0.1])
@pytest.mark.parametrize("total", [1, 7, 50])
def test_wsd_equals_transformers_at_every_step(shape, floor, total):
    warmup, length = total // 5, total // 3
    ours = S.wsd(
        total,
        warmup_steps=warmup,
        decay_steps=length,
        shape=shape,
        floor=floor,
        warmup_offset=0,
        decay_offset="start",
    )
    theirs = hf_trace(
        lambda o: get_wsd_schedule(o, warmup, length, total, decay_type=shape, min_lr_ratio=floor), total
    )
    for t in range(total):
        assert ours(t) == pytest.approx(theirs[t], rel=1e-14, abs=0)
    if length:
        assert ours(total) == pytest.approx(theirs[total], rel=1e-14, abs=0)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (S.linear(40, warmup_steps=6, warmup_offset=0), lambda o: get_linear_schedule_with_warmup(o, 6, 40)),
        (S.cosine(40, warmup_steps=6, warmup_offset=0), lambda o: get_cosine_schedule_with_warmup(o, 6, 40)),
        (
            S.cosine(40, warmup_steps=6, warmup_offset=0, floor=0.1, warmup_start=0.0),
            lambda o: get_cosine_with_min_lr_schedule_with_warmup(o, 6, 40, min_lr_rate=0.1),
        ),
        (S.inverse_sqrt(warmup_steps=6, warmup_offset=0), lambda o: get_inverse_sqrt_schedule(o, 6)),
    ],
)
def test_equals_transformers_at_every_step(ours, theirs):
    assert [ours(t) for t in range(41)] == pytest.approx(hf_trace(theirs, 40), rel=1e-12, abs=1e-15)


# ---- golden values ----

GOLDENS = [
    (S.rex(100), (0.857143, 0.666667, 0.4, 0.181818)),
    (S.rex(100, kappa=0.9), (0.967742, 0.909091, 0.769231, 0.526316)),
]
UBA_GOLDENS = [
    (0.5, (0.9589, 0.8, 0.4070, 0.0912)),
    (1, (0.9210, 0.6667, 0.2555, 0.0478)),
    (2, (0.8536, 0.5, 0.1464, 0.0245)),
    (5, (0.6998, 0.2857, 0.0642, 0.0099)),
]


@pytest.mark.parametrize(("schedule", "expected"), GOLDENS)
def test_goldens_at_quarters_and_ninety_percent(schedule, expected):
    assert [schedule(t) for t in (25, 50, 75, 90)] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("phi", "expected"), UBA_GOLDENS)
def test_uba_goldens(phi, expected):
    # The published table has four decimals.
    assert [S.uba(100, phi=phi)(t) for t in (25, 50, 75, 90)] == pytest.approx(expected, abs=5.1e-5)


def test_uba_is_cosine_at_two_and_falls_with_phi():
    assert S.uba(100, phi=2).trace() == pytest.approx(S.cosine(100).trace(), abs=1e-12)
    traces = [S.uba(100, phi=phi).trace() for phi in (0.25, 0.5, 1, 2, 5)]
    for higher, lower in zip(traces, traces[1:], strict=False):
        assert all(a >= b for a, b in zip(higher, lower, strict=True))


def test_rex_without_bend_is_linear():
    assert S.rex(17, kappa=0.0).trace() == pytest.approx(S.linear(17).trace(), abs=1e-15)


def test_cosine_power_goldens():
    closed = [1, 0.93912, 0.78069, 0.58016, 0.39038, 0.24025, 0.13507, 0.06748, 0.02732, 0.00644, 0]
    schedule = S.cosine_power(10, base=10)
    assert [schedule(t) for t in range(11)] == pytest.approx(closed, abs=6e-6)
    reference = [1, 0.83129, 0.61777, 0.41569, 0.25583, 0.14382, 0.07186, 0.0291, 0.00686, 0]
    assert S.cosine_power(10, base=10, spread=True).trace() == pytest.approx(reference, abs=6e-6)
    assert S.cosine_power(10, base=1).trace() == pytest.approx(S.cosine(10).trace(), abs=1e-12)
    assert S.cosine_power(1, spread=True).trace() == [1.0]
    assert S.cosine_power(10, base=1e300)(5) < S.cosine_power(10, base=10)(5)


def test_damped_cosine_goldens():
    one = [1, 0.8892, 0.7637, 0.6340, 0.5102, 0.4, 0.3084, 0.2365, 0.1819, 0.1390, 0.1]
    schedule = S.damped_cosine(10, floor=0.1)
    assert [schedule(t) for t in range(11)] == pytest.approx(one, abs=5.1e-5)
    three = [1, 0.685, 0.42, 0.555, 0.64, 0.425, 0.26, 0.295, 0.28, 0.165, 0.1]
    schedule = S.damped_cosine(10, cycles=3, gamma=0.1, floor=0.1)
    assert [schedule(t) for t in range(11)] == pytest.approx(three, abs=1e-6)
    assert [S.damped_cosine(10, gamma=g, floor=0.1)(10) for g in (0, 0.3, 1)] == pytest.approx([0.1] * 3, abs=1e-15)


# ---- the WSD family ----


def test_wsd_decay_on_demand_starts_once_and_is_part_of_the_spec():
    plateau = S.wsd(1000, warmup_steps=10, open_ended=True)
    assert all(plateau(t) == 1 for t in range(10, 1001)) and plateau.last_step is None
    decaying = plateau.start_decay(at=300, decay_steps=50, shape="linear")
    assert [decaying(t) for t in range(300)] == [plateau(t) for t in range(300)]
    assert decaying(300) == pytest.approx(1 - 1 / 51) and decaying(349) == pytest.approx(1 / 51)
    assert decaying(350) == 0
    assert S.Schedule.from_spec(json.loads(json.dumps(decaying.spec()))) == decaying
    with pytest.raises(ValueError, match="starts once"):
        decaying.start_decay(at=310, decay_steps=5)


def test_two_decays_branch_from_the_same_plateau():
    trunk = S.wsd(400, warmup_steps=10, open_ended=True)
    short, long = trunk.start_decay(at=200, decay_steps=20), trunk.start_decay(at=200, decay_steps=80)
    assert short.trace(200) == long.trace(200) == trunk.trace(200)
    assert short(210) < long(210) < 1


def test_wsd_conventions_of_a_single_update():
    assert S.wsd(1, decay_steps=1, shape="linear").trace() == [0.5]
    assert S.wsd(1, decay_steps=1, shape="linear", decay_offset="start").trace() == [1.0]
    assert S.wsd(5, decay_steps=0).trace() == [1.0] * 5
    assert S.wsd(4, warmup_steps=2, decay_steps=2, shape="linear").trace() == pytest.approx([0.5, 1, 2 / 3, 1 / 3])


def test_wsd_decay_inside_the_warmup_goes_down_from_the_ramp():
    schedule = S.wsd(warmup_steps=10).start_decay(at=4, decay_steps=3, shape="linear")
    values = [schedule(t) for t in range(8)]
    assert values[4] < values[3] and max(values) == values[3]


def test_wsd_half_life():
    schedule = S.wsd(100, decay_steps=60, shape="half-life", half_life_steps=10, decay_offset="start")
    assert [schedule(t) for t in (40, 50, 60)] == [1, 0.5, 0.25]


def test_wsd_s_jumps_back_and_single_budget_is_wsd():
    schedule = S.wsd_s(400)
    assert [p[:2] for p in schedule.periods] == [(0, 100), (100, 200), (200, 400)]
    for start, end, length in schedule.periods:
        assert schedule(start) == 1 and schedule(end - length - 1) == 1 and schedule(end - 1) < 0.2
    single = S.wsd_s(100, budgets=(1.0,), shape="linear")
    assert single.trace() == S.wsd(100, decay_fraction=0.1, shape="linear", floor=0.1).trace()
    slow = S.wsd_s(400, rewarm_steps=10)
    assert slow(100) == pytest.approx(0.19) and slow(109) == 1


def test_wsdc_tail_is_constant_and_positive():
    schedule = S.wsdc(200, floor=0.1)
    assert set(schedule.trace()[-10:]) == {0.1} and schedule(189) > 0.1
    with pytest.raises(ValueError, match="would not train"):
        S.wsdc(200, floor=0.0)


# ---- every schedule at its edges ----


def everything(total):
    yield from S.gallery(total)


def bounds(schedule):
    floor = getattr(schedule, "floor", 0.0)
    return min(floor, schedule(0)), 1.0


@settings(max_examples=60, deadline=None)
@given(total=st.integers(1, 400), step=st.integers(0, 2000))
def test_finite_and_inside_floor_and_peak_everywhere(total, step):
    for schedule in everything(total):
        low, high = bounds(schedule)
        for t in (0, min(step, total), total):
            assert math.isfinite(schedule(t)) and low - 1e-12 <= schedule(t) <= high + 1e-12, (schedule, t)


@pytest.mark.parametrize("total", [1, 2, 3, 10])
def test_past_the_end_is_clamped_with_one_warning(total):
    for schedule in everything(total):
        if schedule.last_step is None:
            continue
        last = schedule(schedule.last_step)
        with pytest.warns(PastEndWarning, match="ends at step") as record:
            assert schedule(schedule.last_step + 1) == last
            assert schedule(schedule.last_step + 10_000) == last
        assert len(record) == 1


def test_no_schedule_jumps_up_at_its_end():
    for schedule in everything(300):
        if schedule.last_step is not None:
            assert schedule(schedule.last_step) <= schedule(schedule.last_step - 1) + 1e-12, schedule


@pytest.mark.parametrize("total", [1, 120])
def test_specs_survive_json(total):
    for schedule in everything(total):
        again = S.Schedule.from_spec(json.loads(json.dumps(schedule.spec())))
        assert S.same_schedule(again, schedule)
        assert [again(t) for t in range(total + 1)] == [schedule(t) for t in range(total + 1)]


# ---- errors ----


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: S.wsd(10, warmup_steps=6, decay_steps=5), r"warm-up \(6\) \+ decay \(5\) = 11"),
        (lambda: S.wsd(10, warmup_steps=1, warmup_fraction=0.1), "both say how long"),
        (lambda: S.wsd(10, warmup_steps=-1), r"warmup_steps=-1 .* whole number >= 0.*warmup_fraction"),
        (lambda: S.wsd(10, warmup_steps=0.5), "whole number"),
        (lambda: S.wsd(10, decay_fraction=math.nan), "decay_fraction=nan"),
        (lambda: S.wsd(10, decay_fraction=2), "decay_fraction=2"),
        (lambda: S.wsd(10, floor=1.5), "floor=1.5"),
        (lambda: S.wsd(10, shape="exponential"), "never reaches zero"),
        (lambda: S.wsd(10, shape="wiggle"), "shape='wiggle' is unknown. Allowed: "),
        (lambda: S.wsd(10, shape="half-life"), "needs half_life_steps"),
        (lambda: S.wsd(10, half_life_steps=3.0), "only acts with"),
        (lambda: S.wsd(10, decay_start=3), "needs decay_steps"),
        (lambda: S.wsd(0), "total_steps=0"),
        (lambda: S.wsd(True), "total_steps=True"),
        (lambda: S.uba(10, phi=0), "phi=0"),
        (lambda: S.cosine_power(10, base=0.5), "base=0.5"),
        (lambda: S.rex(10, kappa=1.0), "kappa=1.0"),
        (lambda: S.wsd_s(10, budgets=(0.5, 0.5, 1.0)), "rise strictly"),
        (lambda: S.wsd_s(10, budgets=(0.5,)), "end at 1.0"),
        (lambda: S.wsd_s(10, budgets=(0.5, 1.0), decay_fraction=0.8, rewarm_steps=2), "too short"),
        (lambda: S.linear()(3), "does not know the length"),
        (lambda: S.linear(10).bind(11), "was built for total_steps=10"),
        (lambda: S.linear(10)(-1), "step=-1"),
        (lambda: S.linear(10)(math.nan), "step=nan"),
        (lambda: S.make_schedule("wds"), "kind='wds' is not a schedule. Known: "),
        (lambda: S.make_schedule("wsd", warmup=3), "has no argument warmup"),
        (lambda: S.damped_cosine(10, floor=0.6), "floor=0.6"),
    ],
)
def test_errors_name_value_and_fix(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_warmup_longer_than_the_run_is_cut_and_said():
    with pytest.warns(UserWarning, match="peak is never reached"):
        schedule = S.cosine(4, warmup_steps=8)
    assert schedule.trace() == [0.125, 0.25, 0.375, 0.5]


# ---- store, compare, resume ----


def test_reconcile():
    old, new = S.wsd(100), S.wsd(200)
    assert S.reconcile(old, S.wsd(100)) is old
    with pytest.raises(MismatchError, match="total_steps: 100 -> 200"):
        S.reconcile(old, new)
    assert S.reconcile(old, new, "stored") is old
    assert S.reconcile(old, new, "new", step=50) is new
    with pytest.raises(MismatchError, match="would lift it"):
        S.reconcile(old, new, "new", step=90)
    assert S.reconcile(old, new, "new", step=90, allow_lr_jump=True) is new
    with pytest.raises(ValueError, match="on_mismatch='maybe'"):
        S.reconcile(old, new, "maybe")


def run_plain_loop(steps, until=None, state=None, schedule=None, decay_at=None):
    torch.manual_seed(0)
    weights = torch.nn.Parameter(torch.randn(5))
    opt = torch.optim.SGD([{"params": [weights]}, {"params": [torch.nn.Parameter(torch.ones(1))], "lr": 0.5}], lr=0.1)
    scheduler = S.to_lambda_lr(schedule or S.wsd(steps, warmup_steps=3, decay_steps=8), opt)
    if state is not None:
        opt.load_state_dict(state["opt"])
        scheduler.load_state_dict(state["sched"])
        weights.data.copy_(state["weights"])
    lrs = []
    while scheduler.last_epoch < (until or steps):
        if scheduler.last_epoch == decay_at:
            scheduler.start_decay(5)
        lrs.append([g["lr"] for g in opt.param_groups])
        (weights**2).sum().backward()
        opt.step()
        scheduler.step()
        opt.zero_grad()
    return (
        lrs,
        weights.detach().clone(),
        {"opt": opt.state_dict(), "sched": scheduler.state_dict(), "weights": weights},
    )


@pytest.mark.parametrize("cut", [1, 10, 16])
def test_plain_loop_resumes_bit_for_bit(cut, tmp_path):
    whole, weights, _ = run_plain_loop(20)
    first, _, state = run_plain_loop(20, until=cut)
    torch.save(state["sched"], tmp_path / "scheduler.pt")
    state["sched"] = torch.load(tmp_path / "scheduler.pt", weights_only=True)
    rest, resumed, _ = run_plain_loop(20, state=state)
    assert first + rest == whole and torch.equal(weights, resumed)
    schedule = S.wsd(20, warmup_steps=3, decay_steps=8)
    assert whole == [[0.1 * schedule(t), 0.5 * schedule(t)] for t in range(20)]


def test_plain_loop_keeps_a_decay_that_was_started_on_demand():
    schedule = S.wsd(30, open_ended=True)
    whole, _, _ = run_plain_loop(15, schedule=schedule, decay_at=10)
    first, _, state = run_plain_loop(15, schedule=schedule, decay_at=10, until=12)
    rest, _, _ = run_plain_loop(15, schedule=schedule, state=state)
    assert first + rest == whole and whole[12][0] < whole[9][0]
    with pytest.raises(MismatchError):
        run_plain_loop(15, schedule=S.wsd(31, open_ended=True), state=state)
