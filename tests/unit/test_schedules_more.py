"""Infinite, power, 1cycle, refined, composed schedules and layer-wise groups."""

import json
import math

import pytest
import torch

import hf_effi.functional.schedules as S
from hf_effi.errors import MismatchError, RefusedError

INFINITE = {"warmup_steps": 50, "cooldown_steps": 100, "anneal_steps": 200, "warmup_start": 0.0, "warmup_offset": 0}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("cosine", {75: 8.68198e-4, 100: 5.5e-4, 125: 2.31802e-4}),
        ("inverse-sqrt", {75: 4.00234e-4, 100: 2.3753e-4, 125: 1.53454e-4}),
    ],
)
def test_infinite_goldens(kind, expected):
    schedule = S.infinite(1000, cooldown=kind, **INFINITE)
    expected = {**expected, 25: 5e-4, 150: 1e-4, 500: 1e-4, 800: 1e-4, 900: 3.16228e-5, 1000: 1e-5}
    for t, lr in expected.items():
        assert 1e-3 * schedule(t) == pytest.approx(lr, rel=5e-6)


@pytest.mark.parametrize("kind", ["cosine", "inverse-sqrt", "linear"])
def test_infinite_is_continuous_and_does_not_depend_on_a_later_end(kind):
    schedule = S.infinite(1000, cooldown=kind, **INFINITE)
    for t in (50, 150, 800):
        assert schedule(t - 1e-6) == pytest.approx(schedule(t), abs=1e-5)
    longer = S.infinite(5000, cooldown=kind, **INFINITE)
    assert schedule.trace(800) == longer.trace(800)
    second = S.infinite(1000, cooldown=kind, first_task=False, **INFINITE)
    assert max(second.trace()) == 0.1


def test_infinite_anneal_on_demand_and_edges():
    schedule = S.infinite(warmup_steps=5, cooldown_steps=5, open_ended=True)
    assert schedule(10**6) == 0.1
    ended = schedule.start_decay(at=40, decay_steps=10)
    assert ended(40) == 0.1 and ended(45) == pytest.approx(0.1 * math.sqrt(0.1)) and ended(50) == pytest.approx(0.01)
    with pytest.raises(ValueError, match="before the constant phase"):
        schedule.start_decay(at=7, decay_steps=3)
    assert S.infinite(100, cooldown_steps=0)(0) == 0.1, "no cooldown jumps to the constant"
    assert set(S.infinite(100, constant_ratio=1.0).trace(80)) == {1.0}
    with pytest.raises(ValueError, match="floor=0"):
        S.infinite(100, floor=0.0)
    with pytest.raises(ValueError, match="do not fit"):
        S.infinite(100, cooldown_steps=90)


def test_power_goldens():
    raw = [0.105283, 0.0325357, 0.0100545, 0.00310713]
    assert [S.power_lr(n, 1024, max_lr=1.0) for n in (1e9, 1e10, 1e11, 1e12)] == pytest.approx(raw, rel=5e-6)
    assert [S.power_lr(n, 1024) for n in (1e9, 1e10)] == [0.02, 0.02]
    leaves = (1024 * 4 / 0.02) ** (1 / 0.51)
    assert leaves == pytest.approx(2.596e10, rel=1e-3)
    assert S.power_lr(1e13, 1024, a=4.6) == pytest.approx(0.0011042, abs=5e-8)
    assert S.power_lr(0, 1024) == 0.02
    assert S.power_lr(1e12, 2048) == 2 * S.power_lr(1e12, 1024)


def test_power_does_not_depend_on_the_horizon_until_its_decay():
    make = {"tokens_per_step": 1024 * 4096, "warmup_steps": 100, "decay_fraction": 0.1}
    short, long = S.power(20_000, **make), S.power(40_000, **make)
    assert short.trace(18_000) == long.trace(18_000)
    assert short(20_000) == 0 and short(18_000) < short(17_999)
    assert short(0) == pytest.approx(0.01) and short(99) == 1
    with pytest.raises(ValueError, match="tokens_per_step"):
        S.power(10)
    with pytest.raises(ValueError, match="b=0"):
        S.power(10, tokens_per_step=4, b=0.0)


