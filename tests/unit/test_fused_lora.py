"""Fused LoRA linears against PEFT: outputs, gradients, adapters that change, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_effi import patch
from hf_effi.errors import RefusedError
from hf_effi.kernels import FusedLoRALinear
from hf_effi.kernels import fused_lora as module_under_test
from hf_effi.kernels.fused_lora import LoRAWeights, fused_lora, fused_lora_reference
from tests.helpers import assert_bitwise_equal, tiny_gpt2, tiny_llama, tiny_qwen3
from tests.helpers.lora import KEY, attention_of, lora_model, randomize
from tests.helpers.patches import IDS, assert_close, outputs_of, state_of


def weights(out, rank=2, size=3, *, bias=False, scale=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    return LoRAWeights(draw(out, size), draw(out) if bias else None, draw(rank, size), draw(out, rank), scale)


# --- the function ----------------------------------------------------------------------------------------------------


def test_by_hand():
    """`W = [[1, 2]]`, `A = [[1, 1]]`, `B = [[3]]`, `s = 2`, `x = [1, 10]`: 21 + 2 * 3 * 11 = 87."""
    x = torch.tensor([1.0, 10.0], requires_grad=True)
    a, b = torch.ones(1, 2, requires_grad=True), torch.tensor([[3.0]], requires_grad=True)
    (y,) = fused_lora(x, [LoRAWeights(torch.tensor([[1.0, 2.0]]), torch.tensor([0.5]), a, b, 2.0)])
    assert y.tolist() == [87.5]
    y.backward()
    assert x.grad.tolist() == [1 + 6, 2 + 6]  # W + s B A
    assert a.grad.tolist() == [[6.0, 60.0]]  # s B^T x^T
    assert b.grad.tolist() == [[22.0]]  # s (A x)


@pytest.mark.parametrize("shape", [(3,), (1, 3), (2, 5, 3), (0, 3), (2, 1, 2, 3)])
def test_shapes(shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    linears = [weights(4), weights(6, rank=1, seed=1), weights(1, rank=5, bias=True, seed=2)]
    for y, expected in zip(fused_lora(x, linears), fused_lora_reference(x, linears), strict=True):
        assert y.shape == expected.shape == (*shape[:-1], y.shape[-1])
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


def test_every_gradient_by_finite_differences():
    linears = [weights(4, bias=True), weights(2, rank=3, seed=1)]
    x = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    leaves = [t for w in linears for t in (w.weight, w.bias, w.a, w.b) if t is not None]

    def function(x, w0, bias, a0, b0, w1, a1, b1):
        return fused_lora(x, [LoRAWeights(w0, bias, a0, b0, 0.5), LoRAWeights(w1, None, a1, b1, 3.0)])

    assert torch.autograd.gradcheck(function, (x, *leaves))


def test_an_output_that_nothing_uses():
    linears, x = [weights(4), weights(2, seed=1)], torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    leaves = [x, *(t for w in linears for t in (w.weight, w.a, w.b))]
    found = torch.autograd.grad(fused_lora(x, linears)[1].sum(), leaves, allow_unused=True)
    expected = torch.autograd.grad(fused_lora_reference(x, linears)[1].sum(), leaves, allow_unused=True)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


def test_the_model_may_change_an_output_in_place():
    """As Gemma 3n does with its projections: what PEFT's layers return is no view of a Function of ours."""
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    eye = torch.eye(4, dtype=torch.float64)
    a, b = (torch.randn(2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    linears = [LoRAWeights(eye, None, a, b.t(), 0.5)] * 2
    results = []
    for function in (fused_lora_reference, fused_lora):
        first, second = function(x, linears)
        first.mul_(2.0)
        second[..., 0] = 0.0
        results.append(torch.autograd.grad((first.square() + second).sum(), (x, a, b)))
    for expected, found in zip(*results, strict=True):
        assert (expected - found).abs().max() < 1e-12


def test_x_that_is_not_contiguous():
    linears, x = [weights(4)], torch.randn(3, 5, dtype=torch.float64).t().requires_grad_()
    torch.testing.assert_close(fused_lora(x, linears), fused_lora_reference(x, linears))
    fused_lora(x, linears)[0].sum().backward()


# --- against PEFT ----------------------------------------------------------------------------------------------------


CONFIGS = {
    "all-linear": {},
    "two siblings": {"target_modules": ["q_proj", "v_proj"]},
    "one of mlp": {"target_modules": ["up_proj"]},
    "rslora": {"use_rslora": True, "lora_alpha": 3, "r": 5},
    "base biases": {"bias": "all"},
    "ranks differ": {"rank_pattern": {"k_proj": 2, "gate_proj": 7}, "alpha_pattern": {"v_proj": 1}},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_equal_to_peft_in_double(name):
    model = lora_model(tiny_qwen3(attention_bias=True), dtype=torch.float64, **CONFIGS[name])
    state, expected = state_of(model), outputs_of(model)
    with patch(model, KEY):
        assert_close(expected, outputs_of(model), tolerance=1e-7)  # HF's RMSNorm computes in fp32
    assert state_of(model) == state
    assert_bitwise_equal(outputs_of(model), expected)


def test_a_trained_base_gets_its_gradient():
    model = lora_model(dtype=torch.float64)
    model.requires_grad_(True)
    expected = outputs_of(model)
    assert any(name.endswith("q_proj.base_layer.weight") for name in expected)
    with patch(model, KEY):
        assert_close(expected, outputs_of(model), tolerance=1e-7)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model = lora_model(tiny_qwen3(), dtype=torch.float64).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()

    def gradients():
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    with patch(model, KEY):
        assert_close(expected, gradients(), tolerance=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_gives_the_dtypes_of_peft(dtype):
    model = lora_model(tiny_llama().to(dtype))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 5, 32).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(x)
        with patch(model, KEY):
            y = layer(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)


def test_autocast_leaves_fp64_alone():
    model = lora_model(dtype=torch.float64)
    x, layer = torch.randn(2, 32, dtype=torch.float64), attention_of(model).q_proj
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(x)
        with patch(model, KEY):
            torch.testing.assert_close(layer(x), expected)


def test_adapters_in_fp32_keep_their_precision_on_a_half_precision_base():
    """PEFT's default outside autocast: the low-rank products are made in fp32, and so are their gradients."""
    model = lora_model(tiny_llama().to(torch.bfloat16))
    assert model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.dtype == torch.float32
    with patch(model, KEY) as handle:
        assert len(handle) == 14


# --- the adapter is read at every call -------------------------------------------------------------------------------


def test_disable_merge_and_switch():
    model = lora_model(dtype=torch.float64)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "o_proj"], lora_alpha=5))
    randomize(model)
    plain = copy.deepcopy(model)

    def both(change):
        change(plain)
        change(model)
        torch.testing.assert_close(model(input_ids=IDS).logits, plain(input_ids=IDS).logits, rtol=1e-7, atol=1e-7)
        return model(input_ids=IDS).logits

    with patch(model, KEY):
        default = both(lambda m: None)
        with model.disable_adapter(), plain.disable_adapter():
            assert not torch.allclose(both(lambda m: None), default)
        assert not torch.allclose(both(lambda m: m.set_adapter("other")), default)
        torch.testing.assert_close(both(lambda m: m.set_adapter("default")), default)
        torch.testing.assert_close(both(lambda m: m.merge_adapter()), default, rtol=1e-6, atol=1e-6)
        both(lambda m: m.unmerge_adapter())
        assert_close(outputs_of(plain), outputs_of(model), tolerance=1e-7)


