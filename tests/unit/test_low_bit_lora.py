"""LoRA on an 8-bit base, as a patch: error against PEFT, bytes, what is saved, what comes back, and what is refused."""

from __future__ import annotations

import copy
import gc
import re

import pytest
import torch
from peft import LoraConfig
from torch import nn

from hf_effi import patch, unpatch
from hf_effi.kernels import KernelMismatchError, LowBitLoRALinear, PatchError, low_bit
from hf_effi.kernels.low_bit import FORMATS, LowBitWeight, quantize_rows
from tests.helpers import assert_bitwise_equal, tiny_llama, tiny_qwen3
from tests.unit.test_fused_lora import attention_of, lora_model, randomize, saved_bytes
from tests.unit.test_kernel_patch import IDS, four_bit_llama, outputs_of, state_of
from tests.unit.test_low_bit import relative

EACH_FORMAT = pytest.mark.parametrize("format", FORMATS)


def key(format, **options):
    return {"LoRALinear": LowBitLoRALinear(format, **options)}


def calm_model(**over):
    """A model whose gradients do not depend on every rounding, as those of a trained one do not."""
    model = lora_model(tiny_llama(hidden_size=64, intermediate_size=128, **over))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "base_layer" in name:
                parameter.mul_(0.2)
    return model


def bases_of(model):
    return {n: m.base_layer for n, m in model.named_modules() if hasattr(m, "lora_A")}


# --- against PEFT -----------------------------------------------------------------------------------------------------


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


# --- the adapter is read at every call --------------------------------------------------------------------------------


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
    with patch(model, key("int8")), pytest.raises(PatchError, match="passes .*'adapter_names'"):
        model(input_ids=IDS, adapter_names=["default", "__base__"])


# --- bytes ------------------------------------------------------------------------------------------------------------


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


# --- what is saved, loaded and copied ---------------------------------------------------------------------------------


def test_state_dict_holds_the_wide_weights():
    model = lora_model(tiny_llama().to(torch.bfloat16))
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with patch(model, key("fp8")):
        found = model.state_dict()
        assert list(found) == list(expected)
        assert_bitwise_equal(found, expected)


