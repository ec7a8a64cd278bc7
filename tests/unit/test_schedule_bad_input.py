"""What a newcomer gets wrong: each message names the value, what is allowed, and the fix."""

import math
import types

import pytest
import torch

from hf_effi.callbacks.adaptive_lr import AccuracyGradientCallback
from hf_effi.callbacks.lr_schedule import LRScheduleCallback
from hf_effi.functional.schedules import (
    constant,
    cosine_power,
    extend_to,
    join,
    layerwise_param_groups,
    linear,
    scale,
    table,
    to_lambda_lr,
    token_indexed,
    uba,
    wsd,
)
from hf_effi.report.schedule_plot import plot_schedules
from hf_effi.schedules.range_test import lr_range_test
from hf_effi.trainers.mixins.schedule import schedule_from_config


def sgd():
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)


def config(name, kwargs=None):
    return types.SimpleNamespace(lr_schedule=name, lr_schedule_kwargs=kwargs, lr_schedule_on_mismatch="error")


CASES = {
    "step as text": (lambda: wsd(100)("a"), r"step='a' is not allowed: it counts finished updates"),
    "no step": (lambda: wsd(100)(None), r"step=None is not allowed"),
    "negative step": (lambda: wsd(100)(-1), r"step=-1 is not allowed.*number >= 0"),
    "NaN step": (lambda: wsd(100)(math.nan), r"step=nan is not allowed"),
    "length as text": (lambda: wsd("100"), r"total_steps='100' is not allowed.*whole number >= 1"),
    "a schedule first": (lambda: scale(wsd(10)), r"the first argument of scale is the number of updates.*schedule"),
    "schedules first": (lambda: join([wsd(10), wsd(10)]), r"first argument of join.*Pass by name: .*schedules"),
    "values first": (lambda: table([1.0, 0.5]), r"first argument of table.*Pass by name: .*values"),
    "too long": (lambda: wsd(10, warmup_steps=8, decay_steps=8), r"= 16 updates do not fit into total_steps=10"),
    "floor above peak": (lambda: linear(10, floor=2), r"floor=2 is not allowed: it must be a number in \[0, 1\]"),
    "to zero": (lambda: wsd(10, shape="exponential"), r"floor=0.0 is not allowed.*floor=1e-3"),
    "phi": (lambda: uba(10, phi=0), r"phi=0 is not allowed: it must be a number in \(0, inf\)"),
    "base": (lambda: cosine_power(10, base=0.5), r"base=0.5 is not allowed: it must be a number in \[1, inf\)"),
    "shape": (lambda: wsd(10, shape="foo"), r"shape='foo' is unknown. Allowed: 1-sqrt"),
    "shapes": (lambda: wsd(10, shape=["cosine"]), r"shape=\['cosine'\] is unknown. Allowed"),
    "fewer steps": (lambda: wsd(100).bind(50), r"built for total_steps=100, but the run has 50"),
    "no schedule": (lambda: to_lambda_lr(3, sgd()), r"schedule=3 is not a Schedule"),
    "a function": (lambda: to_lambda_lr(lambda t: 1, sgd(), total_steps=3), r"is not a Schedule. Pass one"),
    "no optimizer": (lambda: to_lambda_lr(wsd(10), 3), r"optimizer=3 is not a torch.optim.Optimizer"),
    "mismatch": (lambda: to_lambda_lr(wsd(10), sgd(), on_mismatch="x"), r"on_mismatch='x'.*'stored'"),
    "extend": (lambda: extend_to(3, 100), r"schedule=3 is not a Schedule"),
    "groups": (lambda: layerwise_param_groups(3, 1e-3), r"model=3 is not a torch.nn.Module"),
    "callback": (lambda: LRScheduleCallback("wsd"), r"schedule='wsd' is not a Schedule.*wsd\(\)"),
    "class": (lambda: LRScheduleCallback(wsd), r"is not a Schedule"),
    "counter": (lambda: LRScheduleCallback(token_indexed(schedule=wsd(10))), r"needs counter=\.\.\."),
    "not a counter": (
        lambda: LRScheduleCallback(token_indexed(schedule=wsd(10)), counter=3),
        r"counter=3 is not a function.*TokenCounter",
    ),
    "YAML name": (lambda: schedule_from_config(config("wsdd")), r"'wsdd' is not a schedule. Known: constant"),
    "YAML key": (lambda: schedule_from_config(config("wsd", {"warmup_step": 3})), r"no argument warmup_step. It has:"),
    "YAML text": (lambda: schedule_from_config(config("wsd", "a")), r"lr_schedule_kwargs='a' is not JSON"),
    "YAML list": (lambda: schedule_from_config(config("wsd", [1])), r"must be a dict or a JSON object"),
    "YAML no name": (lambda: schedule_from_config(config(None, {"a": 1})), r"needs lr_schedule"),
    "range model": (lambda: lr_range_test(3, sgd(), [1] * 10), r"not int and SGD"),
    "range batches": (lambda: lr_range_test(torch.nn.Linear(1, 1), sgd(), 3), r"batches is int.*list\(dataloader\)"),
    "range high": (
        lambda: lr_range_test(torch.nn.Linear(1, 1), sgd(), [1] * 10, high="a"),
        r"high='a' is not allowed",
    ),
    "metric": (lambda: AccuracyGradientCallback(metric=3), r"metric=3 is not a name"),
    "min_lr": (lambda: AccuracyGradientCallback(min_lr=-1), r"min_lr=-1 is not allowed"),
    "plot one": (lambda: plot_schedules(wsd(10)), r"is not a list or a dict of schedules"),
    "plot number": (lambda: plot_schedules({"a": 3}), r"'a' is 3, not a Schedule"),
    "plot steps": (lambda: plot_schedules([constant(3)], "x.png"), r"steps='x.png' is not allowed"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_message_names_value_range_and_fix(name):
    act, message = CASES[name]
    with pytest.raises(ValueError, match=message):
        act()


@pytest.mark.parametrize("bad", ["fast", 3, [1.0, "x"], [[1.0], [2.0]]])
def test_planners_take_sequences_of_numbers_only(bad):
    from hf_effi.functional.schedules import omega, refined_by_gradient_norm

    with pytest.raises(ValueError, match="must be a sequence of numbers"):
        omega(bad)
    with pytest.raises(ValueError, match="must be a sequence of numbers"):
        refined_by_gradient_norm(bad)
