"""`patch`: what is put in is checked first, and everything is put back to the bit."""

from __future__ import annotations

import copy
import logging
import re
import types

import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.models.llama import modeling_llama

from hf_effi._compat import MissingPackageError
from hf_effi.kernels import KernelMismatchError, PatchError, TiledMLP, patch, unpatch
from hf_effi.kernels._targets import kernel_name
from hf_effi.kernels._verify import compare
from tests.helpers import (
    assert_bitwise_equal,
    save_tiny,
    tiny_gemma,
    tiny_gpt2,
    tiny_llama,
    tiny_mistral,
    tiny_qwen3,
    weights_of,
)

# --- layers in plain torch, right and wrong -------------------------------------------------------------------------


class TorchRMSNorm(nn.Module):
    has_backward = True
    can_torch_compile = True

    def forward(self, hidden_states):
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


class TorchGemmaNorm(nn.Module):
    can_torch_compile = True

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, 1 + self.weight.float(), self.eps).type_as(x)


class TorchSwiGLU(nn.Module):
    can_torch_compile = True

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class TorchGeGLU(nn.Module):
    can_torch_compile = True

    def forward(self, x):
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class TorchRotary(nn.Module):
    can_torch_compile = True

    def forward(self, q, k, cos, sin, unsqueeze_dim=1):
        return tuple(_rotated(x, cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)) for x in (q, k))


def _rotated(x, cos, sin):
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return torch.cat(
        [first * cos[..., :half] - second * sin[..., :half], second * cos[..., half:] + first * sin[..., half:]], -1
    )


class TorchLoss(nn.Module):
    def forward(self, logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100, **kwargs):
        shifted = F.pad(labels, (0, 1), value=ignore_index)[..., 1:].reshape(-1)
        total = F.cross_entropy(
            logits.float().reshape(-1, vocab_size), shifted, reduction="sum", ignore_index=ignore_index
        )
        return total / ((shifted != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch)


class TwiceTheNorm(nn.Module):
    def forward(self, x):
        return 2 * F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)


class NormWithoutEpsilon(nn.Module):
    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, 0.0)


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 1.01 * grad


class NormWithWrongGradient(nn.Module):
    def forward(self, x):
        return _WrongGradient.apply(F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon))


class NormInDouble(nn.Module):
    def forward(self, x):
        return F.rms_norm(x.double(), self.weight.shape, self.weight.double(), self.variance_epsilon)


class NormOfNaN(nn.Module):
    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon) * float("nan")


class NormThatWritesItsInput(nn.Module):
    def forward(self, x):
        out = F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)
        with torch.no_grad():
            x.data.mul_(2)
        return out


class NormThatWritesItsWeight(nn.Module):
    def forward(self, x):
        out = F.rms_norm(x, self.weight.shape, self.weight.clone(), self.variance_epsilon)
        self.weight.data.mul_(2)
        return out


class _WritesTheUpstreamGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        out = grad.clone()
        grad.mul_(2)
        return out


class NormThatWritesTheUpstreamGradient(nn.Module):
    """As Liger's with `in_place=True`: wrong where a residual branch has the same gradient."""

    def forward(self, x):
        norm = F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)
        return _WritesTheUpstreamGradient.apply(norm)


class NormOfNoWeightGradient(nn.Module):
    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight.detach(), self.variance_epsilon)


class NormThatLeavesTrainingMode(nn.Module):
    def forward(self, x):
        self.eval()
        return F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)


class NormWithACache(nn.Module):
    def forward(self, x):
        self._buffers["cache"] = x
        return F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)


class NormInATuple(nn.Module):
    def forward(self, x):
        return (F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon),)


class NormWithoutDriver(nn.Module):
    def forward(self, x):
        raise RuntimeError("0 active drivers")


class ForwardOnlyNorm(nn.Module):
    has_backward = False
    can_torch_compile = True

    def forward(self, x):
        return torch.from_numpy(F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon).numpy())