def test_merged_while_disabled_is_unmerged_as_peft_does():
    model = lora_model(dtype=torch.float64)
    with patch(model, KEY):
        model.merge_adapter()
        with model.disable_adapter():
            model(input_ids=IDS)
        assert not any(getattr(m, "merged", False) for m in model.modules() if hasattr(m, "lora_A"))


def test_mixed_batches_go_to_peft():
    model = lora_model().eval()
    expected = model(input_ids=IDS, adapter_names=["default", "__base__"]).logits
    with patch(model, KEY):
        assert torch.equal(model(input_ids=IDS, adapter_names=["default", "__base__"]).logits, expected)


@torch.no_grad()
def test_a_compiled_graph_contains_peft():
    model = lora_model(tiny_llama(num_hidden_layers=1)).eval()
    expected = model(input_ids=IDS).logits
    with patch(model, KEY):
        assert torch.equal(torch.compile(model, backend="eager")(input_ids=IDS).logits, expected)
    torch.compiler.reset()


def test_a_copy_has_its_own_siblings():
    model = lora_model()
    expected = outputs_of(model)
    with patch(model, KEY):
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert not twin(input_ids=IDS).logits.any()
        assert_close(expected, outputs_of(model), tolerance=1e-5)


# --- refused by name -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "q_proj: adapter 'default' is a DoraLinearVariant"),
        ({"lora_dropout": 0.1}, "q_proj: lora_dropout=0.1 of adapter 'default'. Set lora_dropout=0"),
    ],
)
def test_refused_when_applied(config, message):
    model = lora_model(**config).train()
    state = state_of(model)
    with pytest.raises(RefusedError, match=message):
        patch(model, KEY)
    assert state_of(model) == state


