"""QK-Clip by hand: logits of pairs that attend, factors, and exactly the rows of the heads that exceed."""

import math

import pytest
import torch
from torch import nn

from hf_effi.callbacks import QKClipCallback
from hf_effi.functional.qk_clip import clip_factors, max_logits, projection_factors


def test_the_largest_logit_of_each_head_by_hand():
    query = torch.tensor([[[[1.0], [2.0], [-5.0]], [[1.0], [1.0], [1.0]]]])  # two heads, three tokens
    key = torch.tensor([[[[1.0], [3.0], [-2.0]]]])  # one key head
    # Causal pairs of head 0: 1; 2, 6; -5, -15, 10.
    assert max_logits(query, key, 1.0).tolist() == [10.0, 3.0]
    assert max_logits(query, key, 1.0, rows=1).tolist() == [10.0, 3.0]
    assert max_logits(query, key, 0.5).tolist() == [5.0, 1.5]
    assert max_logits(query, key, 1.0, causal=False).tolist() == [10.0, 3.0]
    assert max_logits(query, -key, 1.0).tolist() == [15.0, 2.0]
    assert max_logits(query, -key, 1.0, window=1).tolist() == [-1.0, 2.0]
    assert max_logits(query, -key, 1.0, documents=torch.tensor([[0, 1, 1]])).tolist() == [15.0, 2.0]
    assert max_logits(query, -key, 1.0, documents=torch.tensor([[0, 0, 1]])).tolist() == [-1.0, 2.0]
    assert max_logits(query, -key, 1.0, mask=torch.tensor([[1, 0, 1]])).tolist() == [5.0, 2.0]


def test_masks_of_four_dimensions():
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 5, 3), torch.randn(2, 2, 5, 3)
    logits = query @ key.repeat_interleave(2, 1).transpose(-1, -2)
    allowed = torch.rand(2, 1, 5, 5) > 0.5
    expected = logits.masked_fill(~allowed, -math.inf).amax((0, 2, 3))
    torch.testing.assert_close(max_logits(query, key, 1.0, mask=allowed, rows=2), expected)
    added = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
    torch.testing.assert_close(max_logits(query, key, 1.0, mask=added), expected)
    each = allowed.expand(2, 4, 5, 5)
    torch.testing.assert_close(max_logits(query, key, 1.0, mask=each), expected)
    assert max_logits(query, key, 1.0, mask=torch.zeros(1, 1, 5, 5, dtype=torch.bool)).tolist() == [-math.inf] * 4
    assert max_logits(query[:, :, :0], key, 1.0).tolist() == [-math.inf] * 4


def test_factors_by_hand():
    largest = torch.tensor([400.0, 100.0, 50.0, 0.0, -1.0, math.inf, math.nan])
    assert clip_factors(largest, 100.0).tolist() == [0.25, 1, 1, 1, 1, 1, 1]
    assert clip_factors(largest, math.inf).tolist() == [1.0] * 7
    gamma = torch.tensor([0.25, 1.0, 1.0, 0.16])
    assert [one.tolist() for one in projection_factors(gamma, 2, None)] == [gamma.tolist(), [1.0, 1.0]]
    query, key = projection_factors(gamma, 2, 0.5)
    torch.testing.assert_close(query, torch.tensor([0.5, 0.5, 0.4, 0.4]))
    torch.testing.assert_close(key, torch.tensor([0.5, 0.4]))
    with pytest.raises(ValueError, match="key_heads=3 must divide the 4 query heads"):
        projection_factors(gamma, 3, None)


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"threshold": 0}, "threshold=0 must be a number above 0"),
        ({"threshold": math.nan}, "threshold=nan"),
        ({"alpha": 1.5}, r"alpha=1.5 must be a number in \[0, 1\]"),
        ({"gqa": "max"}, "gqa='max' must be one of 'query', 'min'"),
        ({"mode": "exact"}, "mode='exact' must be one of 'sampled', 'bound'"),
        ({"every_steps": 0}, "every_steps=0 must be an integer of at least 1"),
    ],
)
def test_values_out_of_range(over, message):
    with pytest.raises(ValueError, match=message):
        QKClipCallback(**over)


def test_rows_of_a_linear_and_of_a_transposed_weight():
    from transformers.pytorch_utils import Conv1D

    from hf_effi.callbacks._qk_heads import scale_rows

    for module, dim in ((nn.Linear(3, 4), 0), (Conv1D(4, 3), 1)):
        before = [p.detach().clone() for p in (module.weight, module.bias)]
        state = {module.weight: {"z": before[0].clone()}}
        scale_rows(module, dim, torch.tensor([1, 2]), torch.tensor([0.5, 0.25]), state)
        factor = torch.tensor([1.0, 0.5, 0.25, 1.0])
        shaped = factor[:, None] if dim == 0 else factor[None]
        assert torch.equal(module.weight, before[0] * shaped) and torch.equal(module.bias, before[1] * factor)
        assert torch.equal(state[module.weight]["z"], module.weight)
