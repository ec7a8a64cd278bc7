"""Layers, attention, caches, LoRA and operators have the parts that patches and memory methods use."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from hf_effi._compat import CACHE_ARGUMENT
from tests.contract._seams import OPERATORS
from tests.contract._upstream import resolve
from tests.helpers import (
    tiny_qwen3,
)

# --- the tables are complete ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", OPERATORS)
def test_operators_of_torch(operator):
    importlib.import_module("torch.nn.attention.varlen")
    namespace, _, name = operator.partition(".")
    schema = getattr(getattr(torch.ops, namespace), name).default._schema
    assert " ".join(argument.name for argument in schema.arguments) == OPERATORS[operator]


def test_models_say_whether_they_hand_arguments_to_their_attention():
    assert resolve("transformers:PreTrainedModel")._supports_attention_backend is False
    assert tiny_qwen3()._supports_attention_backend is True
    assert tiny_qwen3(attn_implementation="eager").config._attn_implementation == "eager"


# --- layers and attention ------------------------------------------------------------------------------------------


def test_layers_checkpoint_through_a_function_of_their_own():
    """What LayerModes replaces: read at every forward, called with the forward and its positional inputs."""
    model = tiny_qwen3(use_cache=False).train()
    model.activation_checkpointing_enable()
    layers = model.model.layers
    found = layers[0]._gradient_checkpointing_func
    assert found.func is torch.utils.checkpoint.checkpoint and found.keywords == {"use_reentrant": False}
    calls = []

    def mine(function, *args):
        calls.append([tuple(arg.shape) for arg in args])
        return function(*args)

    layers[1]._gradient_checkpointing_func = mine
    ids = torch.arange(8)[None]
    model(input_ids=ids)
    model.activation_checkpointing_disable()
    assert layers[1]._gradient_checkpointing_func is not mine and not layers[1].gradient_checkpointing
    model(input_ids=ids)
    assert calls == [[(1, 8, 32)]]


def test_attention_that_is_in_no_mask_table_gets_no_mask():
    """Why the planner's trace has fused causal attention."""
    attention = resolve("transformers.modeling_utils:AttentionInterface")
    assert isinstance(attention._global_mapping, dict)
    masks = []

    def spy(module, query, key, value, attention_mask, **kwargs):
        masks.append(attention_mask)
        assert kwargs["position_ids"].shape == (1, 8), "position_ids reach the attention"
        return query.transpose(1, 2), None

    attention.register("hf_effi_spy", spy)
    try:
        model = tiny_qwen3()
        model.set_attn_implementation("hf_effi_spy")
        model(input_ids=torch.arange(8)[None], attention_mask=torch.tensor([[0] + [1] * 7]))
    finally:
        attention._global_mapping.pop("hf_effi_spy")
    assert masks == [None, None]


def test_models_say_whether_they_have_fused_attention():
    from transformers import AutoModelForCausalLM, Gemma2Config, Qwen3Config

    mapping = AutoModelForCausalLM._model_mapping
    assert mapping[Qwen3Config]._supports_sdpa and not mapping[Gemma2Config]._supports_sdpa


# --- what tiled and chunked computation leans on -------------------------------------------------------------------


def test_the_loss_of_a_model_can_be_set_on_its_instance():
    model = tiny_qwen3()
    assert model.loss_function.__name__ == "ForCausalLMLoss" and "_loss_function" not in model.__dict__
    model.__dict__["_loss_function"] = marker = object()
    assert model.loss_function is marker


def test_a_decoder_layer_reads_its_own_checkpointing_flag():
    model = tiny_qwen3().train()
    model.activation_checkpointing_enable()
    layer = model.model.layers[0]
    assert layer.gradient_checkpointing is True
    layer._gradient_checkpointing_func = None
    with pytest.raises(TypeError):
        model(torch.ones(1, 2, dtype=torch.long))
    layer.__dict__["gradient_checkpointing"] = False
    model(torch.ones(1, 2, dtype=torch.long))


def test_attention_takes_its_keys_from_a_cache_of_any_class():
    calls = []

    class Cache:
        def update(self, keys, values, layer_idx, *args, **kwargs):
            calls.append((tuple(keys.shape), layer_idx))
            return keys, values

    layer = tiny_qwen3().model.layers[1]
    cos = torch.ones(1, 3, 8)
    layer(torch.zeros(1, 3, 32), position_embeddings=(cos, 0 * cos), **{CACHE_ARGUMENT: Cache()})
    assert calls == [((1, 2, 3, 8), 1)]


