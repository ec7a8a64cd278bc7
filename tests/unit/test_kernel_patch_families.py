"""
Which layers of a model a kernel may replace follows from their structure; keys and values that mean nothing are
refused.
"""

from __future__ import annotations

import re
import types

import pytest
import torch
from torch import nn

from hf_effi.errors import MissingPackageError, RefusedError
from hf_effi.kernels import TiledMLP, patch
from hf_effi.kernels._targets import kernel_name
from tests.helpers import (
    tiny_gemma,
    tiny_llama,
    tiny_qwen3,
)
from tests.helpers.patches import (
    TorchGeGLU,
    TorchGemmaNorm,
    TorchRMSNorm,
    TorchRotary,
    TorchSwiGLU,
    TwiceTheNorm,
    assert_close,
    four_bit_llama,
    outputs_of,
    peft_llama,
    state_of,
)

# --- models ---------------------------------------------------------------------------------------------------------


FAMILIES = {
    "qwen2 granite smollm3 olmo2 exaone4 hunyuan_v1_dense": {"RMSNorm", "SwiGLUMLP", "rotary_pos_emb"},
    "gemma gemma3_text": {"RMSNorm", "GeGLUMLP", "rotary_pos_emb"},
    "phi3 mixtral qwen3_moe lfm2": {"RMSNorm", "rotary_pos_emb"},
    "starcoder2": {"rotary_pos_emb"},
    "qwen3_next": {"RMSNorm", "SwiGLUMLP"},
}

ALL_LAYERS = {
    "RMSNorm": [TorchRMSNorm, TorchGemmaNorm],
    "SwiGLUMLP": TorchSwiGLU,
    "GeGLUMLP": TorchGeGLU,
    "rotary_pos_emb": TorchRotary,
}


def family(name):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes, **heads, **tokens))


@pytest.mark.parametrize(("name", "keys"), [(n, keys) for names, keys in FAMILIES.items() for n in names.split()])
def test_families_by_structure(name, keys):
    model = family(name)
    assert keys <= {kernel_name(module) for module in model.modules()}
    patch(model, {key: ALL_LAYERS[key] for key in keys}).revert()


@pytest.mark.parametrize("name", ["cohere", "helium"])
def test_a_rotary_embedding_of_another_layout_is_refused(name):
    """These rotate neighbouring entries, not halves; by name alone it would look the same."""
    with pytest.raises(RefusedError, match="TorchRotary on model.layers.0.self_attn: output 0 is off by"):
        patch(family(name), {"rotary_pos_emb": TorchRotary})


def test_a_rotary_embedding_of_a_part_needs_its_input():
    """Phi cuts the rotated part out before it calls the function."""
    model = family("phi")
    with pytest.raises(RefusedError, match="the original does not run on the input.*Pass inputs="):
        patch(model, {"rotary_pos_emb": TorchRotary})

    def cut(module, generator):
        angles = torch.rand(2, 5, 2, generator=generator).repeat(1, 1, 2)
        return *torch.randn(2, 2, 4, 5, 4, generator=generator), angles.cos(), angles.sin()

    with patch(model, {"rotary_pos_emb": TorchRotary}, inputs={"rotary_pos_emb": cut}) as handle:
        assert len(handle) == 1


# --- keys and values -------------------------------------------------------------------------------------------------


def test_kernel_names_follow_from_structure():
    names = {kernel_name(m) for m in tiny_qwen3().modules()}
    assert names == {None, "RMSNorm", "SwiGLUMLP", "rotary_pos_emb", "ForCausalLMLoss"}
    assert {kernel_name(m) for m in tiny_gemma().modules()} >= {"RMSNorm", "GeGLUMLP", "rotary_pos_emb"}
    assert "LoRALinear" in {kernel_name(m) for m in peft_llama().modules()}


@pytest.mark.parametrize(
    ("key", "count"),
    [
        ("RMSNorm", 5),
        ("*layernorm", 4),
        ("model.norm", 1),
        (re.compile(r".*\.1\.\w+_layernorm"), 2),
        ("model.layers.[0]*norm", 2),
    ],
)
def test_keys(key, count):
    with patch(tiny_llama(), {key: TorchRMSNorm}) as handle:
        assert len(handle) == count


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (
            {"RMSnorm": TorchRMSNorm},
            r"'RMSnorm' matches no module.*ForCausalLMLoss, RMSNorm, SwiGLUMLP, rotary_pos_emb",
        ),
        ({"GeGLUMLP": TorchGeGLU}, "matches no module"),
        ({"*.mpl": TorchSwiGLU}, "matches no module"),
        ({3: TorchSwiGLU}, "3 is no key"),
        ({}, "at least one key"),
        (None, "at least one key"),
        ("ligr", "or 'liger'"),
        ({"RMSNorm": None}, "None is no kernel layer"),
        ({"RMSNorm": TorchRMSNorm()}, "is no kernel layer"),
        ({"RMSNorm": []}, "empty list"),
        ({"RMSNorm": nn.RMSNorm}, "RMSNorm has a constructor"),
        ({"RMSNorm": "liger_kernel"}, "no source of layers"),
        ({"RMSNorm": "hf_effi"}, "no source of layers for 'RMSNorm'"),
    ],
)
def test_bad_keys_and_values(layers, message):
    model = tiny_llama()
    state = state_of(model)
    with pytest.raises(ValueError, match=message):
        patch(model, layers)
    assert state_of(model) == state