def test_power_follows_a_batch_that_changes():
    unit, make = 4096, {"max_lr": 1e9, "reference_lr": 1.0}
    grown = S.power(tokens_per_step=8 * unit, batch_changes=((10, 16 * unit), (20, 4 * unit)), **make)
    plain = S.power(tokens_per_step=8 * unit, **make)
    assert [grown(t) for t in range(1, 10)] == [plain(t) for t in range(1, 10)]
    # n = what each update had, beta = the batch of the update in hand
    for t, tokens, rows in ((10, 80, 16), (11, 96, 16), (20, 240, 4), (25, 260, 4)):
        assert grown(t) == pytest.approx(rows * 4 * (tokens * unit) ** -0.51, rel=1e-12)
    assert plain.with_batch(10, 16 * unit)(10) == 2 * plain(10), "beta counts at once"
    assert plain.with_batch(10, 16 * unit).with_batch(20, 4 * unit) == grown
    assert grown.with_batch(20, 4 * unit) == grown and plain.with_batch(0, 4)._tokens() == 4
    assert S.Schedule.from_spec(json.loads(json.dumps(grown.spec()))) == grown
    with pytest.raises(ValueError, match="at=5 lies before the change of the batch at update 20"):
        grown.with_batch(5, 8)


def test_power_with_a_changed_batch_in_warm_up_and_decay():
    unit, make = 4096, {"max_lr": 1e9, "reference_lr": 1.0, "warmup_steps": 4, "decay_steps": 3, "shape": "linear"}
    schedule = S.power(12, tokens_per_step=unit, batch_changes=((2, 2 * unit), (10, unit)), **make)
    after = [1 * unit, 2 * unit, 4 * unit, 6 * unit]  # tokens at the end of each update of the warm-up
    for t in range(4):
        rows = 1 if t < 2 else 2
        assert schedule(t) == pytest.approx(after[t] / (6 * unit) * rows * 4 * (6 * unit) ** -0.51)
    begin = (2 * 1 + 7 * 2) * unit  # after 9 updates
    for t, rows, left in ((9, 2, 0.75), (10, 1, 0.5), (11, 1, 0.25)):
        assert schedule(t) == pytest.approx(left * rows * 4 * begin**-0.51)
    assert schedule(12) == 0


@pytest.mark.parametrize(
    "changes",
    [((0, 4),), ((5, 4), (5, 8)), ((5, 4), (3, 8)), ((5, 0),), ((5,),), (5, 4), 7, ((5.0, 4),), ((True, 4),)],
)
def test_power_refuses_changes_that_do_not_ascend(changes):
    with pytest.raises(ValueError, match="batch_changes"):
        S.power(10, tokens_per_step=4, batch_changes=changes)


def test_rewarm_redecay_one_cosine_for_each_data_set():
    schedule = S.rewarm_redecay(200, data_fractions=(0.5, 0.5), warmup_fraction=0.1, peaks=(1.0, 0.6), floor=0.1)
    values = schedule.trace()
    assert max(values[:100]) == 1.0 and max(values[100:]) == pytest.approx(0.6)
    assert values[100] == pytest.approx(0.15) and values[109] == pytest.approx(0.6) and schedule(200) == 0.1
    single = S.rewarm_redecay(1, data_steps=(1,), warmup_steps=0)
    assert single.trace() == [1.0]
    for bad in ({}, {"data_fractions": (0.5, 0.4)}, {"data_steps": (5, 6)}, {"data_steps": (5, 5), "peaks": (1.0,)}):
        with pytest.raises(ValueError):
            S.rewarm_redecay(10, **bad)
    with pytest.raises(ValueError, match="names no data set"):
        S.rewarm_redecay(data_steps=())


