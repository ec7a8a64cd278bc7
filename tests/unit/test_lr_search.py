import math
import random

import pytest
import torch

from hf_effi.callbacks._lr_search import denoise, predict_loss, propose_lr, validation_loss
from hf_effi.callbacks.auto_lrs import AutoLRSCallback
from hf_effi.checkpoint.snapshot import take_rng
from hf_effi.functional.schedules.adaptive import extrapolate_exponential, fit_exponential


def noisy(seed, n=100, noise=0.02):
    rng = random.Random(seed)
    return [2 * math.exp(-0.05 * t) + 1 + rng.gauss(0, noise) for t in range(n)], list(range(n))


@pytest.mark.parametrize("seed", range(4))
def test_exponential_is_recovered_from_noise(seed):
    losses, steps = noisy(seed)
    for fitted in (fit_exponential(losses), fit_exponential(*denoise(losses, steps))):
        assert fitted == (pytest.approx(2, abs=0.05), pytest.approx(-0.05, abs=0.003), pytest.approx(1, abs=0.02))
    losses[3], losses[20] = 30.0, 9.0
    assert fit_exponential(losses)[0] > 5, "without denoising two outliers spoil the fit"
    fitted = fit_exponential(*denoise(losses, steps))
    assert fitted == (pytest.approx(2, abs=0.05), pytest.approx(-0.05, abs=0.003), pytest.approx(1, abs=0.02))
    assert predict_loss(losses, steps, 1000) == pytest.approx(1, abs=0.02)


def test_exponential_with_steps_that_start_late_and_are_spaced():
    steps = list(range(40, 200, 7))
    losses = [2 * math.exp(-0.05 * t) + 1 for t in steps]
    assert fit_exponential(losses, steps) == (
        pytest.approx(2, rel=0.02),
        pytest.approx(-0.05, rel=0.01),
        pytest.approx(1),
    )
    assert extrapolate_exponential([1.0, math.nan, 1.0, 1.0], 10) == extrapolate_exponential([], 10) == 1e6
    assert extrapolate_exponential([2.0, 4.0], 10) == 3.0
    assert math.isfinite(extrapolate_exponential([1.0, 1.0, 1.0, 1.0], 1000))
    with pytest.raises(ValueError, match="2 losses at 3 steps"):
        fit_exponential([1.0, 2.0], [1, 2, 3])
    with pytest.raises(ValueError, match="at least two finite losses"):
        fit_exponential([1.0, math.inf])


def test_denoise_leaves_out_outliers_of_the_first_half_alone_and_ignores_the_scale():
    losses, steps = noisy(1)
    clean, kept = denoise(losses, steps)
    assert kept == steps
    assert max(abs(a - 2 * math.exp(-0.05 * t) - 1) for a, t in zip(clean, kept, strict=True)) < 0.06
    losses[5] = 9.0
    assert 5 not in denoise(losses, steps)[1] and len(denoise(losses, steps)[1]) == 99
    scaled = denoise([1e3 * y for y in losses], steps)[0]
    assert scaled == pytest.approx([1e3 * y for y in denoise(losses, steps)[0]], rel=1e-6)
    losses, _ = noisy(1)
    losses[80] = 9.0
    assert 80 in denoise(losses, steps)[1], "the second half decides the asymptote and is kept whole"
    assert denoise([3.0, 1.0, 2.0], [1, 2, 3]) == ([3.0, 1.0, 2.0], [1, 2, 3])
    assert denoise([1.0] * 20, list(range(20)))[0] == pytest.approx([1.0] * 20)


def test_denoise_of_validation_losses_drops_only_the_worst():
    steps = list(range(6, 97, 6))
    losses = [2 * math.exp(-0.05 * t) + 1 + random.Random(t).gauss(0, 0.01) for t in steps]
    losses[12] = 7.0
    smooth, kept = denoise(losses, steps, validation=True)
    assert kept == [t for t in steps if t != steps[12]] and len(smooth) == 15


def test_a_validation_loss_that_rose_is_not_extrapolated():
    steps = [1, 2, 3, 4, 5]
    falling = [2.0, 1.5, 1.25, 1.125, 1.0625]
    assert predict_loss(falling, steps, 100, validation=True, before=3.0) == pytest.approx(1.0, abs=0.01)
    assert predict_loss(falling, steps, 100, validation=True, before=2.0) == 1.0625
    assert predict_loss(falling, steps, 100, validation=False, before=2.0) == pytest.approx(1.0, abs=0.01)
    assert predict_loss([1.0, math.nan], [1, 2], 10) == predict_loss([], [], 10) == 1e6


def test_search_finds_a_minimum_and_survives_broken_probes():
    tried = []
    for j in range(10):
        lr = propose_lr(tried, 1e-5, 1.0, 2.0, j)
        y = 1e6 if lr > 0.1 else (math.log10(lr) + 2.5) ** 2
        tried.append((lr, y))
    assert len({lr for lr, _ in tried}) == 10, "an LR that was tried is never asked for again"
    assert min(tried, key=lambda pair: pair[1])[0] == pytest.approx(10**-2.5, rel=1.0)
    assert propose_lr([(0.1, 1e6)], 1e-3, 1.0, 2.0, 0) == 1e-3
    assert propose_lr(tried, 1e-5, 1.0, 2.0, 7) == propose_lr(tried, 1e-5, 1.0, 2.0, 7)


def test_the_first_lr_is_random_and_log_uniform():
    first = [math.log10(propose_lr([], 1e-5, 1.0, 2.0, seed)) for seed in range(400)]
    assert len(set(first)) > 50 and sum(first) / 400 == pytest.approx(-2.5, abs=0.25)


def test_validation_loss_leaves_modes_and_random_numbers():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.5))
    model[1].eval()
    before = take_rng()["torch"]

    def evaluate(m):
        assert not m.training and not m[0].training and not torch.is_grad_enabled()
        return torch.rand(1)

    assert 0 <= validation_loss(evaluate, model, torch.device("cpu")) <= 1
    assert torch.equal(take_rng()["torch"], before)
    assert model.training and model[0].training and not model[1].training


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"low": 0.0}, r"low=0.0"),
        ({"low": 2.0}, r"low=2.0"),
        ({"high": math.nan}, "high=nan"),
        ({"probes": 0}, "probes=0"),
        ({"stage_steps": 3}, "stage_steps=3.*at least one update"),
        ({"max_stage_steps": 2}, "max_stage_steps=2"),
        ({"kappa": -1.0}, "kappa=-1.0"),
        ({"seed": 1.5}, "seed=1.5"),
        ({"evaluate": 3}, "evaluate=3 is not a function"),
        ({"evaluate": len, "validation": False}, "never be called"),
    ],
)
def test_bad_values_are_named(changes, message):
    settings = {"low": 1e-4, "high": 1e-1, "stage_steps": 10, "probes": 5, "max_stage_steps": 20, **changes}
    with pytest.raises(ValueError, match=message):
        AutoLRSCallback(**settings)
