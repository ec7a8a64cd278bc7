import pytest
import torch

from hf_effi.callbacks.reptile import ReptileCallback
from hf_effi.functional.reptile import reptile_step


def test_by_hand_and_the_reference_follows():
    theta, before = torch.tensor([4.0, 0.0]), torch.tensor([0.0, 2.0])
    reptile_step([theta], [before], 0.5)
    assert theta.tolist() == before.tolist() == [2.0, 1.0]
    reptile_step([theta], [before], 0.5)  # nothing moved since: nothing to take back
    assert theta.tolist() == [2.0, 1.0]


def test_beta_one_changes_no_bit():
    theta, before = torch.randn(100), torch.randn(100) * 1e6
    kept = theta.clone()
    reptile_step([theta], [before], 1.0)
    assert torch.equal(theta, kept) and torch.equal(before, kept)


def test_two_half_steps_are_the_closed_form():
    """n intervals that each move by d end at n * beta * d."""
    theta = torch.zeros(1)
    before = theta.clone()
    for _ in range(5):
        theta += 2.0
        reptile_step([theta], [before], 0.25)
    assert theta.item() == pytest.approx(5 * 0.25 * 2.0)


@pytest.mark.parametrize("beta", [0, -0.1, 1.1, float("nan")])
def test_bad_beta(beta):
    with pytest.raises(ValueError, match="beta="):
        ReptileCallback(10, beta)


@pytest.mark.parametrize("every", [0, 1.5, True])
def test_bad_interval(every):
    with pytest.raises(ValueError, match="every_steps="):
        ReptileCallback(every, 0.5)
    with pytest.raises(ValueError):
        reptile_step([torch.zeros(1)], [], 0.5)