def test_one_cycle_momentum_is_the_mirror_of_the_lr():
    schedule = S.one_cycle(100)
    lrs, momenta = schedule.trace(), [schedule.momentum(t) for t in range(100)]
    assert lrs.index(max(lrs)) == momenta.index(min(momenta)) == 45 and min(momenta) == 0.85
    assert momenta[0] == momenta[95] == 0.95 and lrs[0] == pytest.approx(0.1)
    assert S.one_cycle(1).trace() == [0.1] and S.one_cycle(2).trace() == [0.1, 1.0]
    assert S.one_cycle(10, up_fraction=0.0)(0) == 1.0


@pytest.mark.parametrize(("kind", "key"), [("SGD", "momentum"), ("AdamW", "betas")])
def test_one_cycle_writes_momentum_into_every_group(kind, key):
    params = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": [p]} for p in params]
    optimizer = getattr(torch.optim, kind)(groups, lr=0.1, **({"momentum": 0.9} if kind == "SGD" else {}))
    scheduler = S.to_lambda_lr(S.one_cycle(10), optimizer)
    for t in range(10):
        for group in optimizer.param_groups:
            value = group[key][0] if key == "betas" else group[key]
            assert value == S.one_cycle(10).momentum(t)
        optimizer.step()
        scheduler.step()
    with pytest.raises(RefusedError, match="neither momentum nor betas"):
        S.to_lambda_lr(S.one_cycle(10), torch.optim.Adagrad(params, lr=0.1))


def test_slow_start_fast_decay():
    schedule = S.slow_start_fast_decay(10)
    values = schedule.trace()
    assert values[0] == pytest.approx(0.1) and values.index(max(values)) == 5
    falls = [b / a for a, b in zip(values[5:], values[6:], strict=False)]
    assert falls == pytest.approx([falls[0]] * 4) and 1 / falls[0] > values[1] / values[0]
    assert (
        S.slow_start_fast_decay(4, rise_fraction=0.0)(0) == 1 and S.slow_start_fast_decay(4, rise_fraction=1.0)(4) == 1
    )


def test_refined_golden_and_edges():
    golden = [0.084821, 0.321429, 1, 0.714286, 0.428571, 0.142857, 0.017857, 0]
    refined = S.refined_by_gradient_norm([4, 2, 1, 1, 1, 1, 2, 2], "sgd", smooth=0.0, total_steps=8)
    assert refined.trace() == pytest.approx(golden, abs=1e-6)
    flat = S.refined_by_gradient_norm([3.0] * 10, total_steps=10).trace()
    assert flat == pytest.approx([(9 - t) / 9 for t in range(10)])
    assert S.refined_by_gradient_norm([2.0], total_steps=1).trace() == [1.0]
    warm = S.refined_by_gradient_norm([10 / (t + 1) + 1 for t in range(50)], total_steps=50).trace()
    assert 0 < warm.index(max(warm)) < 40 and warm[0] < max(warm)
    assert max(S.refined_by_gradient_norm([0.0, 1.0, 1.0], smooth=0.0, total_steps=3).trace()) == 1
    for bad in ([], [0.0], [1.0, math.nan], [1.0, -1.0], [math.inf]):
        with pytest.raises(ValueError, match="norms must be"):
            S.refined_by_gradient_norm(bad)


def test_median_takes_out_a_spike():
    norms = [1.0] * 100
    norms[40] = 100.0
    assert S.median_smooth(norms, 0.1) == [1.0] * 100


def test_table_stretches():
    values = tuple(i / 9 for i in range(10))
    assert S.table(10, values=values).trace() == list(values)
    assert S.table(19, values=values).trace()[::2] == pytest.approx(values)
    assert S.table(1, values=values).trace() == [0.0]


