"""Modes of decoder layers: gradients to the bit, what is recomputed, what is moved, and nothing left behind."""

from __future__ import annotations

import contextlib
import gc
import random
from collections import Counter

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from hf_effi import unpatch
from hf_effi.errors import RefusedError
from hf_effi.functional.layer_plan import MODES
from hf_effi.functional.saved_bytes import SavedBytes
from hf_effi.memory.layer_modes import LayerModes, decoder_layers, is_attention_op, selective_contexts
from hf_effi.memory.layer_profile import LayerProbe, measure_copy_bandwidth
from hf_effi.memory.offload import ActivationOffloader
from tests.helpers import assert_bitwise_equal, tiny_gemma, tiny_llama, tiny_qwen3

LAYERS = 4
TOKENS = torch.arange(2 * 24).view(2, 24) % 40
INPUT_BYTES = 2 * 24 * 32 * 4


def checkpointed(make=tiny_qwen3, **over):
    model = make(num_hidden_layers=LAYERS, use_cache=False, **over).train()
    model.activation_checkpointing_enable()
    return model


def backward(model, times=1):
    for _ in range(times):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


class Ops(TorchDispatchMode):
    """Counts dispatched operators."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count["attention" if is_attention_op(func) else func.name()] += 1
        return func(*args, **(kwargs or {}))


def state_of(model):
    return [
        (id(layer), dict(layer.__dict__), list(layer._forward_pre_hooks), list(layer._forward_hooks))
        for layer in model.modules()
    ]


@pytest.mark.parametrize("make", [tiny_qwen3, tiny_llama, tiny_gemma])
@pytest.mark.parametrize("modes", [*MODES, ["offload", "offload", "selective", "keep"]], ids=str)
def test_gradients_to_the_bit_and_undone_exactly(make, modes):
    expected = backward(checkpointed(make))
    model = checkpointed(make)
    before = state_of(model)
    with LayerModes(model, modes):
        found = backward(model)
    assert_bitwise_equal(expected, found, "gradients")
    assert state_of(model) == before


def test_offload_moves_the_layer_inputs_and_reuses_its_buffers():
    model = checkpointed()
    with LayerModes(model, "offload") as modes:
        backward(model, times=3)
    stats = modes.offloader.stats
    assert stats.offloaded_bytes == stats.restored_bytes == 3 * LAYERS * INPUT_BYTES
    assert (stats.buffers_allocated, stats.buffers_reused) == (LAYERS, 2 * LAYERS)
    assert (stats.host_bytes, stats.host_bytes_in_use) == (LAYERS * INPUT_BYTES, 0)
    # One layer ahead: only the last layer, where the backward pass begins, has to wait.
    assert (stats.prefetched, stats.waited) == (3 * (LAYERS - 1), 3)


def test_offloaded_inputs_are_freed():
    for modes, freed in (("checkpoint", [False] * LAYERS), (["offload"] * 3 + ["checkpoint"], [True] * 3 + [False])):
        model = checkpointed()
        inputs = []
        for layer in decoder_layers(model):
            layer.register_forward_pre_hook(
                lambda _, args, kept=inputs: kept.append(StorageWeakRef(args[0].untyped_storage()))
            )
        with LayerModes(model, modes):
            loss = model(input_ids=TOKENS, labels=TOKENS).loss
            assert [storage.expired() for storage in inputs] == freed
            loss.backward()


def test_two_forwards_before_two_backwards():
    expected = backward(checkpointed(), times=2)
    model = checkpointed()
    with LayerModes(model, "offload") as modes:
        losses = [model(input_ids=TOKENS, labels=TOKENS).loss for _ in range(2)]
        assert modes.offloader.stats.host_bytes_in_use == 2 * LAYERS * INPUT_BYTES
        for loss in losses:
            loss.backward()
    assert_bitwise_equal(expected, {name: p.grad for name, p in model.named_parameters()}, "gradients")
    assert modes.offloader.stats.host_bytes_in_use == 0


def test_backward_twice_through_one_graph():
    expected = backward(checkpointed(), times=2)
    model = checkpointed()
    with LayerModes(model, "offload") as modes:
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward(retain_graph=True)
        loss.backward()
        del loss
    assert_bitwise_equal(expected, {name: p.grad for name, p in model.named_parameters()}, "gradients")
    assert modes.offloader.stats.host_bytes_in_use == 0


class Broken(RuntimeError):
    pass


def _fail(*_):
    raise Broken


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_nothing_is_left_after_an_exception(where):
    model = checkpointed()
    before = state_of(model)
    with LayerModes(model, "offload") as modes:
        if where == "forward":
            hook = model.model.norm.register_forward_pre_hook(_fail)
        else:
            # The gradient of a middle layer arrives in the middle of the backward pass.
            weight = model.model.layers[1].mlp.up_proj.weight
            hook = weight.register_hook(_fail)
        with contextlib.suppress(Broken):  # unlike pytest.raises it keeps no traceback, and with it no graph
            backward(model)
            pytest.fail("nothing was raised")
        # Autograd's queue holds the graph of a failed backward pass until the next one begins.
        torch.ones(1, requires_grad=True).sum().backward()
        gc.collect()
        assert modes.offloader.stats.host_bytes_in_use == 0
        hook.remove()
        model.zero_grad()
        found = backward(model)
        assert modes.offloader.stats.buffers_reused >= LAYERS - 1
    assert_bitwise_equal(backward(checkpointed()), found, "gradients")
    if where == "forward":
        assert state_of(model) == before


def test_growing_batches_replace_buffers_instead_of_piling_them_up():
    offloader = ActivationOffloader()
    for length in (2, 5, 3, 9):
        x = torch.ones(length, requires_grad=True)
        with offloader.saving():
            y = x.exp().square().sum()
        y.backward()
        del y
    assert offloader.stats.host_bytes_in_use == 0
    assert offloader.stats.host_bytes == 9 * 4 * 2  # exp's and square's input: one tensor each, saved by two nodes
    assert offloader.stats.buffers_reused > 0


def test_parameters_and_tensors_without_gradient_stay():
    offloader = ActivationOffloader()
    x, weight = torch.ones(3, requires_grad=True), torch.nn.Parameter(torch.ones(3))
    with offloader.saving():
        y = (x * 2 * weight * torch.ones(3)).sum()
    assert offloader.stats.offloaded_bytes == 12  # of the product with `weight` only its other factor
    y.backward()


@pytest.mark.parametrize(
    "make",
    [lambda x: x.transpose(0, 1), lambda x: x[:, 1:], lambda x: x[:, ::2], lambda x: x[..., :3].permute(2, 0, 1)],
    ids=["transposed", "part", "every second", "permuted part"],
)
def test_strides_come_back(make):
    """
    A recomputation reads them: LED's encoder hands on transposed states, and a product of them is another operator.
    """
    offloader, seen = ActivationOffloader(), []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sum()

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            seen.append(x)
            return grad.expand_as(x)

    x = make(torch.randn(4, 6, 5, requires_grad=True) * 1)
    with offloader.saving():
        Look.apply(x).backward()
    assert offloader.stats.offloaded_bytes == x.numel() * 4
    assert seen[0].stride() == x.stride() and torch.equal(seen[0], x)


def test_an_expanded_tensor_stays():
    offloader, x = ActivationOffloader(), torch.randn(1, 5, requires_grad=True)
    with offloader.saving():
        out = (x * 1).expand(1000, 5).sin().sum()
    out.backward()
    assert offloader.stats.offloaded_bytes == 0
    torch.testing.assert_close(x.grad, 1000 * x.detach().cos())


def test_selective_keeps_attention_and_recomputes_the_rest():
    counts = {}
    for modes in ("checkpoint", "selective", "keep"):
        model = checkpointed()
        with LayerModes(model, modes):
            loss = model(input_ids=TOKENS, labels=TOKENS).loss
            with Ops() as ops:
                loss.backward()
        counts[modes] = ops.count
    forward_ops = {mode: count["attention"] - counts["keep"]["attention"] for mode, count in counts.items()}
    assert forward_ops == {"checkpoint": LAYERS, "selective": 0, "keep": 0}
    assert counts["selective"]["aten::silu"] == counts["checkpoint"]["aten::silu"] == LAYERS
    assert counts["keep"]["aten::silu"] == 0


def test_selective_saves_further_operators():
    model = checkpointed()
    with LayerModes(model, "selective", save_ops=[torch.ops.aten.silu]):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        with Ops() as ops:
            loss.backward()
    assert ops.count["aten::silu"] == 0
    with pytest.raises(ValueError, match=r"save_ops holds 'silu'"):
        selective_contexts(["silu"])


def test_varlen_operator_counts_as_attention():
    from torch.nn.attention import varlen  # noqa: F401  registers the operator

    assert is_attention_op(torch.ops.torch_attn._varlen_attn.default)
    assert not is_attention_op(torch.ops.torch_attn._varlen_attn_backward.default)
    assert not is_attention_op(torch.ops.aten.mm.default)


def test_switching_checkpointing_off_and_on_keeps_the_modes():
    """TRL does this around each generation."""
    model = checkpointed()
    with LayerModes(model, "offload") as modes:
        model.activation_checkpointing_disable()
        backward(model)
        assert modes.offloader.stats.offloaded_bytes == 0, "off means off"
        model.activation_checkpointing_enable()
        backward(model)
        assert modes.offloader.stats.offloaded_bytes == LAYERS * INPUT_BYTES
    backward(model)
    assert modes.offloader.stats.offloaded_bytes == LAYERS * INPUT_BYTES


def test_errors_name_the_fix():
    model = tiny_qwen3().train()
    with pytest.raises(RefusedError, match="activation_checkpointing=True"):
        LayerModes(model, "keep")
    with pytest.raises(RefusedError, match="no GradientCheckpointingLayer"):
        LayerModes(torch.nn.Linear(2, 2), "keep")
    model = checkpointed()
    with pytest.raises(ValueError, match=r"\['kept'\]. Known: keep, selective, checkpoint, offload"):
        LayerModes(model, "kept")
    with pytest.raises(ValueError, match="3 modes for 4 layers"):
        LayerModes(model, ["keep"] * 3)
    with LayerModes(model, "offload"), pytest.raises(RefusedError, match="already has the mode 'offload'"):
        LayerModes(model, "keep").apply()
    model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(RefusedError, match="use_reentrant=True"):
        LayerModes(model, "selective").apply()
    model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": selective_contexts()})
    with pytest.raises(RefusedError, match="context_fn"):
        LayerModes(model, "selective").apply()
    assert not any(layer._forward_pre_hooks for layer in decoder_layers(model))


def test_release_after_a_run_that_could_not():
    model = checkpointed()
    before = state_of(model)
    LayerModes(model, "selective").apply()
    unpatch(model)
    assert state_of(model) == before
    LayerModes(model, "selective").apply()
    model.activation_checkpointing_disable()
    unpatch(model)
    model.activation_checkpointing_enable()
    backward(model)
    assert not any(layer._forward_pre_hooks for layer in decoder_layers(model))


def test_every_nth_layer_is_refused():
    model = checkpointed()
    model.activation_checkpointing_enable(every_n_layers=2)
    with pytest.raises(RefusedError, match="off in 2 of the 4 layers.*without every_n_layers"):
        LayerModes(model, "keep")


def test_only_plain_tensors_are_offloaded():
    class Own(torch.Tensor):
        pass

    x = torch.ones(3, requires_grad=True).as_subclass(Own)
    with pytest.raises(RefusedError, match="type Own cannot be offloaded"), ActivationOffloader().saving():
        (x * 2).square()


def test_probe_measures_what_autograd_saves_and_changes_nothing():
    expected = backward(checkpointed(attention_dropout=0.1))
    torch.manual_seed(0)
    model = checkpointed(attention_dropout=0.1)
    torch.manual_seed(0)
    with LayerProbe(model) as probe:
        assert not probe.complete
        found = backward(model)
    torch.manual_seed(0)
    expected = backward(checkpointed(attention_dropout=0.1))
    assert_bitwise_equal(expected, found, "gradients")
    assert probe.complete and probe.tokens == 48
    for layer in probe.measured.values():
        assert layer["input_bytes"] == INPUT_BYTES
        assert layer["forward_seconds"] > layer["attention_seconds"]


def test_probe_agrees_with_the_bytes_of_a_whole_forward():
    model = checkpointed()
    with LayerProbe(model) as probe:
        backward(model)
    shared = 2 * 24 * 8 * 4  # cos and sin, which all layers share
    with LayerModes(model, "keep"), SavedBytes(exclude=model.parameters()) as kept:
        model.model(input_ids=TOKENS)
    with LayerModes(model, ["checkpoint", *["keep"] * 3]), SavedBytes(exclude=model.parameters()) as fewer:
        model.model(input_ids=TOKENS)
    # The checkpointed layer still keeps its input.
    difference = probe.measured[0]["kept_bytes"] - INPUT_BYTES
    assert kept.total - fewer.total == pytest.approx(difference, abs=shared)
    costs = probe.costs(tokens=96)[0]
    assert costs.modes["checkpoint"].size == 2 * INPUT_BYTES


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_masks_are_scaled_by_the_square_of_the_length(attention):
    """
    What SDPA and eager attention keep for each pair of tokens, planned for rows of twice the length from shorter ones.
    """
    measured = {}
    for length in (24, 48):
        model = checkpointed()
        model.set_attn_implementation(attention)
        ids = torch.arange(2 * length).view(2, length) % 40
        mask = torch.ones_like(ids)
        mask[0, -3:] = 0
        with LayerProbe(model) as probe:
            model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
        measured[length] = probe
    assert measured[24].measured[0]["square_bytes"] >= 2 * 24**2 * 4
    planned = [cost.modes["keep"].size for cost in measured[24].costs(tokens=2 * 48)]
    assert planned == [cost.modes["keep"].size for cost in measured[48].costs()]


def test_bandwidth_is_measured():
    assert measure_copy_bandwidth("cpu", 1 << 20) > 0


# --- layers that draw with Python's or numpy's generator -------------------------------------------------------------


def _left_out_at_random(model, draw):
    """Let each MLP have its input once, or twice and a bit, by numbers that torch knows nothing of."""
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, args: (args[0] * ((draw() < 0.5) + draw()),))


def _seeded(model):
    random.seed(3)
    np.random.seed(3)
    grads = {name: grad for name, grad in backward(model).items() if grad is not None}
    return grads, random.random(), float(np.random.rand())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("draw", [random.random, np.random.rand])
def test_a_layer_that_is_computed_again_draws_pythons_and_numpys_numbers_again(mode, draw):
    plain = tiny_qwen3(num_hidden_layers=LAYERS, use_cache=False).train()
    _left_out_at_random(plain, draw)
    model = checkpointed()
    _left_out_at_random(model, draw)
    wanted = _seeded(plain)
    with LayerModes(model, mode):
        found = _seeded(model)
    assert_bitwise_equal(wanted[0], found[0])
    assert wanted[1:] == found[1:]


@pytest.mark.parametrize("draw", [random.random, np.random.rand])
def test_measuring_layers_takes_none_of_pythons_and_numpys_numbers_and_moves_no_counts(draw):
    def made():
        model = checkpointed()
        _left_out_at_random(model, draw)
        for layer in model.model.layers:
            layer.mlp.counts = torch.nn.BatchNorm1d(32)
            layer.mlp.register_forward_pre_hook(lambda module, args: (module.counts(args[0].flatten(0, 1)), None)[1])
        return model

    plain, model = made(), made()
    with LayerModes(plain, "checkpoint"):
        wanted = _seeded(plain)
    with LayerProbe(model) as probe:
        found = _seeded(model)
    assert probe.complete
    assert_bitwise_equal(wanted[0], found[0])
    assert wanted[1:] == found[1:]
    assert_bitwise_equal(dict(plain.named_buffers()), dict(model.named_buffers()))


def test_a_layer_that_runs_other_operations_the_second_time_is_refused_by_name():
    """As one that grows a table of positions in its first forward: torch's own error names no fix."""
    model, times = checkpointed(), []

    def grow(module, args):
        times.append(1)
        return (args[0] * 2,) if len(times) > LAYERS and len(times) % 2 else None

    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(grow)
    with (
        LayerModes(model, "selective"),
        pytest.raises(RefusedError, match="other operations .* Use the mode 'checkpoint'"),
    ):
        backward(model)