def test_a_bias_in_the_adapter_is_refused():
    model = lora_model(tiny_qwen3(attention_bias=True), target_modules=["q_proj"], lora_bias=True)
    with pytest.raises(RefusedError, match="adapter 'default' has a bias"):
        patch(model, KEY)


def test_dropout_acts_in_training_only():
    model = lora_model(lora_dropout=0.1).eval()
    expected = model(input_ids=IDS).logits
    with pytest.raises(RefusedError, match="lora_dropout=0.1"):  # the self-check runs in training mode too
        patch(model, KEY)
    with patch(model, KEY, verify=False):
        torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
        with pytest.raises(RefusedError, match="lora_dropout=0.1"):
            model.train()(input_ids=IDS)


def test_several_active_adapters_are_refused_when_applied_and_when_called():
    model = lora_model()
    model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear"))
    with patch(model, KEY):
        model.base_model.set_adapter(["default", "other"])
        with pytest.raises(RefusedError, match=r"q_proj: 2 adapters are active \(default, other\)"):
            model(input_ids=IDS)
    with pytest.raises(RefusedError, match="2 adapters are active"):
        patch(model, KEY)


def test_other_layers_are_refused():
    with pytest.raises(RefusedError, match="matches no module"):
        patch(lora_model(tiny_gpt2(), target_modules=["c_attn"], fan_in_fan_out=True), KEY)
    with pytest.raises(RefusedError, match=r"LlamaMLP is not PEFT's lora.Linear"):
        patch(lora_model(), {"*.mlp": FusedLoRALinear()})
    model = lora_model()
    attention_of(model).q_proj.base_layer.register_forward_hook(lambda *_: None)
    with pytest.raises(RefusedError, match="q_proj: its base layer has hooks"):
        patch(model, KEY)
    model = lora_model()
    with patch(model, KEY):
        attention_of(model).k_proj.lora_A["default"].register_forward_pre_hook(lambda *_: None)
        with pytest.raises(RefusedError, match="k_proj: adapter 'default' has hooks"):
            model(input_ids=IDS)


def test_siblings_argument():
    for wrong in ("q_proj", ["q_proj", "k_proj"]):
        with pytest.raises(ValueError, match="siblings=.* must be groups of names"):
            FusedLoRALinear(wrong)
    with patch(lora_model(), {"LoRALinear": FusedLoRALinear([["k_proj", "v_proj"]])}) as handle:
        layers = {row.name.rsplit(".", 1)[1]: row.layer for row in handle}
    assert layers["q_proj"] == "FusedLoRALinear x1" and layers["k_proj"] == layers["v_proj"] == "FusedLoRALinear x2"


def test_a_wrong_scale_is_seen_although_a_fresh_b_is_zero(monkeypatch):
    def wrong(x, linears):
        return fused_lora(x, [w._replace(scale=1.01 * w.scale) for w in linears])

    monkeypatch.setattr(module_under_test, "fused_lora", wrong)
    fresh = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(RefusedError, match="FusedLoRALinear x1 on .*q_proj: output 0 is off"):
        patch(fresh, KEY)
    assert not fresh.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.any()


def test_beside_other_patches():
    class SwiGLU(nn.Module):
        def forward(self, x):
            return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))

    model = lora_model(dtype=torch.float64)
    state, expected = state_of(model), outputs_of(model)
    with patch(model, {"SwiGLUMLP": SwiGLU}), patch(model, {"LoRALinear": "hf_effi"}):
        assert_close(expected, outputs_of(model), tolerance=1e-7)
    assert state_of(model) == state


def test_on_the_attention_beside_a_tiled_mlp():
    model = lora_model(dtype=torch.float64)
    expected = outputs_of(model)
    with patch(model, {"*.self_attn.*_proj": FusedLoRALinear(), "SwiGLUMLP": "hf_effi"}) as handle:
        assert {row.layer for row in handle} == {"FusedLoRALinear x3", "FusedLoRALinear x1", "TiledMLP"}
        assert_close(expected, outputs_of(model), tolerance=1e-7)
