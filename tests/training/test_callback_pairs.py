"""
Every pair of our callbacks, in both orders: the order changes nothing, and each does what it does alone.

Those that leave training alone go many into one run: a few blocks that hold every pair of them, each block in both
orders, by itself and beside each callback that trains. A block that fails is taken apart into its pairs, so that the
message names two.
"""

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

LEAVE = sorted(name for name, case in CASES.items() if not case.trains)
TRAIN = sorted(set(CASES) - set(LEAVE))
_ALONE: dict[tuple, Result] = {}


def compatible(names):
    return not any(frozenset(pair) in REFUSED for pair in itertools.combinations(names, 2))


def blocks_of(names, wanted):
    """Return sets of names without a refused pair, largest first, so that each of `wanted` lies in one of them."""
    blocks, missing = [], list(wanted)
    while missing:
        block = list(missing[0])
        fresh = sorted(names, key=lambda name: (not any(name in other for other in missing), name))
        block += [name for name in fresh if name not in block and compatible([*block, name])]
        block = [name for number, name in enumerate(block) if compatible(block[: number + 1])]
        blocks.append(tuple(sorted(block)))
        missing = [other for other in missing if not set(other) <= set(block)]
    return blocks


PAIRS = [pair for pair in itertools.combinations(LEAVE, 2) if frozenset(pair) not in REFUSED]
BLOCKS = blocks_of(LEAVE, PAIRS)
#: fewer blocks, which hold every name
COVER = blocks_of(LEAVE, [(name,) for name in LEAVE])


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    torch.set_num_threads(1)
    without_network(monkeypatch)


def test_every_callback_has_a_case():
    missing = set(public_callbacks()) - set(CASES)
    assert not missing, f"no case in tests/helpers/callback_cases.py, so no test beside the others: {sorted(missing)}"
    assert set(CASES) <= set(public_callbacks()), "a case of a callback that is gone"


def test_the_blocks_hold_every_pair():
    assert all(any(set(pair) <= set(block) for block in BLOCKS) for pair in PAIRS)
    assert {name for block in COVER for name in block} == set(LEAVE)
    assert all(compatible(block) for block in [*BLOCKS, *COVER])
    assert len(COVER) <= len(BLOCKS) < len(PAIRS) / 5


def alone(name, names, tmp_path):
    settings, model = settings_of(names)
    key = (name, tuple(sorted(settings.items())), model)
    if key not in _ALONE:
        _ALONE[key] = train(tmp_path / f"alone-{name}", [name], settings, model)
    return _ALONE[key]


def check(names, folder):
    """Train with these in both orders; those that train must be at most two."""
    settings, model = settings_of(names)
    together = train(folder / "one", names, settings, model)
    swapped = train(folder / "other", names[::-1], settings, model)
    assert not differences(together.everything(), swapped.everything()), "the order matters"
    training = [name for name in names if CASES[name].trains]
    for name in names:
        if not set(training) - {name}:
            same_as_alone(together, alone(name, names, folder), name)
    check_learning_rate(together, names)
    check_probes(together, names)
    check_average(together)
    check_record(together)


def check_block(names, folder):
    try:
        check(names, folder / "block")
    except AssertionError as error:
        for number, pair in enumerate(itertools.combinations(names, 2)):
            try:
                check(pair, folder / str(number))
            except AssertionError as smaller:
                raise AssertionError(f"{' beside '.join(pair)}: {smaller}") from error
        raise


@pytest.mark.parametrize("pair", sorted(map(sorted, REFUSED)), ids="+".join)
def test_refused_pair(tmp_path, pair):
    settings, model = settings_of(pair)
    for number, names in enumerate((pair, pair[::-1])):
        with pytest.raises(RefusedError, match=REFUSED[frozenset(pair)]):
            train(tmp_path / str(number), names, settings, model)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{len(block)} with {'+'.join(block[:3])}")
def test_those_that_leave_training_alone(tmp_path, block):
    check_block(block, tmp_path)


@pytest.mark.parametrize("number", range(len(COVER)))
@pytest.mark.parametrize("name", TRAIN)
def test_one_that_trains_beside_the_others(tmp_path, name, number):
    block = tuple(other for other in COVER[number] if compatible((name, other)))
    check_block((name, *block), tmp_path)


@pytest.mark.parametrize("pair", [pair for pair in itertools.combinations(TRAIN, 2) if compatible(pair)], ids="+".join)
def test_two_that_train(tmp_path, pair):
    check(pair, tmp_path)


def same_as_alone(together, single, name):
    """Others that leave training alone were there: weights, LRs and this callback's state are the same."""
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
    found = torch.cat([value.flatten() for value in final.values()])
    assert torch.equal(
        found[: mean.mean["weights"].numel()], mean.mean["weights"]
    )  # then buffers, where a model has some


def check_record(result):
    """The record has every log entry, with what all callbacks put into it."""
    if result.events is None:
        return
    recorded = [{**event["values"], "step": event["step"]} for event in result.events]
    assert not differences(recorded, result.logs)


@pytest.mark.parametrize(
    "others",
    [*COVER, *[(name,) for name in TRAIN if name not in ("AutoLRSCallback", "LRScheduleCallback")]],
    ids=lambda others: f"{len(others)} with {others[0]}" if len(others) > 1 else others[0],
)
def test_resume_inside_of_a_probe(tmp_path, others):
    """Update 11 is the first of a probe's two: the checkpoint holds weights that are undone after the next one."""
    names = (*others, "AutoLRSCallback")
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
