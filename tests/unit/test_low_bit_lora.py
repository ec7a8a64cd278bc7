"""LoRA on an 8-bit base, as a patch: error against PEFT, adapters that change, and bytes."""

from __future__ import annotations

import gc

import pytest
import torch
from peft import LoraConfig
from torch import nn

from hf_effi import patch
from hf_effi.errors import RefusedError
from hf_effi.kernels.low_bit import FORMATS, LowBitWeight, quantize_rows
from tests.helpers import assert_bitwise_equal, tiny_llama, tiny_qwen3
from tests.helpers.lora import attention_of, lora_model, randomize, saved_bytes
from tests.helpers.patches import IDS, outputs_of, state_of
from tests.unit._low_bit_lora import EACH_FORMAT, bases_of, calm_model, key
from tests.unit.test_low_bit import relative

# --- against PEFT ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("format", "most"), [("fp8", 0.15), ("int8", 0.05)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_gradients_are_near_those_of_peft(format, most, dtype):
    model = calm_model().to(dtype)
    state, expected = state_of(model), outputs_of(model)
    with patch(model, key(format)):
        found = outputs_of(model)
    assert found.keys() == expected.keys()
    assert relative(found["loss"], expected["loss"]) < 0.01
    for name, truth in expected.items():
        assert relative(found[name], truth) < most, name
    assert state_of(model) == state
    assert_bitwise_equal(outputs_of(model), expected)


@EACH_FORMAT
@pytest.mark.parametrize(
    "config", [{"use_rslora": True, "lora_alpha": 3, "r": 5}, {"bias": "all"}, {"rank_pattern": {"k_proj": 2}}]
)
def test_configs(format, config):
    model = lora_model(tiny_qwen3(attention_bias=True), **config)
    layer, x = attention_of(model).k_proj, torch.randn(2, 5, 32)
    expected = layer(x)
    with patch(model, key(format)):
        found = layer(x)
        assert relative(found, expected) < FORMATS[format].error_budget
        found.sum().backward()
    assert layer.lora_B["default"].weight.grad is not None
    assert (layer.base_layer.bias.grad is not None) == (config.get("bias") == "all")


@EACH_FORMAT
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(format, reentrant):
    model = lora_model(tiny_qwen3()).train()
    model.enable_input_require_grads()

    def gradients():
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    with patch(model, key(format)):
        expected = gradients()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert_bitwise_equal(gradients(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_gives_the_dtypes_of_peft(dtype):
    model = lora_model(tiny_llama().to(dtype))
    layer, x = attention_of(model).q_proj, torch.randn(2, 5, 32).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(x)
        with patch(model, key("int8")):
            y = layer(x)
    assert y.dtype == expected.dtype == torch.bfloat16 and relative(y, expected) < 0.03


def test_x_is_rounded_once_for_its_siblings(monkeypatch):
    model, calls = lora_model(), []
    with patch(model, key("int8")):
        monkeypatch.setattr(
            "hf_effi.kernels.fused_lora.quantize_rows", lambda *args: calls.append(1) or quantize_rows(*args)
        )
        with torch.no_grad():
            model(input_ids=IDS)
    assert len(calls) == 2 * (1 + 1 + 1 + 1), "qkv, o, gate and up, down of two layers"


@torch.no_grad()
def test_a_compiled_model_leaves_the_graph_here():
    model = lora_model(tiny_llama(num_hidden_layers=1)).eval()
    with patch(model, key("int8")):
        expected = model(input_ids=IDS).logits
        assert torch.equal(torch.compile(model, backend="eager")(input_ids=IDS).logits, expected)
    torch.compiler.reset()


# --- the adapter is read at every call -------------------------------------------------------------------------------


@EACH_FORMAT
def test_a_disabled_adapter_leaves_the_low_bit_base(format):
    model = lora_model(tiny_qwen3(attention_bias=True)).eval()
    layer, x = attention_of(model).q_proj, torch.randn(2, 5, 32)
    weight, bias = layer.base_layer.weight.detach().clone(), layer.base_layer.bias
    with patch(model, key(format)):
        with model.disable_adapter():
            found = layer(x)
            reference = model(input_ids=IDS).logits
    rounded = LowBitWeight.of(weight, format)
    expected = rounded.product(quantize_rows(x.view(10, 32), format), torch.float32) + bias
    torch.testing.assert_close(found.view(10, 32), expected)
    fresh = lora_model(tiny_qwen3(attention_bias=True)).eval()
    for module in fresh.modules():
        if hasattr(module, "lora_B"):
            nn.init.zeros_(module.lora_B["default"].weight)
    with patch(fresh, key(format)):
        assert torch.allclose(fresh(input_ids=IDS).logits, reference, atol=1e-5), "the policy before its first step"


def test_switching_adapters():
    model = lora_model()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "o_proj"], lora_alpha=5))
    randomize(model)
    with patch(model, key("int8")):
        default = model(input_ids=IDS).logits
        model.set_adapter("other")  # k and v have none of this name: the base alone, beside q in one group
        other = model(input_ids=IDS).logits
        model.set_adapter("default")
        assert torch.equal(model(input_ids=IDS).logits, default) and not torch.allclose(other, default)
    model.set_adapter("other")
    assert relative(other, model(input_ids=IDS).logits) < 0.1


