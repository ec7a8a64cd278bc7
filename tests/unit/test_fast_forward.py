import math

import pytest
import torch

from hf_effi.callbacks import FastForwardCallback
from hf_effi.functional.fast_forward import learning_rate_is_low, place_on_ray, typical, walk_while_falling


@pytest.mark.parametrize(
    ("lowest", "longest", "steps"), [(2.4, 10, 2), (2.6, 10, 3), (0.0, 10, 0), (-3.0, 10, 0), (8.0, 4, 4), (0.6, 1, 1)]
)
def test_a_walk_ends_within_one_step_of_the_minimum_on_the_line(lowest, longest, steps):
    found, losses = walk_while_falling(lambda tau: (tau - lowest) ** 2, longest)
    assert found == steps and min(losses) == losses[found]
    assert len(losses) == min(found + 1, longest) + 1


def test_a_flat_loss_and_one_that_is_not_a_number_end_a_walk():
    assert walk_while_falling(lambda tau: 1.0, 5) == (0, [1.0, 1.0])
    assert walk_while_falling(lambda tau: math.nan if tau else 1.0, 5)[0] == 0
    assert walk_while_falling(lambda tau: math.nan, 5)[0] == 0
    with pytest.raises(ValueError, match="longest=0"):
        walk_while_falling(lambda tau: 0.0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ray_begins_at_the_weights_and_small_steps_add_up(dtype):
    start, before = torch.tensor([1.0, -0.0], dtype=dtype), torch.tensor([1.0 - 2**-8, 1.0], dtype=dtype)
    live = {"w": torch.zeros(2, dtype=dtype)}
    place_on_ray(live, {"w": start}, {"w": before}, 4)
    assert live["w"].tolist() == [1 + 4 * 2**-8, -4]
    place_on_ray(live, {"w": start}, {"w": before}, 0)
    assert torch.equal(live["w"].view(torch.uint8), start.view(torch.uint8))


def test_only_walks_in_a_row_tell_of_a_low_rate():
    assert learning_rate_is_low([0, 6, 6], 5, 2) and not learning_rate_is_low([6, 5], 5, 2)
    assert not learning_rate_is_low([], 5, 1)
    assert typical([]) == 0 and typical([1, 9, 2]) == 2


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"every_steps": 0}, "every_steps=0"),
        ({"patience": True}, "patience=True"),
        ({"longest": 5}, "longest=5 must be above limit=5"),
        ({"evaluate": 3}, "evaluate=3 is not a function"),
    ],
)
def test_arguments_out_of_range(arguments, match):
    with pytest.raises(ValueError, match=match):
        FastForwardCallback(**arguments)