class WrongForwardOnlyNorm(nn.Module):
    has_backward = False

    def forward(self, x):
        return 2 * F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)


# --- models ---------------------------------------------------------------------------------------------------------


def peft_llama():
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def four_bit_llama(tmp_path):
    """A QLoRA model by bitsandbytes, which quantizes on the CPU too; in training mode, where it does not repack."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from tests.helpers import tiny_tokenizer

    path = save_tiny(tiny_llama(hidden_size=64), tiny_tokenizer(), tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config, device_map="cpu")
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")).train()


SWIGLU = {"RMSNorm": TorchRMSNorm, "SwiGLUMLP": TorchSwiGLU, "rotary_pos_emb": TorchRotary}
MODELS = {
    "llama": (lambda _: tiny_llama(), {**SWIGLU, "ForCausalLMLoss": TorchLoss}),
    "qwen3": (lambda _: tiny_qwen3(), {**SWIGLU, "ForCausalLMLoss": TorchLoss}),
    "mistral": (lambda _: tiny_mistral(), {**SWIGLU, "ForCausalLMLoss": TorchLoss}),
    "gemma": (
        lambda _: tiny_gemma(),
        {"RMSNorm": TorchGemmaNorm, "GeGLUMLP": TorchGeGLU, "rotary_pos_emb": TorchRotary},
    ),
    "peft": (lambda _: peft_llama(), SWIGLU),
    "four_bit": (four_bit_llama, SWIGLU),
}
IDS = torch.tensor([[7, 8, 9, 10, 11, 12], [20, 21, 22, 23, 24, 25]])


def state_of(model):
    """Return all that a module holds, by identity and in order: entries, parameters, buffers, hooks, submodules."""
    found = {}
    for name, module in model.named_modules():
        for entry, value in module.__dict__.items():
            inner = list(value.items()) if isinstance(value, dict) else None
            found[name, entry] = (id(value), inner and [(k, id(v)) for k, v in inner])
    return list(found.items())


def outputs_of(model):
    """Return loss, logits and all gradients; the gradients are taken away again."""
    result = model(input_ids=IDS, labels=IDS)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(result.loss, list(trained.values()), allow_unused=True)
    named = {name: g for name, g in zip(trained, gradients, strict=True) if g is not None}
    return {"loss": result.loss.detach(), "logits": result.logits.detach(), **named}


def assert_close(a, b, tolerance=1e-4):
    assert a.keys() == b.keys()
    for name in a:
        gap, scale = (a[name] - b[name]).abs().max(), a[name].abs().max()
        assert gap <= tolerance * scale, f"{name}: {gap} of {scale}"


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
    with pytest.raises(KernelMismatchError, match="TorchRotary on model.layers.0.self_attn: output 0 is off by"):
        patch(family(name), {"rotary_pos_emb": TorchRotary})


def test_a_rotary_embedding_of_a_part_needs_its_input():
    """Phi cuts the rotated part out before it calls the function."""
    model = family("phi")
    with pytest.raises(PatchError, match="the original does not run on the input.*Pass inputs="):
        patch(model, {"rotary_pos_emb": TorchRotary})

    def cut(module, generator):
        angles = torch.rand(2, 5, 2, generator=generator).repeat(1, 1, 2)
        return *torch.randn(2, 2, 4, 5, 4, generator=generator), angles.cos(), angles.sin()

    with patch(model, {"rotary_pos_emb": TorchRotary}, inputs={"rotary_pos_emb": cut}) as handle:
        assert len(handle) == 1


# --- exceptions, order and claims -------------------------------------------------------------------------------------


def test_an_exception_in_the_body_reverts():
    model = tiny_llama()
    state = state_of(model)
    with pytest.raises(RuntimeError, match="out of memory"), patch(model, SWIGLU):
        raise RuntimeError("out of memory")
    assert state_of(model) == state


def test_an_exception_while_applying_reverts():
    model = tiny_llama()
    state = state_of(model)
    with pytest.raises(KernelMismatchError):
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
    with pytest.raises(PatchError, match=r"layers.0.mlp is claimed by '\*.mlp' and already by 'SwiGLUMLP'"):
        patch(model, {"SwiGLUMLP": TorchSwiGLU, "*.mlp": TorchSwiGLU})
    assert state_of(model) == state


def test_two_handles_on_one_module_are_named():
    model = tiny_llama()
    with patch(model, {"*.mlp": TorchSwiGLU}):
        with pytest.raises(PatchError, match=r"claimed by 'SwiGLUMLP' and already by '\*.mlp'"):
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
    with pytest.raises(PatchError, match="model.norm.forward was replaced by something else"):
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


# --- accelerate, checkpointing, compile, copies -----------------------------------------------------------------------


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

    with pytest.raises(PatchError, match=r"model.layers.0 \(LlamaDecoderLayer\).*switch checkpointing off"):
        patch(tiny_llama(), {re.compile(r"model\.layers\.\d+"): Layer})


def test_a_compiled_model_is_refused():
    model = tiny_llama()
    for compiled in (
        torch.compile(model, backend="eager"),
        nn.Sequential(torch.compile(model.model, backend="eager")),
    ):
        with pytest.raises(PatchError, match="is compiled. Patch first, then compile"):
            patch(compiled, {"RMSNorm": TorchRMSNorm})
    model.compile(backend="eager")
    with pytest.raises(PatchError, match="is compiled"):
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
    with pytest.raises(PatchError, match="use_kernels=True"):
        patch(model, {"RMSNorm": TorchRMSNorm})


# --- the self-check -----------------------------------------------------------------------------------------------------

WRONG = {
    TwiceTheNorm: "output 0 is off by 1.00e",
    NormWithoutEpsilon: "output 0 is off by",
    NormWithWrongGradient: "gradient of input 0 is off by 1.00e-02",
    NormInDouble: "output 0 is .* float64 and the original's is .* float32",
    NormOfNaN: "output 0 is off by nan",
    NormThatWritesItsInput: "input 0 after the call",
    NormThatWritesItsWeight: "weight after the call",
    NormThatWritesTheUpstreamGradient: "upstream gradient 0 after the backward",
    NormOfNoWeightGradient: "gradient of weight is absent",
    NormThatLeavesTrainingMode: "training set by the call",
    NormWithACache: "_buffers set by the call",
    NormInATuple: r"\['returns Tensor', 'returns tuple\(Tensor\)'\]",
    NormWithoutDriver: "it does not run: RuntimeError: 0 active drivers",
}


@pytest.mark.parametrize("layer", WRONG)
def test_a_wrong_kernel_is_refused_by_name(layer):
    model = tiny_llama()
    state, weights, random_state = state_of(model), weights_of(model), torch.get_rng_state()
    with pytest.raises(
        KernelMismatchError, match=rf"{layer.__name__} on model.layers.0.input_layernorm: .*{WRONG[layer]}"
    ):
        patch(model, {"RMSNorm": layer})
    assert state_of(model) == state
    assert_bitwise_equal(model, weights)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_what_the_original_leaves_in_its_module_is_taken_back():
    """As bitsandbytes' compute dtype, which is set by the first call, here that of the check in a wider dtype."""

    class Counting(nn.Linear):
        calls, dtypes = 0, ()

        def forward(self, x):
            self.calls, self.dtypes = self.calls + 1, (*self.dtypes, x.dtype)
            return super().forward(x)

    class Plain(nn.Module):
        def forward(self, x):
            return F.linear(x, self.weight, self.bias)

    model = nn.Sequential(Counting(3, 5))
    state = state_of(model)
    with patch(model, {"0": Plain}):
        assert "dtypes" not in model[0].__dict__
    assert state_of(model) == state


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("always", [False, True])
def test_dropout_is_checked_in_both_modes(training, always):
    """A model is loaded in evaluation mode, where a kernel that knows no dropout looks right."""

    class MLP(nn.Module):
        def forward(self, x):
            return F.dropout(self.c_proj(self.act(self.c_fc(x))), self.dropout.p, self.training)

    class Wrong(nn.Module):
        def forward(self, x):
            return F.dropout(self.c_proj(self.act(self.c_fc(x))), self.dropout.p, always)

    model = tiny_gpt2(resid_pdrop=0.3).train(training)
    state = state_of(model)
    with pytest.raises(KernelMismatchError, match="Wrong on transformer.h.0.mlp: output 0 is off by"):
        patch(model, {"*.mlp": Wrong})
    assert state_of(model) == state
    patch(model, {"*.mlp": MLP}).revert()
    assert state_of(model) == state


