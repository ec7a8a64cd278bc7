"""The prototypes of QSDP and L-GreCo, by their formulas; why they are not shipped is in their card."""

from __future__ import annotations

import itertools

import pytest
import torch

from bench.prototypes.traffic import (
    buckets_of,
    choose_levels,
    lattice_quantise,
    lattice_values,
    pack,
    steps_of,
    stochastic_codes,
    unpack,
)

ERRORS, SIZES = [[0, 1, 4], [0, 2, 9], [0, 0.5, 1]], [[8, 4, 2], [16, 8, 4], [4, 2, 1]]


def test_the_random_shift_is_unbiased_with_the_variance_of_its_step() -> None:
    generator = torch.Generator().manual_seed(0)
    delta = 0.5
    shifts = (torch.rand(100_000, generator=generator, dtype=torch.float64) - 0.5) * delta
    values = torch.full_like(shifts, 0.37)
    found = lattice_values(lattice_quantise(values, delta, shifts), delta, shifts)
    errors = found - values
    assert errors.abs().max() <= delta / 2 + 1e-12
    assert abs(errors.mean()) < 1.5e-3 and errors.var().item() == pytest.approx(delta**2 / 12, rel=0.01)


def test_stochastic_rounding_is_unbiased() -> None:
    draws = torch.rand(100_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    codes = stochastic_codes(torch.full_like(draws, -0.3), torch.tensor(0.25), draws)
    assert set(codes.tolist()) == {-2.0, -1.0} and codes.mean().item() == pytest.approx(-1.2, abs=5e-3)


def test_codes_fit_and_zeros_stay() -> None:
    buckets = buckets_of(torch.tensor([1.0, -4.0, 0.5, 0.0, 0.0]), 2)
    assert buckets.tolist() == [[1, -4], [0.5, 0], [0, 0]]
    steps = steps_of(buckets, 4)
    assert steps[0].item() == pytest.approx(4 / 6)
    for draw in (0.0, 0.999):
        codes = stochastic_codes(buckets, steps, torch.full_like(buckets, draw))
        assert codes.abs().max() <= 7 and codes[2].tolist() == [0, 0]


@pytest.mark.parametrize(("bits", "nbytes"), [(2, 2), (4, 3), (8, 5)])
def test_codes_become_bytes_and_come_back(bits: int, nbytes: int) -> None:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    codes = torch.tensor([low, -1, 0, 1, high], dtype=torch.float32)
    assert pack(codes, bits).numel() == nbytes and torch.equal(unpack(pack(codes, bits), bits, 5), codes)


def test_levels_by_hand_and_by_all_choices() -> None:
    assert choose_levels(ERRORS, SIZES, 3) == (1, 1, 0)
    assert sum(size[level] for size, level in zip(SIZES, (1, 1, 0), strict=True)) == 16
    assert choose_levels(ERRORS, SIZES, 0) == (0, 0, 0) and choose_levels(ERRORS, SIZES, 14) == (2, 2, 2)
    for budget in (0.5, 1, 2.5, 3.5, 5, 10):
        allowed = [
            sum(SIZES[i][level] for i, level in enumerate(levels))
            for levels in itertools.product(range(3), repeat=3)
            if sum(ERRORS[i][level] for i, level in enumerate(levels)) <= budget
        ]
        found = choose_levels(ERRORS, SIZES, budget)
        assert sum(SIZES[i][level] for i, level in enumerate(found)) == min(allowed)
    with pytest.raises(ValueError, match="budget=1 is below the least error"):
        choose_levels([[2, 3]], [[1, 1]], 1)
    assert choose_levels([], [], 1) == ()
