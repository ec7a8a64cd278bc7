"""Which layers a base of eight bits takes, and what it refuses by name, wrong kernels among it."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from hf_effi import patch
from hf_effi.errors import RefusedError
from hf_effi.kernels import LowBitLoRALinear, low_bit
from hf_effi.kernels.low_bit import FORMATS, quantize_rows
from tests.helpers import assert_bitwise_equal, tiny_llama, tiny_qwen3
from tests.helpers.lora import attention_of, lora_model
from tests.helpers.patches import IDS, four_bit_llama, outputs_of, state_of
from tests.unit._low_bit_lora import EACH_FORMAT, bases_of, key
from tests.unit.test_low_bit import relative

# --- refused by name -------------------------------------------------------------------------------------------------


def refused(model, message, format="int8", pattern="LoRALinear"):
    state = state_of(model)
    with pytest.raises(RefusedError, match=message):
        patch(model, {pattern: LowBitLoRALinear(format)})
    assert state_of(model) == state


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "q_proj: adapter 'default' is a DoraLinearVariant"),
        ({"lora_dropout": 0.1}, "q_proj: lora_dropout=0.1"),
        ({"lora_bias": True, "target_modules": ["q_proj"]}, "has a bias. Set lora_bias=False"),
    ],
)
def test_refused_adapters(config, message):
    refused(lora_model(tiny_qwen3(attention_bias=True), **config).train(), message)


def test_a_trained_base_is_refused_when_applied_and_when_called():
    model = lora_model()
    weight = attention_of(model).q_proj.base_layer.weight
    with patch(model, key("int8")):
        weight.requires_grad_(True)
        with pytest.raises(RefusedError, match="q_proj: its base weight is trained"):
            model(input_ids=IDS)
    refused(model, "q_proj: its base weight is trained, and 8 bits take no updates. Freeze it")


def test_four_bit_and_meta_bases_are_refused(tmp_path):
    refused(four_bit_llama(tmp_path), "q_proj: its base layer is a Linear4bit; torch.nn.Linear works")
    model = lora_model()
    attention_of(model).q_proj.base_layer.to("meta")
    refused(model, "q_proj: its weight is sharded or offloaded")


@pytest.mark.parametrize(("format", "size"), [("fp8", 24), ("int8", 20)])
def test_sizes_that_a_gpu_cannot_multiply_are_refused(format, size):
    model = lora_model(tiny_llama(intermediate_size=size))
    multiple = FORMATS[format].multiple
    refused(model, rf"gate_proj: its sizes \({size}, 32\) must be multiples of {multiple} for {format}", format)
    with patch(model, {"*.self_attn.*_proj": LowBitLoRALinear(format)}) as handle:
        assert len(handle) == 8


def test_a_gpu_without_the_format_is_refused(monkeypatch):
    monkeypatch.setattr("hf_effi.kernels.low_bit_lora.check_device", _no_fp8)
    refused(lora_model(), "compute capability 8.0", "fp8")


def _no_fp8(format, device):
    raise RefusedError("compute capability 8.0")


def test_other_layers_and_arguments_are_refused():
    refused(lora_model(), "LlamaMLP is not PEFT's lora.Linear", pattern="*.mlp")
    for wrong in ("fp4", None, 8, ""):
        with pytest.raises(ValueError, match=f"format={wrong!r} must be one of 'fp8', 'int8'"):
            LowBitLoRALinear(wrong)
    with pytest.raises(ValueError, match="siblings=.* must be groups"):
        LowBitLoRALinear("int8", siblings="q_proj")


def test_a_weight_with_outliers_is_refused_by_its_name():
    """One entry 60 times the others in a row of 1024 takes nearly all steps of int8; e4m3 keeps 3 bits of each."""
    model = lora_model(tiny_llama(num_hidden_layers=3, intermediate_size=1024))
    layer = model.base_model.model.model.layers[2].mlp.down_proj.base_layer
    with torch.no_grad():
        layer.weight[:, 3] = 60 * layer.weight.std()
    refused(model, r"layers\.2\.mlp\.down_proj: its weight is off by \d+\.\d% in int8, and 4% are allowed")
    rest = re.compile(r".*layers\.(?!2\.mlp\.down_proj).*_proj")
    with patch(model, {rest: LowBitLoRALinear("int8")}) as handle:
        assert len(handle) == 20
    with patch(model, key("fp8")) as handle:
        assert len(handle) == 21


def test_a_weight_with_nan_is_refused():
    model = lora_model(target_modules=["down_proj"])
    with torch.no_grad():
        model.base_model.model.model.layers[1].mlp.down_proj.base_layer.weight[2, 2] = torch.nan
    refused(model, r"layers\.1\.mlp\.down_proj: its weight is off by nan")


# --- which layers ----------------------------------------------------------------------------------------------------


def test_the_output_head_stays_wide():
    model = lora_model(tiny_llama(tie_word_embeddings=False), target_modules=["q_proj", "lm_head", "embed_tokens"])
    with patch(model, key("int8")) as handle:
        assert {row.name.rpartition(".")[2] for row in handle} == {"q_proj"}
        assert model.base_model.model.lm_head.base_layer.weight.numel()
    refused(model, "leaves the output head as it is", pattern="*.lm_head")


def test_first_and_last_layer_stay_wide_by_a_pattern():
    model = lora_model(tiny_llama(num_hidden_layers=4))
    inner = re.compile(r".*\.layers\.(?!0\.|3\.)\d+\..*_proj")
    with patch(model, {inner: LowBitLoRALinear("fp8")}) as handle:
        assert {re.search(r"layers\.(\d+)", row.name)[1] for row in handle} == {"1", "2"}
        assert "LowBitLoRALinear fp8 x3" in str(handle)


@EACH_FORMAT
def test_the_name_of_the_format_is_a_source(format):
    model = lora_model()
    with patch(model, {"LoRALinear": format}) as handle:
        assert {row.layer for row in handle} == {f"LowBitLoRALinear {format} x{n}" for n in (1, 2, 3)}


def test_beside_other_patches():
    class SwiGLU(nn.Module):
        def forward(self, x):
            return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))

    model = lora_model()
    state, expected = state_of(model), outputs_of(model)
    with patch(model, {"SwiGLUMLP": SwiGLU, "LoRALinear": LowBitLoRALinear("int8")}) as handle:
        assert len(handle) == 2 + 14
        assert_bitwise_equal(outputs_of(model), int8_outputs := outputs_of(model))
        assert relative(int8_outputs["loss"], expected["loss"]) < 0.01
    with pytest.raises(RefusedError, match="in 8 bits by another patch.* put 8-bit bases last"):
        patch(model, {"LoRALinear": LowBitLoRALinear("int8"), "SwiGLUMLP": SwiGLU})
    assert state_of(model) == state


# --- wrong kernels are seen ------------------------------------------------------------------------------------------


def _product_without_scale(left, right, right_scale, dtype):
    return _REAL(left, right, None, dtype)


def _product_off_by_six_percent(left, right, right_scale, dtype):
    return 1.06 * _REAL(left, right, right_scale, dtype)


def _coarse(x, format, column_scale=None):
    rows = quantize_rows(x, format, column_scale)
    return rows._replace(values=(rows.values.float() / 64).round().mul(64).to(rows.values.dtype))


def _scale_not_folded(x, format, column_scale=None):
    return quantize_rows(x, format)


_REAL = low_bit._product


@pytest.mark.parametrize(
    ("name", "wrong", "what"),
    [
        ("_product", _product_without_scale, "output 0"),
        ("_product", _product_off_by_six_percent, "output 0"),
        ("quantize_rows", _coarse, "output 0"),
        ("quantize_rows", _scale_not_folded, "gradient of input 0"),
    ],
)
@EACH_FORMAT
def test_a_wrong_kernel_is_refused(monkeypatch, format, name, wrong, what):
    model = lora_model()
    state = state_of(model)
    monkeypatch.setattr(low_bit, name, wrong)
    with pytest.raises(
        RefusedError, match=f"LowBitLoRALinear {format} x3 on .*q_proj: {what} is off by .* of its norm"
    ):
        patch(model, key(format))
    assert state_of(model) == state


def test_a_wrong_adapter_gradient_gets_no_budget(monkeypatch):
    """`dB = s dy^T U` is made in full precision: 2 % off is wrong, although a product may be off by more."""
    from hf_effi.kernels import fused_lora as module

    real = module._backward

    def wrong(*args):
        grad_x, *rest = real(*args)
        return grad_x, *(g if i % 4 != 1 or g is None else 1.02 * g for i, g in enumerate(rest))

    monkeypatch.setattr(module, "_backward", wrong)
    with pytest.raises(RefusedError, match="gradient of .*lora_B.* is off by .* of its largest entry"):
        patch(lora_model(), key("fp8"))


def test_on_mismatch_eager_leaves_the_layer_wide(monkeypatch):
    model = lora_model()
    monkeypatch.setattr(low_bit, "_product", _product_without_scale)
    with patch(model, key("int8"), on_mismatch="eager") as handle:
        assert {row.layer for row in handle} == {"eager"}
        assert all(layer.weight.numel() for layer in bases_of(model).values())