def test_a_dynamic_cache_keeps_the_graph_of_what_it_is_given():
    from transformers import DynamicCache

    cache, keys = DynamicCache(), torch.ones(1, 2, 3, 4, requires_grad=True)
    cache.update(keys, keys, 0)
    cache.update(2 * keys, keys, 0)
    assert cache.layers[0].keys.shape == (1, 2, 6, 4)
    cache.layers[0].keys[..., 3:, :].sum().backward()
    assert torch.equal(keys.grad, torch.full_like(keys, 2.0))


def test_lora_layers_have_these_parts():
    from peft import LoraConfig, get_peft_model

    layer = (
        get_peft_model(tiny_qwen3(), LoraConfig(target_modules=["up_proj"]))
        .base_model.model.model.layers[0]
        .mlp.up_proj
    )
    for name in ("base_layer", "lora_A", "lora_B", "lora_dropout", "scaling", "lora_variant", "active_adapters"):
        assert hasattr(layer, name), name
    assert (
        layer.merged is False and layer.disable_adapters is False and callable(layer.unmerge) and callable(layer.merge)
    )
    assert isinstance(layer.scaling["default"], (int, float)) and layer.active_adapters == ["default"]


def test_torch_multiplies_rows_of_eight_bits():
    names = [argument.name for argument in torch.ops.aten._scaled_mm.default._schema.arguments]
    assert names[:4] == ["self", "mat2", "scale_a", "scale_b"] and {"out_dtype", "use_fast_accum"} <= set(names)
    ones = torch.ones(8, 8, dtype=torch.int8)
    assert torch.equal(torch._int_mm(ones, ones.t()), torch.full((8, 8), 8, dtype=torch.int32))


def test_peft_keeps_osfs_directions_where_the_callback_finds_them():
    """`effective_rank` is what is kept; kept directions are stored only where those of the start do not tell them."""
    from peft import OSFConfig, get_peft_model, get_peft_model_state_dict

    config = OSFConfig(target_modules=["up_proj", "down_proj"], effective_rank=5)
    model = get_peft_model(tiny_qwen3(num_hidden_layers=1), config)
    stored = get_peft_model_state_dict(model)  # the trained directions alone
    assert len(stored) == 6 and all("osf_svd_params" in name for name in stored)
    mlp = model.base_model.model.model.layers[0].mlp
    up, down = mlp.up_proj, mlp.down_proj  # 128 x 32 and 32 x 128
    assert up._osf_U_high["default"].shape == (128, 5) and "default" not in up._osf_V_high
    assert down._osf_V_high["default"].shape == (5, 128) and "default" not in down._osf_U_high
    assert up.osf_svd_params["default"]["U_low"].shape == up._osf_U_low_init["default"].shape == (128, 27)
    assert down.osf_svd_params["default"]["V_low"].shape == down._osf_V_low_init["default"].shape == (27, 128)
    assert len(up.hook_handles) == 2 and up.merged_adapters == [] and up.effective_rank["default"] == 5
    with pytest.raises(NotImplementedError, match="unmerging"):
        get_peft_model(tiny_qwen3(num_hidden_layers=1), config).unmerge_adapter()


def test_peft_keeps_adaloras_state_where_the_callback_finds_it():
    from peft import AdaLoraConfig, get_peft_model

    config = AdaLoraConfig(init_r=2, target_r=1, total_step=3, target_modules=["q_proj"])
    adapter = get_peft_model(tiny_qwen3(num_hidden_layers=1), config).base_model
    assert adapter.trainable_adapter_name == "default" and adapter.peft_config["default"] is config
    allocator = adapter.rankallocator
    assert allocator.peft_config is config and allocator.adapter_name == "default"
    assert allocator.init_bgt == 2 and allocator.target_bgt == 1
    assert allocator.ipt == allocator.exp_avg_ipt == allocator.exp_avg_unc == {}
    assert config.rank_pattern is None


def test_no_stock_trainer_moves_adaloras_ranks():
    """When upstream begins to, `AdaLoRACallback` would do it twice and has to go."""
    import accelerate
    import transformers
    import trl

    callers = [
        path
        for package in (transformers, trl, accelerate)
        for path in Path(package.__file__).parent.rglob("*.py")
        if "update_and_allocate" in path.read_text(encoding="utf-8")
    ]
    assert callers == []
