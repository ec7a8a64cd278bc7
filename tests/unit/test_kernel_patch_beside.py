"""Patched models beside accelerate's hooks, checkpointing, compilation and copies."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn

from hf_effi.errors import RefusedError
from hf_effi.kernels import patch, unpatch
from tests.helpers import (
    assert_bitwise_equal,
    tiny_llama,
)
from tests.helpers.patches import IDS, SWIGLU, TorchRMSNorm, assert_close, outputs_of, state_of


class CountingHook(ModelHook):
    def __init__(self):
        self.calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


def test_accelerate_hook_from_before_stays_and_fires():
    model, hook = tiny_llama(), CountingHook()
    add_hook_to_module(model.model.norm, hook)
    state = state_of(model)
    with patch(model, {"RMSNorm": TorchRMSNorm}):
        hook.calls = 0
        model(input_ids=IDS)
        assert hook.calls == 1
        assert model.model.norm.__dict__["_old_forward"].__func__ is TorchRMSNorm.forward
    assert state_of(model) == state
    model(input_ids=IDS)
    assert hook.calls == 2


def test_accelerate_hook_added_while_patched():
    model, hook = tiny_llama(), CountingHook()
    handle = patch(model, {"RMSNorm": TorchRMSNorm})
    add_hook_to_module(model.model.norm, hook)
    handle.revert()
    expected = outputs_of(tiny_llama())
    hook.calls = 0
    assert_bitwise_equal(outputs_of(model), expected, "outputs")
    assert hook.calls == 1
    remove_hook_from_module(model.model.norm)
    assert model.model.norm.forward.__func__ is type(model.model.norm).forward


def test_accelerate_hook_removed_while_patched():
    model = tiny_llama()
    add_hook_to_module(model.model.norm, CountingHook())
    handle = patch(model, {"RMSNorm": TorchRMSNorm})
    remove_hook_from_module(model.model.norm)
    handle.revert()
    assert model.model.norm.forward.__func__ is type(model.model.norm).forward
    assert_bitwise_equal(outputs_of(model), outputs_of(tiny_llama()), "outputs")


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model = tiny_llama().train()
    expected = outputs_of(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()

    def gradients():
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    before = gradients()
    with patch(model, SWIGLU):
        assert_close({n: g for n, g in expected.items() if n in before}, gradients())
    assert_bitwise_equal(gradients(), before, "gradients")


def test_a_checkpointing_layer_itself_is_refused():
    class Layer(nn.Module):
        def forward(self, hidden_states):
            return hidden_states

    with pytest.raises(RefusedError, match=r"model.layers.0 \(LlamaDecoderLayer\).*switch checkpointing off"):
        patch(tiny_llama(), {re.compile(r"model\.layers\.\d+"): Layer})


def test_a_compiled_model_is_refused():
    model = tiny_llama()
    for compiled in (
        torch.compile(model, backend="eager"),
        nn.Sequential(torch.compile(model.model, backend="eager")),
    ):
        with pytest.raises(RefusedError, match="is compiled. Patch first, then compile"):
            patch(compiled, {"RMSNorm": TorchRMSNorm})
    model.compile(backend="eager")
    with pytest.raises(RefusedError, match="is compiled"):
        patch(model, {"RMSNorm": TorchRMSNorm})


class Plus(nn.Module):
    """Differs visibly, for the tests that need to see which code ran; applied without the self-check."""

    can_torch_compile = True

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon) + 1


class PlusButNotCompiled(nn.Module):
    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon) + 1


class PlusRotary(nn.Module):
    can_torch_compile = True

    def forward(self, q, k, cos, sin):
        return q + 1, k - 1


@torch.no_grad()
def test_patch_then_compile_then_revert():
    model = tiny_llama(num_hidden_layers=1).eval()
    eager = model(input_ids=IDS).logits
    for layers in ({"RMSNorm": Plus}, {"rotary_pos_emb": PlusRotary}):
        handle = patch(model, layers, verify=False)
        patched = model(input_ids=IDS).logits
        assert not torch.equal(patched, eager)
        compiled = torch.compile(model, backend="eager")
        assert torch.equal(compiled(input_ids=IDS).logits, patched)
        handle.revert()
        assert torch.equal(compiled(input_ids=IDS).logits, eager), "the compiled graph must not outlive the patch"
    torch.compiler.reset()


@torch.no_grad()
def test_a_layer_that_cannot_be_compiled_leaves_the_graph_to_the_original():
    model = tiny_llama(num_hidden_layers=1).eval()
    eager = model(input_ids=IDS).logits
    with patch(model, {"RMSNorm": PlusButNotCompiled}, verify=False):
        assert not torch.equal(model(input_ids=IDS).logits, eager)
        assert torch.equal(torch.compile(model, backend="eager")(input_ids=IDS).logits, eager)
    torch.compiler.reset()


def test_a_copy_of_a_patched_model_uses_its_own_weights():
    model = tiny_llama()
    with patch(model, {"RMSNorm": PlusButNotCompiled, "rotary_pos_emb": PlusRotary}, verify=False):
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert not twin(input_ids=IDS).logits.any()
        assert model(input_ids=IDS).logits.any()
        unpatch(twin)
        assert "forward" not in twin.model.norm.__dict__ and "forward" in model.model.norm.__dict__


def test_use_kernels_is_refused():
    model = tiny_llama()
    model._use_kernels = True
    with pytest.raises(RefusedError, match="use_kernels=True"):
        patch(model, {"RMSNorm": TorchRMSNorm})
