"""NAdamW in AlgoPerf's form, by hand."""

import pytest
import torch
from torch import nn

from hf_effi.optim import NAdamW


def run(optimizer, parameter, gradients):
    for gradient in gradients:
        parameter.grad = torch.tensor(gradient, dtype=parameter.dtype)
        optimizer.step()
    return parameter.detach()


def test_two_steps_by_hand():
    w = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = NAdamW([w], lr=0.1, betas=(0.5, 0.5), eps=1e-12, weight_decay=0.1)
    # t=1: w = 0.99; m = 1, v = 2; numerator (0.5 + 1) / 0.5 = 3; denominator sqrt(2 / 0.5) = 2.
    # t=2: w = 0.84 * 0.99; m = 1.5, v = 3; (0.75 + 1) / 0.75; sqrt(3 / 0.75) = 2.
    after = run(optimizer, w, [[2.0], [2.0]])
    assert after.item() == pytest.approx(0.84 * 0.99 - 0.1 * (1.75 / 0.75) / 2, abs=1e-12)


def test_it_is_adamw_without_a_first_moment_and_not_torchs_nadam():
    torch.manual_seed(0)
    gradients = torch.randn(4, 3).tolist()
    one, two, three = (nn.Parameter(torch.ones(3)) for _ in range(3))
    ours = run(NAdamW([one], lr=0.1, betas=(0.0, 0.9), weight_decay=0.1), one, gradients)
    adamw = run(torch.optim.AdamW([two], lr=0.1, betas=(0.0, 0.9), weight_decay=0.1), two, gradients)
    torch.testing.assert_close(ours, adamw)
    one, two = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    ours = run(NAdamW([one], lr=0.1), one, gradients)
    nadam = run(torch.optim.NAdam([three], lr=0.1, momentum_decay=0, decoupled_weight_decay=True), three, gradients)
    assert (ours - nadam).abs().max() > 1e-3


def test_moments_of_bf16_weights_are_fp32_also_after_loading():
    w = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = NAdamW([w], lr=0.1)
    run(optimizer, w, [[0.1, 0.2, 0.3, 0.4]])
    again = NAdamW([w], lr=0.1)
    again.load_state_dict(optimizer.state_dict())
    for key in ("exp_avg", "exp_avg_sq"):
        assert again.state[w][key].dtype == torch.float32
        assert torch.equal(again.state[w][key], optimizer.state[w][key])
        assert again.state[w][key] is not optimizer.state[w][key]
    assert again.state[w]["step"] == 1


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"lr": -1}, "lr=-1 must be a number of at least 0"),
        ({"betas": (0.9,)}, r"betas=\(0.9,\) must be two numbers in \[0, 1\)"),
        ({"betas": (0.9, 1.0)}, "must be two numbers"),
        ({"eps": 0}, "eps=0 must be a number above 0"),
        ({"weight_decay": float("nan")}, "weight_decay=nan"),
    ],
)
def test_values_out_of_range(over, message):
    with pytest.raises(ValueError, match=message):
        NAdamW([nn.Parameter(torch.ones(1))], **over)


def test_a_closure_and_a_missing_gradient():
    w, unused = nn.Parameter(torch.tensor([2.0])), nn.Parameter(torch.tensor([2.0]))
    optimizer = NAdamW([w, unused], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = (w**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0
    assert unused.item() == 2.0 and unused not in optimizer.state
