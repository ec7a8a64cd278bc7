import pytest
import torch

from hf_effi.errors import RefusedError
from hf_effi.functional.data import rechunk, root_length, staged_length
from hf_effi.trainers.mixins.sequence_length import cut_batch


def test_stages_ascend_and_the_last_holds():
    served = [staged_length(p / 100, (16, 32, 64, 128), last_share=0.4) for p in range(101)]
    assert served == sorted(served)
    assert [served.count(n) for n in (16, 32, 64, 128)] == [20, 20, 20, 41]
    assert staged_length(0.0, (64,)) == 64
    assert staged_length(-3.0, (8, 16)) == 8 and staged_length(9.0, (8, 16)) == 16
    assert staged_length(0.0, (8, 16), last_share=1.0) == 16
    for bad in ((), (8, 8), (16, 8), (0, 8)):
        with pytest.raises(ValueError):
            staged_length(0.5, bad)


@pytest.mark.parametrize("root", [1.0, 2.0])
def test_root_lengths_are_monotone_multiples(root):
    lengths = [root_length(t, 110, 2048, min_length=80, root=root) for t in range(200)]
    assert lengths == sorted(lengths)
    assert all(n % 8 == 0 for n in lengths)
    assert lengths[0] == 80 and set(lengths[110:]) == {2048}


def test_root_length_edges():
    assert root_length(0, 0, 100) == 100
    assert root_length(5, 10, 64, min_length=64) == 64
    assert root_length(25, 100, 1064, min_length=64, root=2) == 560  # half of the way, 564, down to a multiple
    with pytest.raises(ValueError, match="min_length=64 exceeds max_length=32"):
        root_length(0, 10, 32)


def test_growlength_doubles_from_128_to_4096():
    lengths = (128, 256, 512, 1024, 2048, 4096)
    served = [staged_length(p, lengths) for p in (0, 0.1, 0.2, 0.3, 0.4, 0.5, 1)]
    assert served == [*lengths, 4096]


def test_root_length_goldens_of_the_gpt_recipe():
    """80 to 2048 over 110 000 updates in steps of 8: `floor((t / T)^(1/r) 1968 + 80)`, then down to a multiple."""
    steps = (0, 1_000, 27_500, 55_000, 82_500, 109_999, 110_000)
    linear = [root_length(t, 110_000, 2048, min_length=80) for t in steps]
    assert linear == [80, 96, 568, 1064, 1552, 2040, 2048]
    square = [root_length(t, 110_000, 2048, min_length=80, root=2) for t in steps]
    assert square == [80, 264, 1064, 1464, 1784, 2040, 2048]


def test_rechunk_keeps_every_token_in_order():
    rows = torch.arange(1, 23).view(2, 11)
    for length in range(1, 14):
        cut = rechunk(rows, length, fill=0)
        assert cut[cut > 0].tolist() == list(range(1, 23))
        assert cut.shape[1] == min(length, 11)
    assert rechunk(rows, 11, 0) is rows


def test_cut_batch_masks_what_it_adds():
    batch = {"input_ids": torch.arange(1, 6)[None], "labels": torch.arange(1, 6)[None]}
    cut = cut_batch(batch, 2)
    assert cut["attention_mask"].tolist() == [[1, 1], [1, 1], [1, 0]]
    assert cut["labels"].tolist() == [[1, 2], [3, 4], [5, -100]]
    assert "attention_mask" not in cut_batch({key: value[:, :4] for key, value in batch.items()}, 2)
    assert cut_batch(batch, 5) is batch
    with pytest.raises(RefusedError, match="position_ids"):
        cut_batch({**batch, "position_ids": torch.arange(5)[None]}, 2)
    with pytest.raises(RefusedError, match="padded"):
        cut_batch({**batch, "attention_mask": torch.tensor([[1, 1, 1, 0, 0]])}, 2)
