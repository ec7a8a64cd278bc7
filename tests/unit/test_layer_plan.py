"""The plan for the layers is optimal, lies within its budget, and puts modes where they free memory first."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from hf_effi.functional.layer_plan import MODES, LayerCost, ModeCost, mode_costs, plan_bytes, plan_layer_modes
from hf_effi.functional.saved_bytes import SavedBytes

LAYER = mode_costs(4.0, 1.0, kept_bytes=100, attention_bytes=10, input_bytes=8, copy_bytes_per_second=4.0)


def seconds(layers, modes):
    return sum(layer.modes[mode].seconds for layer, mode in zip(layers, modes, strict=True))


def test_costs_by_hand():
    assert {mode: (c.seconds, c.size) for mode, c in LAYER.modes.items()} == {
        "keep": (0.0, 100),
        "selective": (3.0, 18),
        "checkpoint": (4.0, 8),
        "offload": (4.0, 0),  # the copy takes 2 s and hides behind 4 s of forward
    }
    slow = mode_costs(4.0, 1.0, kept_bytes=100, attention_bytes=10, input_bytes=8, copy_bytes_per_second=1.0)
    assert slow.modes["offload"].seconds == 4 + 2 * (8 - 4)
    assert "offload" not in mode_costs(4.0, 1.0, kept_bytes=100, attention_bytes=10, input_bytes=8).modes


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (400, ("keep",) * 4),  # all fit, and nothing is recomputed: no working memory
        (399, ("offload", "offload", "keep", "keep")),  # hidden copies make offload as fast as checkpoint
        (100, ("offload",) * 4),
        (154, ("offload", "selective", "selective", "selective")),
    ],
)
def test_plans_by_hand(budget, expected):
    modes = plan_layer_modes([LAYER] * 4, budget)
    assert plan_bytes([LAYER] * 4, modes) <= budget
    best = min(
        seconds([LAYER] * 4, m) for m in itertools.product(MODES, repeat=4) if plan_bytes([LAYER] * 4, m) <= budget
    )
    assert seconds([LAYER] * 4, modes) == best
    if budget in (400, 100):
        assert modes == expected
    assert list(modes) == sorted(modes, key=MODES.index, reverse=True)


def test_too_small_a_budget_says_what_is_needed():
    with pytest.raises(ValueError, match="smallest needs 100"):
        plan_layer_modes([LAYER] * 4, 99)
    with pytest.raises(ValueError, match="no layers"):
        plan_layer_modes([], 99)


@pytest.mark.parametrize("seed", range(20))
def test_optimal_against_brute_force(seed):
    """Layers of mixed kinds with random costs, against all plans there are."""
    rng = random.Random(seed)

    def layer() -> LayerCost:
        kept, forward = rng.randint(50, 200), rng.randint(2, 30)
        return mode_costs(
            float(forward),
            float(rng.randint(0, forward)),
            kept_bytes=kept,
            attention_bytes=rng.randint(1, 20),
            input_bytes=rng.randint(1, 20),
            copy_bytes_per_second=rng.choice([None, 0.5, 5.0]),
        )

    kinds = [layer() for _ in range(rng.randint(1, 3))]
    layers = [rng.choice(kinds) for _ in range(5)]
    every = list(itertools.product(*(tuple(layer.modes) for layer in layers)))
    budget = rng.randint(min(plan_bytes(layers, m) for m in every), sum(layer.working_bytes for layer in layers) + 5)
    best = min(seconds(layers, m) for m in every if plan_bytes(layers, m) <= budget)
    modes = plan_layer_modes(layers, budget)
    assert plan_bytes(layers, modes) <= budget
    assert seconds(layers, modes) == pytest.approx(best)


def test_eighty_layers_are_planned():
    modes = plan_layer_modes([LAYER] * 80, 4100)
    assert seconds([LAYER] * 80, modes) == min(
        3 * selective + 4 * (80 - keep - selective)
        for keep in range(81)
        for selective in range(81 - keep)
        if 100 * keep + 18 * selective + 100 <= 4100
    )


def test_a_layer_may_lack_modes():
    only = LayerCost({"checkpoint": ModeCost(1.0, 8)}, working_bytes=50)
    assert plan_layer_modes([only, LAYER], 158) == ("checkpoint", "keep")


def test_saved_bytes_by_hand():
    weight = torch.ones(3, 3, requires_grad=True)
    x = torch.ones(2, 3)
    with SavedBytes() as saved:
        y = torch.tanh(x @ weight)
        z = y * y[:, :2].sum()  # `y` is one storage, whatever views of it are saved
    assert saved.total == 24 + 24 + 4  # x, y, the scalar; the gradient of x is not wanted, so weight is not saved
    del z
    with SavedBytes(exclude=[x]) as saved:
        _ = x @ weight
    assert saved.total == 0
    with SavedBytes() as saved, torch.no_grad():
        _ = x @ weight
    assert saved.total == 0