def test_a_kernel_that_draws_in_its_backward_leaves_the_random_state_alone():
    class Draws(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            torch.rand(3)
            return grad

    class Norm(nn.Module):
        def forward(self, x):
            return Draws.apply(F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon))

    before = torch.get_rng_state()
    patch(tiny_llama(), {"RMSNorm": Norm}).revert()
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, lambda: torch.device("meta")])
def test_surroundings_do_not_matter(context):
    model, other = tiny_llama(hidden_size=36, intermediate_size=37, head_dim=12), tiny_llama()
    with context():
        patch(model, {**SWIGLU, "ForCausalLMLoss": TorchLoss}).revert()
        with pytest.raises(KernelMismatchError, match="gradient of input 0 is off by"):
            patch(other, {"RMSNorm": NormWithWrongGradient})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_right_kernel_passes_in_every_dtype(dtype):
    model = tiny_qwen3().to(dtype)
    with patch(model, {"RMSNorm": TorchRMSNorm, "SwiGLUMLP": TorchSwiGLU, "rotary_pos_emb": TorchRotary}) as handle:
        assert len(handle) == 9 + 2 + 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_five_percent_are_seen_in_half_precision(dtype):
    class Off(nn.Module):
        def forward(self, x):
            return 1.05 * F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)

    with pytest.raises(KernelMismatchError, match="output 0 is off by"):
        patch(tiny_llama().to(dtype), {"RMSNorm": Off})


