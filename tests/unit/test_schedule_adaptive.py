import math
import random

import pytest
import torch

from hf_effi.checkpoint.snapshot import restore_snapshot, take_snapshot
from hf_effi.errors import RefusedError
from hf_effi.functional.schedules.adaptive import (
    AccuracyGradient,
    GradientSNR,
    Hypergradient,
    check_schedule_free,
)
from hf_effi.schedules.range_test import lr_range_test


def quadratic(lr, steps=200):
    """Gradient descent on x^2/2 with the multiplier of the hypergradient rule; returns the rule."""
    rule, x, last = Hypergradient(kappa=0.1), 1.0, 0.0
    for _ in range(steps):
        update = -lr * rule.multiplier * x
        if last and update:
            rule.push(math.copysign(1.0, update * last))
        x, last = x + update, update
    return rule


def test_hypergradient_climbs_when_slow_and_falls_when_unstable():
    assert quadratic(1e-4, 60).multiplier == 10.0
    assert quadratic(1.9, 20).multiplier < 1


def test_hypergradient_state():
    one, two = Hypergradient(), Hypergradient()
    one.push(1.0)
    two.load_state_dict(one.state_dict())
    assert two.push(-1.0) == one.push(-1.0)


def test_accuracy_gradient_golden_rise_and_resume():
    rising = AccuracyGradient()
    assert all(rising.push(0.3 + 0.01 * i) == 1 for i in range(40))
    loss = AccuracyGradient(greater_is_better=False)
    assert all(loss.push(3 - 0.01 * i) == 1 for i in range(40))
    whole, first, second = AccuracyGradient(), AccuracyGradient(), AccuracyGradient()
    trace = [whole.push(0.5) for _ in range(20)]
    head = [first.push(0.5) for _ in range(8)]
    second.load_state_dict(first.state_dict())
    assert head + [second.push(0.5) for _ in range(12)] == trace and trace[-1] == pytest.approx(0.8**3)


def test_gradient_snr_finds_the_ratio():
    rng = random.Random(0)
    rule, signal, dims = GradientSNR(memory=0.998, lowest=0.0), 0.6, 50
    for _ in range(3000):
        one = [signal + rng.gauss(0, 1) for _ in range(dims)]
        two = [signal + rng.gauss(0, 1) for _ in range(dims)]
        inner = sum(a * b for a, b in zip(one, two, strict=True))
        rule.push(inner, sum((a - b) ** 2 for a, b in zip(one, two, strict=True)) / 4)
    snr = signal**2 / 0.5
    assert rule.multiplier == pytest.approx(snr / (1 + snr), rel=0.05)
    noise, clean = GradientSNR(), GradientSNR()
    noise.push(-1.0, 1.0)
    clean.push(1.0, 0.0)
    assert noise.multiplier == 0.1 and clean.multiplier == 1 and GradientSNR().multiplier == 1


def setup(seed=0):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.Dropout(0.1), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batches = [torch.randn(8, 4) for _ in range(40)]
    return model, optimizer, batches


def loss_fn(model, batch):
    return (model(batch) - batch.sum(1, keepdim=True)).square().mean()


def step(model, optimizer, batch):
    optimizer.zero_grad()
    loss_fn(model, batch).backward()
    optimizer.step()


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a is b or bool((a == b) if not hasattr(a, "shape") else (a == b).all())


def test_snapshot_brings_everything_back():
    model, optimizer, batches = setup()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))
    # As accelerate's wrapped optimizer carries it in fp16 training.
    optimizer.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
    model[2].eval()

    def train(some):
        for batch in some:
            optimizer.zero_grad()
            optimizer.scaler.scale(loss_fn(model, batch)).backward()
            optimizer.scaler.step(optimizer)
            optimizer.scaler.update()
            scheduler.step()

    train(batches[:5])
    snapshot = take_snapshot(model, optimizer, scheduler)
    expected = []
    for _ in range(2):
        train(batches[5:15])
        random.random()
        expected.append([p.detach().clone() for p in model.parameters()])
        assert optimizer.scaler.get_scale() != snapshot["scaler"]["scale"] and scheduler.last_epoch == 15
        assert not same(take_snapshot(model, optimizer, scheduler), snapshot)
        restore_snapshot(snapshot, model, optimizer, scheduler=scheduler)
        assert same(take_snapshot(model, optimizer, scheduler), snapshot)
        assert scheduler.last_epoch == 5 and not model[2].training and model[1].training
    assert same(expected[0], expected[1])


def test_range_test_leaves_no_trace_and_reports_with_a_confidence():
    model, optimizer, batches = setup()
    step(model, optimizer, batches[0])
    before = take_snapshot(model, optimizer)
    report = lr_range_test(model, optimizer, batches, loss_fn, low=1e-5, high=10.0)
    assert same(take_snapshot(model, optimizer), before)
    assert len(report.runs) == 3 and report.confidence in ("high", "low", "none")
    if report.confidence != "none":
        assert 1e-5 < report.low <= report.high < 10
    assert lr_range_test(model, optimizer, batches, loss_fn, repeats=1).confidence != "high"


def test_range_test_restores_after_an_error_and_survives_nan():
    model, optimizer, batches = setup()
    before = take_snapshot(model, optimizer)
    calls = []

    def broken(m, batch):
        calls.append(1)
        if len(calls) == 7:
            raise RuntimeError("boom")
        return loss_fn(m, batch)

    with pytest.raises(RuntimeError, match="boom"):
        lr_range_test(model, optimizer, batches, broken)
    assert same(take_snapshot(model, optimizer), before)
    assert lr_range_test(model, optimizer, batches, lambda m, b: loss_fn(m, b) * math.nan).confidence == "none"
    with pytest.raises(ValueError, match="too few"):
        lr_range_test(model, optimizer, batches[:3], loss_fn)


def test_schedule_free_guard():
    with pytest.raises(RefusedError, match="wsd would decay it"):
        check_schedule_free("AdamWScheduleFree", "wsd", "constant")
    with pytest.raises(RefusedError, match="lr_scheduler_type='constant'"):
        check_schedule_free("schedule_free_adamw", None, "linear")
    check_schedule_free("schedule_free_adamw", "constant", "constant")
