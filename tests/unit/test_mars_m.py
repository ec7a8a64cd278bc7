"""MARS-M: what it corrects by hand, and where it is Muon."""

import pytest
import torch
from torch import nn

from hf_effi.optim import mars_m, muon


def layer(value=0.5):
    one = nn.Linear(16, 8, bias=False)
    nn.init.constant_(one.weight, value)
    return one


def run(optimizer, module, gradients):
    seen = []
    for gradient in gradients:
        module.weight.grad = gradient.clone()
        optimizer.step()
        optimizer.zero_grad()  # as the Trainer: the gradient object is gone
        seen.append(optimizer.state[module.weight]["momentum_buffer"].clone())
    return module.weight.detach(), seen


def gradients(count=3, size=0.01):
    generator = torch.Generator().manual_seed(0)
    return [size * torch.randn(8, 16, generator=generator) for _ in range(count)]


def test_without_gamma_it_is_muon_to_the_bit():
    one, two = layer(), layer()
    ours, _ = run(mars_m(one, lr=0.01, gamma=0.0), one, gradients())
    plain, _ = run(muon(two, lr=0.01, nesterov=False), two, gradients())
    assert torch.equal(ours, plain)


@pytest.mark.parametrize("memory_free", [False, True])
def test_a_constant_gradient_gives_muon(memory_free):
    same = gradients(1) * 3
    one, two = layer(), layer()
    ours, _ = run(mars_m(one, lr=0.01, gamma=0.5, memory_free=memory_free), one, same)
    plain, _ = run(muon(two, lr=0.01, nesterov=False), two, same)
    if memory_free:  # another multiple of the same direction
        torch.testing.assert_close(ours, plain, atol=1e-3, rtol=0)  # updates of 8e-3
    else:
        assert torch.equal(ours, plain)


def test_two_steps_by_hand():
    one = layer()
    first, second = torch.full((8, 16), 0.01), torch.full((8, 16), 0.02)
    # b = 0.5, gamma = 0.5: C1 = G1; C2 = G2 + 0.5 (G2 - G1) = 0.025; M1 = 0.005; M2 = 0.0025 + 0.0125.
    _, seen = run(mars_m(one, lr=0.01, gamma=0.5, momentum=0.5), one, [first, second])
    torch.testing.assert_close(seen[0], torch.full((8, 16), 0.005))
    torch.testing.assert_close(seen[1], torch.full((8, 16), 0.015))


def test_the_norm_of_a_corrected_gradient_is_held_at_one():
    one, two = layer(), layer()
    large = torch.full((8, 16), 1.0)  # norm sqrt(128)
    _, held = run(mars_m(one, lr=0.01, momentum=0.5), one, [large])
    torch.testing.assert_close(held[0], large * 0.5 / 128**0.5)
    _, free = run(mars_m(two, lr=0.01, momentum=0.5, clip=False), two, [large])
    torch.testing.assert_close(free[0], large * 0.5)


def test_the_form_without_memory_by_hand():
    one = layer()
    # b = 0.5, gamma = 0.2: B = 0.5 B + 0.8 G: 0.8, then 0.4 + 0.8.
    optimizer = mars_m(one, lr=0.01, gamma=0.2, momentum=0.5, memory_free=True)
    _, seen = run(optimizer, one, [torch.ones(8, 16)] * 2)
    torch.testing.assert_close(seen[0], torch.full((8, 16), 0.8))
    torch.testing.assert_close(seen[1], torch.full((8, 16), 1.2))
    assert "previous_gradient" not in optimizer.state[one.weight]


def test_the_gradient_before_is_saved():
    one, two, plain = layer(), layer(), layer()
    first = mars_m(one, lr=0.01, gamma=0.5)
    run(first, one, gradients()[:2])
    second = mars_m(two, lr=0.01, gamma=0.5)
    second.load_state_dict(first.state_dict())
    two.load_state_dict(one.state_dict())
    plain.load_state_dict(one.state_dict())
    lost = mars_m(plain, lr=0.01, gamma=0.5)
    state = first.state_dict()
    for entry in state["state"].values():
        entry.pop("previous_gradient", None)
    lost.load_state_dict(state)
    first.state[one.weight]["previous_gradient"] = second.state[two.weight]["previous_gradient"].clone()
    third = gradients()[2:]
    ours, again = run(first, one, third)[0], run(second, two, third)[0]
    assert torch.equal(ours, again)
    assert not torch.equal(run(lost, plain, third)[0], ours)


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"gamma": 1.5}, r"gamma=1.5 must be a number in \[0, 1\]"),
        ({"memory_free": True, "clip": True}, "clip=True acts on a corrected gradient"),
        ({"memory_free": True, "momentum": 0.0}, "must be above 0 with memory_free=True"),
        ({"momentum": -1}, r"momentum=-1 must be a number in \[0, 1\)"),
    ],
)
def test_values_out_of_range(over, message):
    with pytest.raises(ValueError, match=message):
        mars_m(layer(), lr=0.01, **over)
