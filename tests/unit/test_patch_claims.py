"""One module belongs to one patch, whichever of the two kinds of handle came first; the loser changes nothing."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import re

import pytest
import torch

from hf_effi import patch, unpatch
from hf_effi.errors import RefusedError
from hf_effi.kernels import FusedLoRALinear, PatchHandle, TiledMLP, tile_mlp
from hf_effi.layers.random_ltd import TokenDropping, drop_layer_tokens
from hf_effi.memory import LayerModes, stream_layers, tile_loss
from hf_effi.patching.handle import Claim, claims_of
from tests.helpers import assert_bitwise_equal, tiny_llama
from tests.helpers.patches import IDS, SWIGLU, TorchLoss, TorchRMSNorm, TorchSwiGLU, outputs_of, state_of

MLP = {
    "tile_mlp": lambda model: tile_mlp(model, 2),
    "SwiGLUMLP": lambda model: patch(model, {"SwiGLUMLP": TorchSwiGLU}),
    "*.mlp": lambda model: patch(model, {"*.mlp": TiledMLP(2)}),
}
LOSS = {
    "tile_loss": tile_loss,
    "ForCausalLMLoss": lambda model: patch(model, {"ForCausalLMLoss": TorchLoss}),
}
LAYER = {
    "stream_layers": stream_layers,
    "drop_layer_tokens": lambda model: drop_layer_tokens(model, TokenDropping(seed=0)),
}
PLACES = {"model.layers.0.mlp": MLP, "_loss_function|the model": LOSS, "model.layers.1": LAYER}
CASES = [
    pytest.param(place, first, second, id=f"{first}, then {second}")
    for place, patches in PLACES.items()
    for first, second in itertools.permutations(patches, 2)
]


def model_of():
    return tiny_llama(num_hidden_layers=3)


@pytest.mark.parametrize(("place", "first", "second"), CASES)
def test_the_second_claim_names_the_module_and_the_first(place, first, second):
    model, patches = model_of(), PLACES[place]
    untouched = state_of(model)
    handle = patches[first](model)
    patched = state_of(model)
    with pytest.raises(RefusedError, match=rf"({place}).* by '{re.escape(first)}'"):
        patches[second](model)
    assert state_of(model) == patched, "the first patch is as it was"
    handle.revert()
    assert state_of(model) == untouched
    patches[second](model).revert()
    assert state_of(model) == untouched


def test_a_second_claim_puts_back_what_its_own_call_had_done():
    """Three of four layers are free: they must not stay patched."""
    model = tiny_llama(num_hidden_layers=4)
    inner = tile_mlp(model.model.layers[2])
    state = state_of(model)
    for second in (lambda: tile_mlp(model), lambda: patch(model, {"RMSNorm": TorchRMSNorm, "SwiGLUMLP": TorchSwiGLU})):
        with pytest.raises(RefusedError, match=r"model\.layers\.2\.mlp"):
            second()
        assert state_of(model) == state
    inner.revert()


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_handles_of_both_kinds_on_one_model_revert_in_any_order(order):
    model = model_of().train()
    state, expected = state_of(model), outputs_of(model)
    handles = [
        stream_layers(model, num_chunks=2),
        patch(model, {"RMSNorm": TorchRMSNorm, "rotary_pos_emb": SWIGLU["rotary_pos_emb"]}),
        tile_mlp(model, 2),
        tile_loss(model),
    ]
    for index in order:
        handles[index].revert()
    assert state_of(model) == state
    assert_bitwise_equal(outputs_of(model), expected)


def test_unpatch_takes_patches_of_both_kinds_off():
    model = model_of()
    state = state_of(model)
    lost = [tile_mlp(model), tile_loss(model), patch(model, {"RMSNorm": TorchRMSNorm})]
    unpatch(model)
    assert state_of(model) == state
    for handle in lost:
        handle.revert()
    assert state_of(model) == state


@pytest.mark.parametrize("apply", [MLP["tile_mlp"], MLP["SwiGLUMLP"], stream_layers, tile_loss])
def test_a_patched_model_is_not_pickled_without_its_patch(apply):
    """A pickle calls the class's forward again: the copy would be unpatched, and claimed."""
    model = model_of().eval()
    with apply(model):
        with pytest.raises(RefusedError, match="cannot be pickled. Revert the patch first"):
            pickle.dumps(model)
        twin = copy.deepcopy(model)
        assert torch.equal(twin(input_ids=IDS).logits, model(input_ids=IDS).logits)
        unpatch(twin)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert_bitwise_equal(outputs_of(again), outputs_of(model))


def test_a_claim_inside_a_tiled_mlp_is_named_at_the_first_call():
    from tests.helpers.lora import lora_model

    model = lora_model()
    with (
        tile_mlp(model),
        patch(model, {"LoRALinear": FusedLoRALinear()}),
        pytest.raises(RefusedError, match="gate_proj has hooks of its own .* or a patch"),
    ):
        model(input_ids=IDS)


def test_unpatch_sees_every_kind_of_patch():
    """
    One room makes them all, so that one function finds them: kernels, tiles, streams, dropped tokens, layer modes.
    """
    model = model_of()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    state = state_of(model)
    modes = LayerModes(model, "keep").apply()
    for patches in ([tile_mlp, tile_loss, stream_layers], [LAYER["drop_layer_tokens"], LOSS["ForCausalLMLoss"]]):
        for apply in patches:
            apply(model)
        unpatch(model)
        assert state_of(model) == state and not any(layer._forward_pre_hooks for layer in modes.layers)
        modes.undo()  # nothing is left to undo
        modes.apply()
    modes.undo()
    assert state_of(model) == state


@pytest.mark.parametrize("apply", [MLP["tile_mlp"], MLP["SwiGLUMLP"]])
def test_a_stranger_is_named_after_all_others_are_restored(apply):
    model = model_of()
    state = state_of(model)
    handle = apply(model)
    middle = model.model.layers[1].mlp
    ours = middle.forward
    middle.forward = lambda hidden: hidden
    with pytest.raises(
        RefusedError, match=r"could not restore: model\.layers\.1\.mlp\.forward was replaced by something"
    ):
        handle.revert()
    assert all("forward" not in model.model.layers[i].mlp.__dict__ for i in (0, 2))
    assert handle.active and handle.replaced == ("model.layers.1.mlp.forward",)
    middle.forward = ours
    handle.revert()
    assert state_of(model) == state and not handle.active


def test_an_undo_that_fails_leaves_its_claim_and_no_other():
    model = model_of()
    state = state_of(model)
    handle = PatchHandle("test")
    broken = [True]

    def undo():
        if broken:
            raise MemoryError("no room on the device")

    for index, layer in enumerate(model.model.layers):
        own = undo if index == 1 else None
        handle.hold(Claim(f"layers.{index}.mlp.forward", layer.mlp, "forward", layer.mlp.forward, "test", undo=own))
    with pytest.raises(MemoryError, match="no room on the device"):
        handle.revert()
    assert handle.replaced == ("layers.1.mlp.forward",)
    broken.clear()
    handle.revert()
    assert state_of(model) == state


def test_layers_with_modes_are_not_pickled_and_copies_have_them():
    model = model_of().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with LayerModes(model, "selective"):
        with pytest.raises(
            RefusedError, match=r"layer 0 is patched by \"layer mode 'selective'\", and a patched model cannot"
        ):
            pickle.dumps(model.model.layers[0])
        twin = copy.deepcopy(model)
    assert_bitwise_equal(outputs_of(twin), outputs_of(model))
    unpatch(twin)
    assert not claims_of(twin) and not any(layer._forward_pre_hooks for layer in twin.model.layers)
