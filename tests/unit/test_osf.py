"""Shares of kept directions, likeness and leakage by hand."""

from __future__ import annotations

import pytest
import torch

from hf_effi.functional.osf import leaked_share, likeness, retained_shares


def test_shares_by_hand():
    assert retained_shares([1.0, 1.0]) == pytest.approx([0.8, 0.8])  # all equal
    assert retained_shares([0.0, 2.0], 0.1, 0.5) == pytest.approx([0.1, 0.9])
    assert retained_shares([-1.0, 4.0], 0.1, 0.8) == pytest.approx([0.1, 0.99])  # cut off at both ends
    for given, message in (
        (([],), "importance="),
        (([0.0],), "mean above 0"),
        (([float("nan")],), "finite mean"),
        (([1.0], 0.0), "minimum=0"),
        (([1.0], 0.5, 0.4), "target=0.4"),
        (([1.0], 0.5, 1.0), "target=1"),
    ):
        with pytest.raises(ValueError, match=message):
            retained_shares(*given)
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert likeness(x, -x).item() == pytest.approx(-2) and likeness(x, x, torch.tensor([1, 0])).item() == 1
    assert leaked_share(torch.zeros(2, 1), torch.ones(2, 1)) == 0.0
