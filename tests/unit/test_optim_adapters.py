"""Optimizers of other packages: one step by hand, what stays out of a ratio, what is refused; several as one."""

import copy
import math

import pytest
import torch
from torch import nn

from hf_effi.errors import RefusedError
from hf_effi.optim import SplitOptimizer, lamb, lars, optimizer_report, prodigy, soap
from hf_effi.optim.adapters import _checked_once, from_package
from hf_effi.optim.names import find_factory, optimizer_names


class Net(nn.Module):
    """One matrix with a bias, and a norm."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.dense, self.norm = nn.Linear(9, 8), nn.LayerNorm(8)

    def gradients(self):
        torch.manual_seed(1)
        for parameter in self.parameters():
            parameter.grad = torch.randn_like(parameter)
        return {name: p.grad.clone() for name, p in self.named_parameters()}


def test_one_step_of_lars_by_hand():
    model = Net()
    before, gradients = copy.deepcopy(model), model.gradients()
    lars(model, lr=0.5, weight_decay=0.1, momentum=0.9, trust_coefficient=0.02).step()
    w, g = before.dense.weight, gradients["dense.weight"]
    ratio = 0.02 * w.norm() / (g.norm() + 0.1 * w.norm())
    torch.testing.assert_close(model.dense.weight, w - 0.5 * ratio * (g + 0.1 * w))
    torch.testing.assert_close(model.dense.bias, before.dense.bias - 0.5 * gradients["dense.bias"])
    torch.testing.assert_close(model.norm.weight, before.norm.weight - 0.5 * gradients["norm.weight"])


def test_one_step_of_lamb_by_hand():
    model = Net()
    before, gradients = copy.deepcopy(model), model.gradients()
    lamb(model, lr=0.01, weight_decay=0.1, betas=(0.9, 0.99), eps=1e-6).step()
    w, g = before.dense.weight, gradients["dense.weight"]
    update = 0.1 * g / ((0.01 * g**2).sqrt() + 1e-6) + 0.1 * w
    torch.testing.assert_close(model.dense.weight, w - 0.01 * w.norm() / update.norm() * update, rtol=1e-4, atol=1e-6)
    # AdamW for the rest: its first step is the sign.
    sign = gradients["dense.bias"].sign()
    torch.testing.assert_close(model.dense.bias, before.dense.bias - 0.01 * sign, rtol=1e-4, atol=1e-6)
    assert {row.name: row.rule for row in optimizer_report(lamb(Net(), lr=0.1)).rows} == {
        "dense.weight": "lamb",
        "dense.bias": "adamw",
        "norm.weight": "adamw",
        "norm.bias": "adamw",
    }


def test_the_estimate_of_prodigy_never_falls_and_reaches_the_minimum():
    torch.manual_seed(0)
    model = nn.Linear(8, 1, bias=False)
    data, target = torch.randn(64, 8), torch.randn(64, 1)
    best = (data @ torch.linalg.lstsq(data, target).solution - target).square().mean().item()
    optimizer = prodigy(model, lr=1.0)
    estimates = []
    for _ in range(400):
        optimizer.zero_grad()
        loss = (model(data) - target).square().mean()
        loss.backward()
        optimizer.step()
        estimates.append(float(optimizer.param_groups[0]["d"]))
    assert estimates == sorted(estimates) and estimates[0] == pytest.approx(1e-6, rel=1e-3) and estimates[-1] > 1e-3
    assert loss.item() == pytest.approx(best, rel=1e-2)
    with pytest.raises(ValueError, match=r"lr=5e-05 multiplies the step size that Prodigy estimates"):
        prodigy(model, lr=5e-5)


def test_soap_starts_with_a_preconditioner_and_no_update():
    model = Net()
    before = copy.deepcopy(model)
    optimizer = soap(model, lr=0.1)
    model.gradients()
    optimizer.step()
    assert torch.equal(model.dense.weight, before.dense.weight)
    optimizer.step()
    assert not torch.equal(model.dense.weight, before.dense.weight)


def test_any_optimizer_of_the_package_by_name():
    factory = find_factory("pytorch_optimizer:ademamix")
    assert "alpha" in factory.options and factory.name == "pytorch_optimizer:ademamix"
    model = Net()
    optimizer = factory(model, lr=0.1, weight_decay=0.5, alpha=2.0)
    assert optimizer.param_groups[0]["alpha"] == 2.0
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.5, 0.0}
    assert "pytorch_optimizer:NAME" in optimizer_names()
    with pytest.raises(ValueError, match=r"has no argument 'beta9'"):
        factory(model, lr=0.1, beta9=1)
    with pytest.raises(ValueError, match=r"pytorch_optimizer has no 'adamx'. It has, for example, adam,"):
        from_package("adamx")
    with pytest.raises(ValueError, match=r"pytorch_optimizer has no ''"):
        from_package("")


def test_a_step_that_needs_a_closure_is_refused():
    with pytest.raises(RefusedError, match="LBFGS needs a closure"):
        from_package("lbfgs")


def test_a_state_that_could_not_be_loaded_is_said_at_the_first_update():
    class Odd(torch.optim.Optimizer):
        def step(self, closure=None):
            self.state[self.param_groups[0]["params"][0]]["projector"] = object()

    model = Net()
    optimizer = Odd(model.parameters(), {"lr": 0.1})
    _checked_once(optimizer)
    model.gradients()
    with pytest.raises(RefusedError, match="Odd keeps object in its state, which a Trainer cannot load"):
        optimizer.step()


def make_split():
    torch.manual_seed(0)
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    parts = [
        torch.optim.SGD(a.named_parameters(), lr=1.0, momentum=0.9),
        torch.optim.AdamW(b.named_parameters(), lr=0.1),
    ]
    return SplitOptimizer(parts, lr=1.0), a, b


def step(optimizer, *modules):
    for module in modules:
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def test_several_optimizers_are_one_to_a_scheduler_and_a_checkpoint():
    optimizer, a, b = make_split()
    step(optimizer, a, b)
    saved = optimizer.state_dict()
    assert len(saved["state"]) == 4 and [group["lr"] for group in saved["param_groups"]] == [1.0, 0.1]
    other, c, d = make_split()
    other.load_state_dict(saved)
    for group, mine in zip(
        other.param_groups, [*other.parts[0].param_groups, *other.parts[1].param_groups], strict=True
    ):
        assert group is mine
    c.load_state_dict(a.state_dict()), d.load_state_dict(b.state_dict())
    torch.optim.lr_scheduler.LambdaLR(other, lambda _: 0.5)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.5)
    step(optimizer, a, b), step(other, c, d)
    assert torch.equal(a.weight, c.weight) and torch.equal(b.weight, d.weight)
    twin = copy.deepcopy(other)
    assert twin.parts[1].state is twin.state and twin.parts[1].param_groups[0] is twin.param_groups[1]


def test_what_cannot_be_one_optimizer():
    with pytest.raises(ValueError, match="at least one"):
        SplitOptimizer([], lr=1.0)
    a = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="more than one parameter group"):
        SplitOptimizer([torch.optim.SGD(a.parameters(), lr=1.0), torch.optim.SGD(a.parameters(), lr=1.0)], lr=1.0)
    used = torch.optim.SGD(a.parameters(), lr=1.0, momentum=0.9)
    step(used, a)
    with pytest.raises(ValueError, match="have made no update yet"):
        SplitOptimizer([used], lr=1.0)
    optimizer, *_ = make_split()
    with pytest.raises(ValueError, match="takes no further group"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    assert math.isclose(optimizer.step(lambda: torch.tensor(3.0)), 3.0)