class _WrongForLargeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return torch.where(x.abs().amax(-1, keepdim=True) > 0.1, 1.1 * grad, grad)


def test_rows_of_small_magnitude_do_not_hide_the_others():
    """The gradient of a norm is a thousand times larger where its input is a thousand times smaller."""

    class Norm(nn.Module):
        def forward(self, x):
            x = _WrongForLargeRows.apply(x)
            return F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)

    with pytest.raises(KernelMismatchError, match="gradient of input 0 is off by"):
        patch(tiny_llama().bfloat16(), {"RMSNorm": Norm})


def test_a_gemma_norm_needs_its_offset():
    with pytest.raises(KernelMismatchError):
        patch(tiny_gemma(), {"RMSNorm": TorchGemmaNormWithoutOffset})
    with patch(tiny_gemma(), {"RMSNorm": [TorchGemmaNormWithoutOffset, TorchGemmaNorm]}) as handle:
        assert {row.layer for row in handle} == {"TorchGemmaNorm"}


class TorchGemmaNormWithoutOffset(nn.Module):
    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def test_on_mismatch_eager_logs_one_line_and_goes_on(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model = tiny_llama()
    expected = outputs_of(model)
    with patch(model, {"RMSNorm": TwiceTheNorm, "SwiGLUMLP": TorchSwiGLU}, on_mismatch="eager") as handle:
        assert [row.layer for row in handle].count("eager") == 5
        assert [row.layer for row in handle].count("TorchSwiGLU") == 2
        assert "forward" not in model.model.norm.__dict__
        assert_close(expected, outputs_of(model))
    lines = [r.getMessage() for r in caplog.records if "left eager" in r.getMessage()]
    assert len(lines) == 1 and "TwiceTheNorm on model.layers.0.input_layernorm" in lines[0]


def test_a_forward_only_layer_runs_without_gradients_only():
    model = tiny_llama()
    expected = outputs_of(model)
    with patch(model, {"RMSNorm": ForwardOnlyNorm}):
        assert_bitwise_equal(outputs_of(model), expected, "with gradients the original runs")
    with patch(model, {"RMSNorm": WrongForwardOnlyNorm}, verify=False), torch.no_grad():
        assert not torch.equal(model(input_ids=IDS).logits, expected["logits"])
    with pytest.raises(KernelMismatchError, match="output 0 is off by 1.00e"):
        patch(model, {"RMSNorm": WrongForwardOnlyNorm})


def test_verify_false_applies_without_a_check():
    model = tiny_llama()
    with patch(model, {"RMSNorm": TwiceTheNorm}, verify=False) as handle:
        assert {row.note for row in handle} == {"not checked"}
        assert not torch.equal(model(input_ids=IDS).logits, tiny_llama()(input_ids=IDS).logits)


def test_weights_that_are_not_here_cannot_be_checked():
    with pytest.raises(PatchError, match="sharded or offloaded.*verify=False"):
        patch(tiny_llama().to("meta"), {"RMSNorm": TorchRMSNorm})


def test_inputs_for_a_module_that_takes_no_activations():
    class Lookup(nn.Module):
        def forward(self, ids):
            return self.weight[ids]

    model = tiny_llama()
    with pytest.raises(PatchError, match=r"cannot tell what input model.embed_tokens \(Embedding\) takes"):
        patch(model, {"model.embed_tokens": Lookup})
    ids = {"model.embed_tokens": lambda module, generator: (torch.tensor([[1, 2, 2]]),)}
    with patch(model, {"model.embed_tokens": Lookup}, inputs=ids) as handle:
        assert handle.rows[0].note.startswith(("output 0", "gradient of weight"))
    with pytest.raises(PatchError, match="inputs has keys that `layers` has not"):
        patch(model, {"RMSNorm": TorchRMSNorm}, inputs=ids)


def test_compare_by_hand():
    """`y = 2x` against `y = 2.002x` in fp32: off by 1e-3, allowed 18 roundings as the original is exact."""
    x = torch.tensor([1.0, -4.0], requires_grad=True)
    out, grad = compare((), lambda v: 2 * v, lambda v: 2.002 * v, ((x,), {}))
    assert (out.what, grad.what) == ("output 0", "gradient of input 0")
    assert out.error == pytest.approx(1e-3, rel=1e-3) and out.own_error == 0 and not out.ok
    assert out.allowed == pytest.approx(18 * 2**-23)
    assert all(d.ok for d in compare((), lambda v: 2 * v, lambda v: v + v, ((x,), {})))


# --- keys and values ------------------------------------------------------------------------------------------------------


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
    with pytest.raises(PatchError, match=message):
        patch(model, layers)
    assert state_of(model) == state


def test_a_layer_with_members_is_refused():
    class WithHelper(nn.Module):
        def forward(self, x):
            return self.helper(x)

        def helper(self, x):
            return x

    with pytest.raises(PatchError, match="WithHelper has members that a kernel layer may not have: helper"):
        patch(tiny_llama(), {"RMSNorm": WithHelper})


def test_bad_model_and_policy():
    with pytest.raises(PatchError, match="needs an nn.Module, not str"):
        patch("gpt2", {"RMSNorm": TorchRMSNorm})
    with pytest.raises(PatchError, match="on_mismatch='warn' must be"):
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
    with pytest.raises(PatchError, match="TiledMLP cannot compute model.norm: LlamaRMSNorm is none of SwiGLUMLP"):
        patch(tiny_llama(), {"model.norm": TiledMLP()})
    model = tiny_llama()
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *args: None)
    with pytest.raises(KernelMismatchError, match="TiledMLP on .*mlp: it does not run: ValueError: TiledMLP: up_proj"):
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
