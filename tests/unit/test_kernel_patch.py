"""`patch` puts everything back to the bit, after errors, under other handles and in any order."""

from __future__ import annotations

import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.llama import modeling_llama

from hf_effi.errors import RefusedError
from hf_effi.kernels import patch, unpatch
from tests.helpers import (
    assert_bitwise_equal,
    tiny_llama,
)
from tests.helpers.patches import (
    IDS,
    MODELS,
    SWIGLU,
    TorchRMSNorm,
    TorchSwiGLU,
    TwiceTheNorm,
    assert_close,
    outputs_of,
    state_of,
)

# --- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_revert_restores_everything_to_the_bit(name, tmp_path):
    make, layers = MODELS[name]
    model, other = make(tmp_path), tiny_llama(seed=1)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    globals_before = dict(vars(modeling_llama))
    state, expected, of_other = state_of(model), outputs_of(model), outputs_of(other)

    with patch(model, layers) as handle:
        assert handle.active and {row.key for row in handle} == set(layers)
        assert all("forward" in m.__dict__ for n, m in model.named_modules() if n.endswith((".mlp", "layernorm")))
        assert_close(expected, outputs_of(model))
        assert_bitwise_equal(outputs_of(other), of_other, "a second model")

    assert not handle.active
    assert state_of(model) == state
    assert_bitwise_equal(outputs_of(model), expected, "outputs and gradients")
    assert dict(vars(modeling_llama)) == globals_before
    assert all(p.grad is None for p in model.parameters())


def test_saving_while_patched(tmp_path):
    model = tiny_llama()
    with patch(model, SWIGLU):
        model.save_pretrained(tmp_path / "patched")
        keys = list(model.state_dict())
    assert keys == list(model.state_dict())
    again = type(model).from_pretrained(tmp_path / "patched")
    assert_bitwise_equal(again, model)


def test_the_patched_code_is_what_runs():
    model, seen = tiny_llama(), []

    class Spy(nn.Module):
        def forward(self, x):
            seen.append(type(self).__name__)
            return F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)

    with patch(model, {"RMSNorm": Spy}):
        seen.clear()
        model(input_ids=IDS)
        assert seen == ["LlamaRMSNorm"] * 5
    seen.clear()
    model(input_ids=IDS)
    assert seen == []


def test_self_check_leaves_the_random_state_alone():
    model = tiny_llama()
    before = torch.get_rng_state()
    patch(model, {"RMSNorm": TorchRMSNorm}).revert()
    assert torch.equal(before, torch.get_rng_state())


# --- exceptions, order and claims ------------------------------------------------------------------------------------


def test_an_exception_in_the_body_reverts():
    model = tiny_llama()
    state = state_of(model)
    with pytest.raises(RuntimeError, match="out of memory"), patch(model, SWIGLU):
        raise RuntimeError("out of memory")
    assert state_of(model) == state


def test_an_exception_while_applying_reverts():
    model = tiny_llama()
    state = state_of(model)
    with pytest.raises(RefusedError):
        patch(model, {"SwiGLUMLP": TorchSwiGLU, "RMSNorm": TwiceTheNorm})
    assert state_of(model) == state
    patch(model, {"SwiGLUMLP": TorchSwiGLU}).revert()  # nothing is claimed any more


def test_revert_twice_does_nothing():
    model = tiny_llama()
    handle = patch(model, {"RMSNorm": TorchRMSNorm})
    handle.revert()
    again = patch(model, {"RMSNorm": TorchRMSNorm})
    handle.revert()
    assert again.active and "forward" in model.model.norm.__dict__
    again.revert()


def test_two_keys_on_one_module_are_named():
    model = tiny_llama()
    state = state_of(model)
    with pytest.raises(RefusedError, match=r"layers.0.mlp is claimed by '\*.mlp' and already by 'SwiGLUMLP'"):
        patch(model, {"SwiGLUMLP": TorchSwiGLU, "*.mlp": TorchSwiGLU})
    assert state_of(model) == state


def test_two_handles_on_one_module_are_named():
    model = tiny_llama()
    with patch(model, {"*.mlp": TorchSwiGLU}):
        with pytest.raises(RefusedError, match=r"claimed by 'SwiGLUMLP' and already by '\*.mlp'"):
            patch(model, {"SwiGLUMLP": TorchSwiGLU})
        assert "forward" in model.model.layers[0].mlp.__dict__
    patch(model, {"SwiGLUMLP": TorchSwiGLU}).revert()


def test_unpatch_where_the_handle_is_lost():
    model = tiny_llama()
    state = state_of(model)
    handle = patch(model, {"RMSNorm": TorchRMSNorm})
    patch(model, {"SwiGLUMLP": TorchSwiGLU})
    unpatch(model)
    assert state_of(model) == state and not handle.active
    handle.revert()
    unpatch(model)
    assert state_of(model) == state


@pytest.mark.parametrize("first_out", [0, 1])
def test_nested_handles_revert_in_either_order(first_out):
    model = tiny_llama()
    state, expected = state_of(model), outputs_of(model)
    handles = [patch(model, {"RMSNorm": TorchRMSNorm}), patch(model, {"SwiGLUMLP": TorchSwiGLU})]
    handles.pop(first_out).revert()
    assert_close(expected, outputs_of(model))
    handles.pop().revert()
    assert state_of(model) == state


def test_a_later_stranger_is_named_and_the_rest_restored():
    model = tiny_llama()
    handle = patch(model, {"RMSNorm": TorchRMSNorm})
    stranger = model.model.norm.forward = types.MethodType(lambda self, x: x, model.model.norm)
    with pytest.raises(RefusedError, match="model.norm.forward was replaced by something else"):
        handle.revert()
    assert model.model.norm.forward is stranger
    assert "forward" not in model.model.layers[0].input_layernorm.__dict__
    assert handle.replaced == ("model.norm.forward",)  # for another try, once the stranger is gone
    model.model.norm.forward = handle._claims[0].value
    handle.revert()
    assert not handle.active and "forward" not in model.model.norm.__dict__


def test_an_earlier_instance_forward_comes_back():
    """TRL and others put a forward on the instance: it is the original, and comes back as the same object."""
    model = tiny_llama()
    calls = []
    norm = model.model.norm

    def counted(self, x):
        calls.append(1)
        return type(self).forward(self, x)

    mine = norm.forward = types.MethodType(counted, norm)
    with patch(model, {"model.norm": TorchRMSNorm}):
        assert calls and norm.forward is not mine
    assert norm.__dict__["forward"] is mine
