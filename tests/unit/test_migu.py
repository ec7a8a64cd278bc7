"""MIGU by hand: magnitudes, masks, shards, and which layers are masked or refused."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_effi.callbacks.migu import MIGUCallback, find_layers
from hf_effi.errors import RefusedError
from hf_effi.functional.migu import local_part, migu_mask, output_magnitude, random_magnitude
from tests.helpers import tiny_gpt2, tiny_qwen3


def test_magnitude_by_hand():
    y = torch.tensor([[[1.0, -2.0], [3.0, 0.5]], [[-1.0, 1.0], [math.nan, 9.0]]], dtype=torch.bfloat16)
    real = torch.tensor([[1, 1], [1, 0]])
    assert output_magnitude(y, real).tolist() == [5.0, 3.5]  # the NaN is padding
    assert output_magnitude(y[:1]).tolist() == [4.0, 2.5] and output_magnitude(y).dtype == torch.float32
    assert output_magnitude(torch.zeros(0, 2)).tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="real has shape"):
        output_magnitude(y, torch.ones(2))


@pytest.mark.parametrize(
    ("values", "threshold", "kept"),
    [
        ([4.0, 1.0, 3.0, 2.0], 0.5, [1, 0, 1, 0]),
        ([4.0, 1.0, 3.0, 2.0], 0.0, [1, 1, 1, 1]),
        ([4.0, 1.0, 3.0, 2.0], 1.0, [1, 0, 0, 0]),
        ([2.0, 2.0, 2.0], 0.7, [1, 1, 1]),  # all equal: nothing is small
        ([0.0, 0.0], 0.7, [1, 1]),  # no token
        ([math.nan, 1.0], 0.7, [1, 1]),  # the gradients show the fault
        ([math.inf, 1.0], 0.7, [1, 1]),
        ([5.0], 0.7, [1]),
        ([], 0.7, []),
    ],
)
def test_mask_by_hand(values, threshold, kept):
    assert migu_mask(torch.tensor(values), threshold).tolist() == [bool(one) for one in kept]


@pytest.mark.parametrize("size", [1, 2, 3, 10, 33, 256])
def test_the_share_of_rows_is_right_to_one_row(size):
    mask = migu_mask(random_magnitude(size, 1, 2, 3), 0.7)
    assert abs(mask.double().mean().item() - 0.3) <= 1 / size
    scaled = migu_mask(random_magnitude(size, 1, 2, 3) / 1e6, 0.7)  # L1 normalisation changes nothing
    assert torch.equal(mask, scaled)


def test_parts_have_quantiles_of_their_own():
    values = torch.tensor([1.0, 2.0, 10.0, 20.0])
    assert migu_mask(values, 0.5).tolist() == [False, False, True, True]
    assert migu_mask(values, 0.5, [2, 2]).tolist() == [False, True, False, True]
    for parts in ([2, 1], [5, -1]):
        with pytest.raises(ValueError, match="parts="):
            migu_mask(values, 0.5, parts)
    with pytest.raises(ValueError, match="threshold=1.5"):
        migu_mask(values, 1.5)
    with pytest.raises(ValueError, match="2 dimensions"):
        migu_mask(values.view(2, 2))


def test_random_magnitudes_differ_by_update_layer_and_seed():
    base = random_magnitude(16, 0, 1, 2)
    assert all(not torch.equal(base, random_magnitude(16, *other)) for other in ((1, 1, 2), (0, 2, 2), (0, 1, 3)))


def test_shards_are_those_of_chunk():
    for rows in (0, 1, 5, 8):
        mask = torch.arange(rows) % 2 == 0
        chunks = list(mask.chunk(3)) + [mask[:0]] * 3
        for rank in range(3):
            assert torch.equal(local_part(mask, [(True, 3, rank)]), chunks[rank])
    assert torch.equal(local_part(mask, [(False, 2, 1), (True, 2, 1)]), mask[4:])  # replicated, then cut


def names(model, **over):
    return [layer.name for layer in find_layers(model, **over)]


def test_which_layers():
    model = tiny_qwen3(num_hidden_layers=1)
    assert len(names(model)) == 7 and "lm_head" not in names(model)
    assert names(model, modules=["q_proj", "lm_head"]) == ["model.layers.0.self_attn.q_proj", "lm_head"]
    with pytest.raises(ValueError, match="no trained nn.Linear or Conv1D has 'proj'"):
        find_layers(model, ["proj"])
    tied = tiny_qwen3(num_hidden_layers=1, tie_word_embeddings=True)
    with pytest.raises(RefusedError, match="model.embed_tokens and lm_head share one weight"):
        find_layers(tied, ["lm_head"])
    adapter = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    assert (
        [name.split(".")[-2] for name in names(adapter)]
        == ["lora_A", "lora_B"]
        == [name.split(".")[-2] for name in names(adapter, modules=["q_proj"])]
    )
    with pytest.raises(RefusedError, match="finds no trained"):
        find_layers(nn.Sequential(nn.Embedding(2, 2)))


def test_the_outputs_of_a_transposed_weight():
    fused = find_layers(tiny_gpt2(n_layer=1), ["c_attn"], {"c_attn": 3})[0]
    assert (fused.dim, fused.outputs, fused.parts) == (1, 96, [32, 32, 32])
    for parts, message in (({"c_attn": 5}, "does not divide"), ({"x": 2}, "ends with 'x'"), ({"c_attn": 0}, "divide")):
        with pytest.raises(ValueError, match=message):
            find_layers(tiny_gpt2(n_layer=1), ["c_attn"], parts)


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"threshold": -0.1}, "threshold=-0.1"),
        ({"threshold": True}, "threshold=True"),
        ({"mode": "soft"}, "mode='soft' must be one of 'gradient', 'hard'"),
        ({"choice": "small"}, "choice='small'"),
        ({"seed": 3}, 'seed=3 only acts with choice="random"'),
        ({"start_update": -1}, "start_update=-1"),
        ({"modules": "q_proj"}, "modules='q_proj'"),
        ({"modules": []}, "at least one"),
    ],
)
def test_settings_out_of_range(over, message):
    with pytest.raises(ValueError, match=message):
        MIGUCallback(**over)