def test_join_and_scale():
    joined = S.join(10, schedules=(S.wsd(4, decay_steps=2, shape="linear"), S.cosine()), boundaries=(4,))
    assert joined.trace() == S.wsd(4, decay_steps=2, shape="linear").trace() + S.cosine(6).trace()
    late = S.join(schedules=(S.constant(), S.linear()), boundaries=(4,)).bind(6)
    assert late.trace() == [1, 1, 1, 1, 1, 0.5]
    half = S.scale(schedule=S.wsd(warmup_steps=2), factor=0.5).start_decay(10, 4, shape="linear")
    assert half(9) == 0.5 and half(14) == 0
    with pytest.raises(ValueError, match="linear has no decay to start. Use wsd"):
        S.scale(schedule=S.linear(20)).start_decay(10)
    with pytest.raises(ValueError, match="linear has no decay to start. Use wsd"):
        S.to_lambda_lr(S.linear(20), torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)).start_decay(10)
    for bad in (
        {"schedules": (S.linear(), S.linear()), "boundaries": ()},
        {"schedules": (S.linear(), S.linear()), "boundaries": (10,)},
        {"schedules": (S.linear(), 3), "boundaries": (2,)},
    ):
        with pytest.raises(ValueError):
            S.join(10, **bad)


def test_token_index():
    plain = S.wsd(20, warmup_steps=4, decay_steps=5)
    indexed, counter = S.token_indexed(schedule=plain), S.TokenCounter(full_step=4096 * 12)
    for t in range(20):
        assert indexed(counter()) == plain(t)
        counter.add(4096 * 12)
    half = S.TokenCounter(full_step=4096 * 12)
    half.add(2048 * 12)
    assert half() == 0.5
    again = S.TokenCounter(full_step=4096 * 12)
    again.load_state_dict(half.state_dict())
    assert again() == 0.5
    with pytest.raises(MismatchError, match="old size"):
        S.TokenCounter(full_step=10).load_state_dict(half.state_dict())


class Toy(torch.nn.Module):
    def __init__(self, layers=3, tied=True):
        super().__init__()
        self.embed = torch.nn.Embedding(5, 4)
        self.layers = torch.nn.ModuleList(
            torch.nn.ModuleDict({"lin": torch.nn.Linear(4, 4), "norm": torch.nn.LayerNorm(4)}) for _ in range(layers)
        )
        self.norm = torch.nn.LayerNorm(4)
        self.lm_head = torch.nn.Linear(4, 5, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight


@pytest.mark.parametrize("tied", [True, False])
def test_layerwise_groups_are_a_partition(tied):
    model = Toy(tied=tied)
    groups = S.layerwise_param_groups(model, 1.0, decay=0.5, head_factor=10.0, weight_decay=0.1)
    seen = [id(p) for group in groups for p in group["params"]]
    assert sorted(seen) == sorted(id(p) for p in model.parameters()) and len(seen) == len(set(seen))
    lr = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert [lr[id(layer["lin"].weight)] for layer in model.layers] == [0.25, 0.5, 1.0]
    assert lr[id(model.embed.weight)] == 0.125 and lr[id(model.norm.weight)] == 1.0
    assert lr[id(model.lm_head.weight)] == (0.125 if tied else 10.0)
    decayed = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decayed[id(model.layers[0]["lin"].bias)] == 0 and decayed[id(model.layers[0]["lin"].weight)] == 0.1


def test_layerwise_one_lr_and_ratios_survive_a_schedule():
    model = Toy()
    assert {g["lr"] for g in S.layerwise_param_groups(model, 0.1, decay=1.0)} == {0.1}
    optimizer = torch.optim.AdamW(S.layerwise_param_groups(model, 0.1, decay=0.5))
    ratios = [g["lr"] / optimizer.param_groups[0]["lr"] for g in optimizer.param_groups]
    scheduler = S.to_lambda_lr(S.cosine(10, floor=0.1), optimizer)
    for _ in range(10):
        now = [g["lr"] / optimizer.param_groups[0]["lr"] for g in optimizer.param_groups]
        assert now == pytest.approx(ratios, rel=1e-12)
        optimizer.step()
        scheduler.step()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        S.layerwise_param_groups(model, 0.1)