def test_adapters_are_saved_and_loaded_as_always(tmp_path):
    from peft import PeftModel
    from safetensors.torch import load_file

    model = lora_model()
    model.save_pretrained(tmp_path / "a")
    with patch(model, key("int8")):
        model.save_pretrained(tmp_path / "b")
        randomized = copy.deepcopy(model.state_dict())
        model.load_adapter(str(tmp_path / "a"), "default")
        assert_bitwise_equal(model.state_dict(), randomized)
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert_bitwise_equal(a, b)
    again = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "b"))
    assert torch.equal(again.eval()(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)


def test_the_whole_model_is_saved_wide(tmp_path):
    from safetensors.torch import load_file

    model = lora_model(tiny_llama(tie_word_embeddings=False))
    with patch(model, key("int8")):
        model.base_model.model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    for name, layer in bases_of(model).items():
        assert torch.equal(saved[name.removeprefix("base_model.model.") + ".base_layer.weight"], layer.weight)


def test_loading_base_weights_is_refused():
    model = lora_model()
    with (
        patch(model, key("int8")),
        pytest.raises(PatchError, match=r"base_layer\.weight cannot be loaded into a base of 8"),
    ):
        model.load_state_dict(model.state_dict())
    model.load_state_dict(model.state_dict())


def test_merging_is_refused_and_works_again_after():
    model = lora_model()
    with patch(model, key("int8")):
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(PatchError, match="q_proj: an adapter cannot be merged into a base of 8 bits. Revert"):
                merge()
    expected = model(input_ids=IDS).logits
    assert relative(model.merge_and_unload()(input_ids=IDS).logits, expected) < 1e-5


def test_unload_gives_the_wide_base_back():
    model = lora_model()
    wide = {name: layer.weight.detach().clone() for name, layer in bases_of(model).items()}
    with model.disable_adapter():
        expected = model(input_ids=IDS).logits
    handle = patch(model, key("int8"))
    base = model.unload()
    names = {name.removeprefix("base_model.model."): weight for name, weight in wide.items()}
    for name, weight in base.named_parameters():
        if name.removesuffix(".weight") in names:
            assert torch.equal(weight, names[name.removesuffix(".weight")])
    assert torch.equal(base(input_ids=IDS).logits, expected)
    handle.revert()
    assert torch.equal(base(input_ids=IDS).logits, expected)
    base.load_state_dict(base.state_dict())


def test_a_merged_adapter_is_refused():
    model = lora_model()
    model.merge_adapter()
    with pytest.raises(PatchError, match="merged into its base. Call unmerge_adapter"):
        patch(model, key("int8"))


def test_a_copy_has_its_own_base():
    model = lora_model()
    expected = model(input_ids=IDS).logits
    with patch(model, key("int8")):
        patched = model(input_ids=IDS).logits
        twin = copy.deepcopy(model)
    assert torch.equal(twin(input_ids=IDS).logits, patched)
    unpatch(twin)
    assert torch.equal(twin(input_ids=IDS).logits, expected) and torch.equal(model(input_ids=IDS).logits, expected)
    assert attention_of(twin).q_proj.base_layer.weight is not attention_of(model).q_proj.base_layer.weight


def test_a_model_cast_while_patched_comes_back_cast():
    model = lora_model()
    weight = attention_of(model).q_proj.base_layer.weight.detach().clone()
    with patch(model, key("int8")):
        model.to(torch.bfloat16)
    assert torch.equal(attention_of(model).q_proj.base_layer.weight, weight.to(torch.bfloat16))


def test_an_error_while_patched_brings_everything_back():
    model = lora_model()
    state, expected = state_of(model), outputs_of(model)
    with pytest.raises(RuntimeError, match="node lost"), patch(model, key("fp8")):
        raise RuntimeError("node lost")
    assert state_of(model) == state
    assert_bitwise_equal(outputs_of(model), expected)


def test_a_revert_without_room_can_be_tried_again():
    model = lora_model()
    state, expected = state_of(model), outputs_of(model)
    handle = patch(model, key("int8"))
    base = attention_of(model).k_proj.forward.func.__self__.bases[1]

    class Wide:
        def to(self, *args):
            raise torch.OutOfMemoryError("no room")

    wide, base.wide = base.wide, Wide()
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        handle.revert()
    assert handle.active and model(input_ids=IDS).logits.isfinite().all()
    base.wide = wide
    handle.revert()
    assert state_of(model) == state
    assert_bitwise_equal(outputs_of(model), expected)


# --- refused by name --------------------------------------------------------------------------------------------------


def refused(model, message, format="int8", pattern="LoRALinear"):
    state = state_of(model)
    with pytest.raises(PatchError, match=message):
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
        with pytest.raises(PatchError, match="q_proj: its base weight is trained"):
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
    raise PatchError("compute capability 8.0")


def test_other_layers_and_arguments_are_refused():
    refused(lora_model(), "LlamaMLP is not PEFT's lora.Linear", pattern="*.mlp")
    for wrong in ("fp4", None, 8, ""):
        with pytest.raises(PatchError, match=f"format={wrong!r} must be one of 'fp8', 'int8'"):
            LowBitLoRALinear(wrong)
    with pytest.raises(PatchError, match="siblings=.* must be groups"):
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


# --- which layers -----------------------------------------------------------------------------------------------------


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
    with pytest.raises(PatchError, match="in 8 bits by another patch.* put 8-bit bases last"):
        patch(model, {"LoRALinear": LowBitLoRALinear("int8"), "SwiGLUMLP": SwiGLU})
    assert state_of(model) == state


# --- wrong kernels are seen -------------------------------------------------------------------------------------------


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
        KernelMismatchError, match=f"LowBitLoRALinear {format} x3 on .*q_proj: {what} is off by .* of its norm"
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
    with pytest.raises(KernelMismatchError, match="gradient of .*lora_B.* is off by .* of its largest entry"):
        patch(lora_model(), key("fp8"))


def test_on_mismatch_eager_leaves_the_layer_wide(monkeypatch):
    model = lora_model()
    monkeypatch.setattr(low_bit, "_product", _product_without_scale)
    with patch(model, key("int8"), on_mismatch="eager") as handle:
        assert {row.layer for row in handle} == {"eager"}
        assert all(layer.weight.numel() for layer in bases_of(model).values())
