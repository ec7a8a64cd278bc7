"""The interval between saves by hand, and that it is the minimum."""

from __future__ import annotations

import pytest

from hf_effi.functional.save_interval import lost_fraction, save_interval


def test_by_hand():
    assert save_interval(0.5, 100.0) == 10.0
    assert lost_fraction(10.0, 0.5, 100.0) == pytest.approx(0.05 + 0.05)
    assert save_interval(2, 7200) == pytest.approx(169.70562748)


@pytest.mark.parametrize(("stall", "failures"), [(0.1, 3600.0), (30.0, 86400.0), (1e-3, 1e6)])
def test_it_is_the_minimum(stall, failures):
    best = save_interval(stall, failures)
    least = lost_fraction(best, stall, failures)
    assert all(lost_fraction(best * factor, stall, failures) > least for factor in (0.5, 0.9, 1.1, 2.0))


@pytest.mark.parametrize("wrong", [0, -1.0, float("nan"), float("inf"), True, "1"])
def test_out_of_range(wrong):
    with pytest.raises(ValueError, match="stall_seconds=.* must be a number of seconds above 0"):
        save_interval(wrong, 1.0)
    with pytest.raises(ValueError, match="seconds_between_failures"):
        save_interval(1.0, wrong)
    with pytest.raises(ValueError, match="interval_seconds"):
        lost_fraction(wrong, 1.0, 1.0)
