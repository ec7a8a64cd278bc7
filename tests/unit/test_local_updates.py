"""The outer step of local updates by hand, and the vector that is sent."""

from __future__ import annotations

import math

import pytest
import torch

from hf_effi.functional.local_updates import LocalUpdates, flatten, outer_step, unflatten_into


def test_two_outer_steps_by_hand() -> None:
    velocity = torch.zeros(1, dtype=torch.float64)
    theta = torch.ones(1, dtype=torch.float64)
    # D = 1 - (.8 + .6) / 2 = .3, v = .3, theta = 1 - .7 (.3 + .9 .3)
    theta = outer_step(theta, torch.tensor([(0.8 + 0.6) / 2], dtype=torch.float64), velocity, 0.7, 0.9)
    assert theta.item() == pytest.approx(0.601, abs=1e-15) and velocity.item() == pytest.approx(0.3, abs=1e-15)
    # The processes move by -.1 and -.3: D = .2, v = .9 .3 + .2 = .47, theta = .601 - .7 (.2 + .9 .47)
    theta = outer_step(theta, theta - 0.2, velocity, 0.7, 0.9)
    assert theta.item() == pytest.approx(0.1649, abs=1e-15) and velocity.item() == pytest.approx(0.47, abs=1e-15)


def test_it_is_torchs_nesterov() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(7, generator=generator, dtype=torch.float64))
    sgd = torch.optim.SGD([weight], lr=0.3, momentum=0.8, nesterov=True)
    theta, velocity = weight.detach().clone(), torch.zeros(7, dtype=torch.float64)
    for _ in range(4):
        mean = torch.randn(7, generator=generator, dtype=torch.float64)
        weight.grad = theta - mean
        theta = outer_step(theta, mean, velocity, 0.3, 0.8)
        sgd.step()
        torch.testing.assert_close(theta, weight.detach(), rtol=0, atol=1e-14)


def test_without_a_rate_and_momentum_it_is_the_mean_to_the_bit() -> None:
    anchor, mean = torch.tensor([1e8, -0.0, math.inf, 1.0]), torch.tensor([1e-8, -0.0, 2.0, math.nan])
    found = outer_step(anchor, mean, torch.zeros(4), 1.0, 0.0)
    assert torch.equal(found.view(torch.int32), mean.view(torch.int32)) and found.data_ptr() != mean.data_ptr()


def test_processes_that_did_not_move_stay_and_nan_is_not_hidden() -> None:
    anchor, velocity = torch.tensor([0.5, 0.5]), torch.zeros(2)
    assert torch.equal(outer_step(anchor, anchor.clone(), velocity, 0.7, 0.9), anchor)
    assert torch.equal(velocity, torch.zeros(2))
    assert outer_step(torch.ones(1), torch.tensor([math.nan]), torch.zeros(1), 0.7, 0.9).isnan().all()
    assert outer_step(torch.ones(0), torch.ones(0), torch.ones(0), 0.7, 0.9).numel() == 0


def test_a_vector_and_back() -> None:
    tensors = [
        torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        torch.tensor(5.0),
        torch.zeros(0),
        torch.tensor([6.0]).bfloat16(),
    ]
    vector = flatten(tensors)
    assert vector.dtype == torch.float32 and vector.tolist() == [1, 2, 3, 4, 5, 6]
    assert flatten([tensors[0], tensors[1].double()]).dtype == torch.float64
    unflatten_into(tensors, vector * 2)
    assert tensors[0].tolist() == [[2, 4], [6, 8]] and tensors[1].item() == 10 and tensors[3].tolist() == [12]
    with pytest.raises(ValueError, match="vector has 5 entries, and the tensors together 6"):
        unflatten_into(tensors, vector[:5])
    with pytest.raises(ValueError, match="no trainable weight"):
        flatten([])


def test_when_it_is_due() -> None:
    every = LocalUpdates(3)
    assert [step for step in range(1, 9) if every.is_due(step, 8)] == [3, 6, 8]
    assert all(LocalUpdates(1).is_due(step, 8) for step in range(1, 9))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "every=0 must be a whole number"),
        ((1.5,), "every=1.5"),
        ((True,), "every=True"),
        ((1, 0.0), "outer_lr=0.0 must be above 0"),
        ((1, math.inf), "outer_lr=inf"),
        ((1, math.nan), "outer_lr=nan"),
        ((1, 0.7, 1.0), "outer_momentum=1.0 must be in"),
        ((1, 0.7, -0.1), "outer_momentum=-0.1"),
        ((1, 0.7, math.nan), "outer_momentum=nan"),
    ],
)
def test_bad_settings(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LocalUpdates(*arguments)
