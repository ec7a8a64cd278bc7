"""What is saved, loaded, copied and given back while a base of eight bits is in place."""

from __future__ import annotations

import copy

import pytest
import torch

from hf_effi import patch, unpatch
from hf_effi.errors import RefusedError
from tests.helpers import assert_bitwise_equal, tiny_llama
from tests.helpers.lora import attention_of, lora_model
from tests.helpers.patches import IDS, outputs_of, state_of
from tests.unit._low_bit_lora import bases_of, key
from tests.unit.test_low_bit import relative


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
        pytest.raises(RefusedError, match=r"base_layer\.weight cannot be loaded into a base of 8"),
    ):
        model.load_state_dict(model.state_dict())
    model.load_state_dict(model.state_dict())


def test_merging_is_refused_and_works_again_after():
    model = lora_model()
    with patch(model, key("int8")):
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(
                RefusedError, match="q_proj: an adapter cannot be merged into a base of 8 bits. Revert"
            ):
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
    with pytest.raises(RefusedError, match="merged into its base. Call unmerge_adapter"):
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