def test_a_layer_with_members_is_refused():
    class WithHelper(nn.Module):
        def forward(self, x):
            return self.helper(x)

        def helper(self, x):
            return x

    with pytest.raises(ValueError, match="WithHelper has members that a kernel layer may not have: helper"):
        patch(tiny_llama(), {"RMSNorm": WithHelper})


def test_bad_model_and_policy():
    with pytest.raises(ValueError, match="needs an nn.Module, not str"):
        patch("gpt2", {"RMSNorm": TorchRMSNorm})
    with pytest.raises(ValueError, match="on_mismatch='warn' must be"):
        patch(tiny_llama(), {"RMSNorm": TorchRMSNorm}, on_mismatch="warn")


@pytest.mark.parametrize("value", [TiledMLP(num_shards=3), "hf_effi"])
def test_tiled_mlp_is_a_value(value):
    model = tiny_gemma()
    state, expected = state_of(model), outputs_of(model)
    with patch(model, {"GeGLUMLP": value, "RMSNorm": TorchGemmaNorm}) as handle:
        assert {row.layer for row in handle} == {"TiledMLP", "TorchGemmaNorm"}
        assert_close(expected, outputs_of(model))
    assert state_of(model) == state


def test_tiled_mlp_on_four_bit_weights(tmp_path):
    model = four_bit_llama(tmp_path)
    state, expected = state_of(model), outputs_of(model)
    with patch(model, {"SwiGLUMLP": TiledMLP(num_shards=2)}):
        assert_close(expected, outputs_of(model))
    assert state_of(model) == state


def test_tiled_mlp_says_what_it_cannot_compute():
    with pytest.raises(RefusedError, match="TiledMLP cannot compute model.norm: LlamaRMSNorm is none of SwiGLUMLP"):
        patch(tiny_llama(), {"model.norm": TiledMLP()})
    model = tiny_llama()
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *args: None)
    with pytest.raises(RefusedError, match="TiledMLP on .*mlp: it does not run: RefusedError: TiledMLP: up_proj"):
        patch(model, {"SwiGLUMLP": TiledMLP()})
    with pytest.raises(ValueError, match="num_shards=0"):
        TiledMLP(0)


def test_a_repository_object_is_loaded():
    class InProcess:
        def load(self):
            return TorchRMSNorm

    with patch(tiny_llama(), {"RMSNorm": InProcess()}) as handle:
        assert {row.layer for row in handle} == {"TorchRMSNorm"}


def test_hub_layers_need_the_kernels_package(monkeypatch):
    monkeypatch.setattr("hf_effi._compat.is_available", lambda package: False)
    with pytest.raises(MissingPackageError, match=r"layer 'org/repo:Norm' needs `kernels`.*hf_effi\[hub\]"):
        patch(tiny_llama(), {"RMSNorm": "org/repo:Norm"})
    with pytest.raises(MissingPackageError, match=r"needs `liger-kernel`.*hf_effi\[kernels\]"):
        patch(tiny_llama(), {"RMSNorm": "liger"})
    with pytest.raises(MissingPackageError, match="liger-kernel"):
        patch(tiny_llama(), "liger")


def test_hub_reference_is_read(monkeypatch):
    asked = []

    class Repository:
        def __init__(self, repo_id, *, layer_name, revision="main"):
            asked.append((repo_id, layer_name, revision))

        def load(self):
            return TorchRMSNorm

    fake = types.SimpleNamespace(LayerRepository=Repository)
    monkeypatch.setattr("hf_effi.kernels._sources.require", lambda package, purpose: fake)
    patch(tiny_llama(), {"RMSNorm": "org/repo:Norm"}).revert()
    patch(tiny_llama(), {"RMSNorm": "org/repo:Norm@v2"}).revert()
    assert asked == [("org/repo", "Norm", "main"), ("org/repo", "Norm", "v2")]


def test_print_shows_the_table():
    with patch(tiny_llama(), {"RMSNorm": TorchRMSNorm, "*.mlp": TorchSwiGLU}) as handle:
        head, columns, *lines = str(handle).splitlines()
        assert head == "7 modules patched"
        assert columns.split() == ["modules", "count", "class", "key", "layer", "self-check"]
        cells = [re.split(r"\s{2,}", line)[:5] for line in lines]
        assert ["model.layers.*.input_layernorm", "2", "LlamaRMSNorm", "RMSNorm", "TorchRMSNorm"] in cells
        assert ["model.layers.*.mlp", "2", "LlamaMLP", "*.mlp", "TorchSwiGLU"] in cells
    assert str(handle).startswith("7 modules reverted\n")
    handle = patch(tiny_llama(), {"RMSNorm": TwiceTheNorm}, on_mismatch="eager")
    assert str(handle).startswith("0 modules patched, 5 left eager\n") and len(str(handle).splitlines()[2]) < 200
