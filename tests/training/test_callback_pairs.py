"""Every pair of our callbacks, in both orders: the order changes nothing, and each does what it does alone."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from hf_effi.callbacks._lr_factors import METRIC
from hf_effi.errors import RefusedError
from hf_effi.functional.averaging import RunningAverage
from hf_effi.functional.schedules import wsd
from tests.helpers.callback_cases import (
    BASE_LR,
    CASES,
    REFUSED,
    STEPS,
    Result,
    differences,
    public_callbacks,
    settings_of,
    train,
    without_network,
)

PAIRS = list(itertools.combinations(sorted(CASES), 2))
_ALONE: dict[tuple, Result] = {}


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    torch.set_num_threads(1)
    without_network(monkeypatch)


def test_every_callback_has_a_case():
    missing = set(public_callbacks()) - set(CASES)
    assert not missing, f"no case in tests/helpers/callback_cases.py, so no test beside the others: {sorted(missing)}"
    assert set(CASES) <= set(public_callbacks()), "a case of a callback that is gone"


def alone(name, names, tmp_path):
    settings, model = settings_of(names)
    key = (name, tuple(sorted(settings.items())), model)
    if key not in _ALONE:
        _ALONE[key] = train(tmp_path / f"alone-{name}", [name], settings, model)
    return _ALONE[key]


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_pair(tmp_path, pair):
    settings, model = settings_of(pair)
    if frozenset(pair) in REFUSED:
        for number, names in enumerate((pair, pair[::-1])):
            with pytest.raises(RefusedError, match=REFUSED[frozenset(pair)]):
                train(tmp_path / str(number), names, settings, model)
        return
    together = train(tmp_path / "one", pair, settings, model)
    swapped = train(tmp_path / "other", pair[::-1], settings, model)
    assert not differences(together.everything(), swapped.everything()), "the order matters"
    for name, other in (pair, pair[::-1]):
        if not CASES[other].trains:
            same_as_alone(together, alone(name, pair, tmp_path), name)
    check_learning_rate(together, pair)
    check_probes(together, pair)
    check_average(together)
    check_record(together)


def same_as_alone(together, single, name):
    """Another callback that leaves training alone was there: weights, LRs and this callback's state are the same."""
    assert not differences(together.trace.weights, single.trace.weights), f"the weights are not those of {name} alone"
    assert not differences(together.end, single.end)
    assert together.trace.lrs == single.trace.lrs
    for step, states in single.trace.states.items():
        assert not differences(together.trace.states[step][name], states[name], f"{name} after update {step}")
    assert not differences({key: together.state[key] for key in single.state}, single.state)
    assert not differences(together.average if single.average else None, single.average)


def check_learning_rate(result, names):
    """What was logged is what was applied: the scheduled LR times the product of the factors."""
    schedule = wsd(STEPS, warmup_steps=3, decay_steps=10, floor=0.3) if "LRScheduleCallback" in names else None
    lowest = 1e-6 if "AccuracyGradientCallback" in names else 0.0
    entries = [entry for entry in result.logs if "learning_rate" in entry]
    expected = {CASES[name].make(None).factor for name in names if hasattr(CASES[name].make, "factor")}
    for entry in entries:
        assert entry["learning_rate"] == result.trace.lrs[entry["step"]]
        scheduled = BASE_LR * (1 if schedule is None else schedule(entry["step"] - 1))
        factors = {key.removeprefix(METRIC): value for key, value in sorted(entry.items()) if METRIC in key}
        assert expected <= set(factors)
        assert entry["learning_rate"] == max(lowest, scheduled * math.prod(factors.values()))


def check_probes(result, names):
    """A search leaves weights and states as they were, and its entries in the log are marked."""
    plan = result.probes
    assert plan.blocks == (((1, 4, 2), (9, 12, 2), (17, 20, 2)) if "AutoLRSCallback" in names else ())
    for first, last, length in plan.blocks:
        for end in range(first - 1 + length, last + 1, length):
            assert torch.equal(result.trace.weights[end], result.trace.weights[first - 1])
        before, after = result.trace.states[first - 1], result.trace.states[last]
        for name in set(names) - {"AutoLRSCallback", "HubCallback"}:
            assert not differences(after[name], before[name], f"{name} after the probes {first} to {last}")
    for entry in result.logs:
        assert ("effi/probe" in entry) == ("loss" in entry and plan.is_probe(entry["step"]))
        assert "eval_loss" not in entry or not plan.is_probe(entry["step"])


def check_average(result):
    """The average is that of the last, third and fifth last weights of training."""
    if result.average is None or "WeightAveragingCallback" not in result.trace.looks:
        return
    plan, mean = result.probes, RunningAverage()
    total = plan.trained(STEPS)
    steps = [plan.update_of(total - back) for back in (4, 2, 0)]
    for step in steps:
        mean.push({"weights": result.trace.weights[step][result.trace.trainable]})
    final = result.trace.states[STEPS]["WeightAveragingCallback"]["mean"]
    assert torch.equal(torch.cat([value.flatten() for value in final.values()]), mean.mean["weights"])


def check_record(result):
    """The record has every log entry, with what all callbacks put into it."""
    if result.events is None:
        return
    recorded = [{**event["values"], "step": event["step"]} for event in result.events]
    assert not differences(recorded, result.logs)


@pytest.mark.parametrize("name", sorted(set(CASES) - {"AutoLRSCallback", "LRScheduleCallback"}))
def test_resume_inside_of_a_probe(tmp_path, name):
    """Update 11 is the first of a probe's two: the checkpoint holds weights that are undone after the next one."""
    names = (name, "AutoLRSCallback")
    settings, model = settings_of(names)
    whole = train(tmp_path / "whole", names, settings, model)
    train(tmp_path / "cut", names, settings, model, stop=11)
    rest = train(tmp_path / "cut", names[::-1], settings, model, resume=11)
    same_after_resume(whole, rest, 11)


def same_after_resume(whole, rest, step):
    assert not differences({s: w for s, w in whole.trace.weights.items() if s >= step}, rest.trace.weights)
    assert {s: lr for s, lr in whole.trace.lrs.items() if s > step} == rest.trace.lrs
    assert not differences(rest.end, whole.end)
    assert not differences(rest.state, whole.state)
    assert not differences(rest.average, whole.average)
    for after, states in rest.trace.states.items():
        states = {name: state for name, state in states.items() if name != "HubCallback"}  # uploads of this part
        assert not differences(states, {name: whole.trace.states[after][name] for name in states}, f"after {after}")