def test_adapters_by_row_are_refused():
    model = lora_model().eval()
    with patch(model, key("int8")), pytest.raises(RefusedError, match="passes .*'adapter_names'"):
        model(input_ids=IDS, adapter_names=["default", "__base__"])


# --- bytes -----------------------------------------------------------------------------------------------------------


@EACH_FORMAT
def test_one_byte_a_parameter_and_four_a_row_stay_on_the_device(format):
    model = lora_model(tiny_llama().to(torch.bfloat16))
    wide = sum(layer.weight.nbytes for layer in bases_of(model).values())
    rows = sum(layer.weight.shape[0] for layer in bases_of(model).values())
    storages = {n: layer.weight.untyped_storage().data_ptr() for n, layer in bases_of(model).items()}
    with patch(model, key(format)):
        assert sum(layer.weight.untyped_storage().nbytes() for layer in bases_of(model).values()) == 0
        groups = {
            id(m.forward.func.__self__): m.forward.func.__self__ for m in model.modules() if hasattr(m, "lora_A")
        }
        low = sum(base.low.nbytes for group in groups.values() for base in group.bases)
        assert low == wide // 2 + 4 * rows
    assert {n: layer.weight.untyped_storage().data_ptr() for n, layer in bases_of(model).items()} == storages


def test_the_wide_weight_has_one_owner_while_patched():
    """Nothing but the patch holds it: on a GPU its memory is free as soon as the copy in host memory is made."""
    model = lora_model(tiny_llama().to(torch.bfloat16))
    layer = attention_of(model).q_proj
    with patch(model, key("int8")):
        base = layer.forward.func.__self__.bases[0]
        same = base.wide.untyped_storage().data_ptr()
        tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter)]
        owners = [t for t in tensors if t.device.type == "cpu" and t.untyped_storage().data_ptr() == same]
        assert len(owners) == 1 and owners[0] is base.wide


def test_what_is_kept_for_the_backward():
    """`x` once and `U`, as without 8 bits: weights are no activations, so that offloading does not move them."""
    model, tokens = lora_model(tiny_llama().to(torch.bfloat16)), 64
    attention = attention_of(model)
    x = 1 * torch.randn(1, tokens, 32).to(torch.bfloat16).requires_grad_()
    with patch(model, key("fp8")):
        kept = saved_bytes(model, lambda: [p(x) for p in (attention.q_proj, attention.k_proj, attention.v_proj)])
    assert kept == tokens * 32 * 2 + tokens * 3 * 4 * 4
