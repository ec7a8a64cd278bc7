import pytest
import torch

from hf_effi.callbacks import MultigridLRCallback
from hf_effi.data import Multigrid
from hf_effi.functional.data import rechunk


def test_sequence_by_hand():
    shapes = Multigrid(64, long_cycle=(4, 2, 1), short_cycle=(2, 1), short_steps=2, final_share=0.25)
    # 16 updates: 12 in three stages of 4, each 2 updates at half of the stage's length and 2 at all of it; 4 full ones
    assert [shapes.divisor(step, 16) for step in range(16)] == [8, 8, 4, 4, 4, 4, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1]
    assert [shapes(step, 16) for step in (0, 2, 6, 10, 12, 15, 16, 99)] == [8, 16, 32, 64, 64, 64, 64, 64]


def test_defaults_are_the_cycles_of_the_paper():
    # space and time of (1/4, sqrt .5), (1/2, sqrt .5), (1/2, 1), (1, 1), and squares of the short factors .5, sqrt .5,
    # 1
    shapes = Multigrid(2048)
    assert [shapes.divisor(step, 60) for step in range(12)] == [32, 16, 8] * 4
    assert [shapes.divisor(step, 60) for step in range(36, 48)] == [4, 2, 1] * 4
    assert {shapes.divisor(step, 60) for step in range(48, 60)} == {1}


@pytest.mark.parametrize("total", [0, 1, 2, 3, 7, 10, 29, 100, 101])
@pytest.mark.parametrize("final", [0.01, 0.2, 0.29, 1.0])
def test_the_last_share_is_full(total, final):
    shapes = Multigrid(64, (8, 4, 2), (2,), final_share=final)
    full = [step for step in range(total) if shapes(step, total) == 64]
    assert len(full) >= final * total - 1e-9 and len(full) <= final * total + 1
    assert full == list(range(total - len(full), total))


def test_every_shape_keeps_every_token():
    rows, shapes = torch.arange(1, 129).view(2, 64), Multigrid(64, (8, 4, 2, 1), (4, 2, 1))
    for step in range(30):
        cut = rechunk(rows, shapes(step, 30), fill=0)
        assert cut.shape == (2 * shapes.divisor(step, 30), shapes(step, 30))
        assert cut.flatten().tolist() == list(range(1, 129))


def test_refusals_name_the_fix():
    for bad, message in (
        ({"max_length": 100}, "max_length=100 divided by 32"),
        ({"max_length": 32}, "max_length=32 divided by 32"),
        ({"max_length": 0}, "max_length=0"),
        ({"long_cycle": ()}, r"long_cycle is empty\. Use \(1,\)"),
        ({"short_cycle": (2, 0)}, "a divisor of short_cycle=0"),
        ({"short_steps": 0}, "short_steps=0"),
        ({"final_share": 0.0}, r"final_share=0.0 is outside \(0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            Multigrid(**{"max_length": 64, **bad})
    with pytest.raises(ValueError, match="step=-1"):
        Multigrid(64)(-1, 5)
    with pytest.raises(ValueError, match=r"exponent=2 is outside \[0, 1\]"):
        MultigridLRCallback(Multigrid(64), 2)
    with pytest.raises(ValueError, match="shapes=8 must be the Multigrid"):
        MultigridLRCallback(8)
