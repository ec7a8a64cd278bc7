"""
A probe leaves no trace: whatever a model does in it, all that can be seen of it is afterwards the same, to the bit.
"""

from __future__ import annotations

import random
import types

import numpy as np
import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from hf_effi.memory.chunk_probe import chunks_are_exact
from hf_effi.patching import (
    compare,
    draws_random_numbers,
    length_dependent_positions,
    longest_exact_call,
    moved_in_padding,
    probing,
    rows_see_each_other,
    untouched,
)
from hf_effi.patching.probe import looking
from tests.helpers import odd_models, tiny_llama, tiny_qwen3

QUESTIONS = {
    "padding": moved_in_padding,
    "other rows": rows_see_each_other,
    "length": length_dependent_positions,
    "chance": draws_random_numbers,
    "chance within": lambda model: draws_random_numbers(model, within=[model.head]),
}
ODD = [
    kind
    for kind in vars(odd_models).values()
    if isinstance(kind, type) and issubclass(kind, odd_models.OddModel) and kind is not odd_models.OddModel
]


def assert_no_trace(before, model):
    after = odd_models.picture(model)
    assert before.keys() == after.keys(), sorted(before.keys() ^ after.keys())[:5]
    changed = [path for path in before if before[path] != after[path]]
    assert not changed, changed[:5]


@pytest.fixture(autouse=True)
def _numbers_that_are_not_the_first():
    random.seed(11)
    np.random.seed(12)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(13)
        torch.randn(3)
        yield


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("kind", ODD)
def test_odd_models_are_as_they_were(kind, question):
    model = kind()
    model.head.eval()  # modes are not of one kind
    odd_models.remembered_cosines.cache_clear()
    odd_models.CachesInItsClass.tables.clear()  # other tests fill both
    before = odd_models.picture(model)
    QUESTIONS[question](model)
    assert_no_trace(before, model)
    assert not probing()
    assert odd_models.remembered_cosines.cache_info().currsize == 0
    assert not odd_models.CachesInItsClass.tables


@pytest.mark.parametrize("kind", [odd_models.CachesInItsClass, odd_models.CachesInAFunction])
def test_a_shared_cache_of_before_stays_and_the_next_forward_is_the_same(kind):
    """A table in the probe's double precision would make this forward fail."""
    model, ids = kind(), torch.arange(20)[None]
    odd_models.remembered_cosines.cache_clear()
    try:
        wanted = model(ids)["logits"]
        moved_in_padding(model)
        assert torch.equal(model(ids)["logits"], wanted)
        assert all(table.dtype == torch.float32 for table in odd_models.CachesInItsClass.tables.values())
    finally:
        odd_models.CachesInItsClass.tables.clear()
        odd_models.remembered_cosines.cache_clear()


def _llama(**over):
    return tiny_llama(**over).train()


def _with_gradients():
    model = _llama()
    model(input_ids=torch.arange(6)[None], labels=torch.arange(6)[None]).loss.backward()
    model.lm_head.weight.grad = None
    model.model.norm.weight.requires_grad_(False)
    return model


def _with_hooks():
    model = _llama()
    model.model.layers[0].register_forward_hook(lambda module, args, out: None)
    model.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: None, prepend=True)
    model.model.layers[1].register_full_backward_hook(lambda module, one, other: None)
    model.lm_head.weight.register_hook(lambda grad: grad)
    model.model.embed_tokens.register_forward_hook(lambda module, args, out: out, with_kwargs=False)
    return model


def _checkpointed(**options):
    model = _llama()
    model.gradient_checkpointing_enable(options)
    model.model.layers[0].gradient_checkpointing = False
    return model


def _of_mixed_modes():
    model = _llama().to(torch.bfloat16).eval()
    model.model.layers[1].train()
    model.model.layers[0].mlp.act_fn.train()
    model.model.norm.float()
    return model


def _with_adapters():
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]):
        model = get_peft_model(_llama(), LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_dropout=0.1))
        model.add_adapter("second", LoraConfig(r=2, target_modules=["k_proj"]))
    model.set_adapter("second")
    return model


def _with_merged_adapters():
    model = _with_adapters()
    model.set_adapter("default")
    model.merge_adapter()
    return model


def _with_adapters_switched_off():
    model = _with_adapters()
    model.base_model.disable_adapter_layers()
    return model


def _parametrized():
    model = _llama()
    nn.utils.parametrizations.weight_norm(model.lm_head)
    nn.utils.parametrizations.spectral_norm(model.model.layers[0].mlp.up_proj)  # has buffers that a forward writes to
    return model


def _packed(layer_of):
    model = _llama(hidden_size=64, intermediate_size=128, head_dim=16)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name != "lm_head":
                setattr(module, name, layer_of(child))
    return model.train()


def in_4_bits():
    import bitsandbytes as bnb

    def layer_of(child):
        sizes = child.in_features, child.out_features
        packed = bnb.nn.Linear4bit(*sizes, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        packed.weight = bnb.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4")
        return packed.to("cpu")

    return _packed(layer_of)


def in_8_bits():
    import bitsandbytes as bnb

    def layer_of(child):
        packed = bnb.nn.Linear8bitLt(child.in_features, child.out_features, bias=False, has_fp16_weights=False)
        packed.weight = bnb.nn.Int8Params(child.weight.data, requires_grad=False, has_fp16_weights=False)
        return packed.to("cpu")

    return _packed(layer_of)


MODELS = {
    "plain": _llama,
    "gradients": _with_gradients,
    "hooks": _with_hooks,
    "checkpointing": lambda: _checkpointed(use_reentrant=False),
    "reentrant checkpointing": lambda: _checkpointed(use_reentrant=True),
    "modes and dtypes": _of_mixed_modes,
    "tied": lambda: tiny_qwen3(tie_word_embeddings=True),
    "adapters": _with_adapters,
    "merged adapters": _with_merged_adapters,
    "adapters off": _with_adapters_switched_off,
    "parametrized": _parametrized,
    "4 bits": in_4_bits,
    "8 bits": in_8_bits,
}


@pytest.mark.parametrize("name", MODELS)
def test_models_of_transformers_are_as_they_were(name):
    model = MODELS[name]()
    before = odd_models.picture(model)
    for ask in (moved_in_padding, rows_see_each_other, draws_random_numbers, longest_exact_call, chunks_are_exact):
        ask(model)
        assert_no_trace(before, model)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_fails_half_way_is_as_it_was(name):
    """At the second call, inside of the last layer, where most of what a probe changes is changed."""
    model = MODELS[name]()
    calls = []

    def fail(module, args):
        calls.append(1)
        if len(calls) % 2 == 0:
            raise KeyError("half-way")

    next(m for n, m in model.named_modules() if n.endswith("layers.1.mlp")).register_forward_pre_hook(fail)
    before = odd_models.picture(model)
    for ask in (rows_see_each_other, draws_random_numbers, chunks_are_exact):
        found = ask(model)
        assert not found.looked and not found.equal
        assert_no_trace(before, model)
    assert calls


def test_a_packed_model_that_was_used_computes_what_it_did():
    for make in (in_4_bits, in_8_bits):
        model, ids = make(), torch.arange(8)[None]
        wanted = model(ids).logits
        assert rows_see_each_other(model).equal and moved_in_padding(model).equal and not probing()
        assert torch.equal(model(ids).logits, wanted)


def test_what_a_run_itself_does_to_the_model_is_undone():
    model = _llama()
    before = odd_models.picture(model)

    def run(model):
        model.extra = torch.ones(2)
        model.model.layers[0].mlp.forward = types.MethodType(lambda self, x: x, model.model.layers[0].mlp)
        model.config.use_cache, model.config.hidden_size = True, 7
        model.generation_config.max_length = 3
        model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
        model.lm_head.weight.note = "here"
        model.model.norm = nn.Identity()
        return model(input_ids=torch.arange(5)[None]).logits

    assert compare(model, run, run).equal
    assert_no_trace(before, model)
    with pytest.raises(ZeroDivisionError), looking(model, torch.float64):
        run(model)
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        1 / 0  # noqa: B018
    assert_no_trace(before, model)


def test_a_write_to_one_of_two_weights_in_one_storage_is_undone():
    flat = torch.arange(8.0)
    model = nn.Module()
    model.one, model.other = nn.Parameter(flat[:4]), nn.Parameter(flat[4:])
    with untouched(model), torch.no_grad():
        model.other.mul_(3)
        torch.add(model.one, 1, out=model.one)
        model.one.data[0] = 9
    assert flat.tolist() == list(range(8))


def test_an_object_that_cannot_be_seen_whole_is_left_to_its_owner():
    """Half of its state put back and half not would be worse than all of it as the run left it."""

    class Engine:
        def __init__(self, module):
            self.module, self.steps, self.inner = module, 0, []

    model = _llama()
    model.engine = Engine(model.lm_head)
    with untouched(model):
        model.engine.steps += 1
        model.engine.inner.append(1)
    assert (model.engine.steps, model.engine.inner) == (1, [1])


@pytest.mark.parametrize("with_graph", [True, False])
def test_nothing_of_a_probe_stays_in_memory(with_graph):
    """
    Attention saves its own output: a hook that keeps it as it is would hold the graph, and with it every weight, for
    good.
    """
    model, kept = _llama(), []

    def run(model):
        kept.extend(StorageWeakRef(p.untyped_storage()) for p in model.parameters() if p.dtype == torch.float64)
        logits = model(input_ids=torch.arange(6)[None]).logits
        assert logits.requires_grad == with_graph
        kept.append(StorageWeakRef(logits.untyped_storage()))
        return logits

    with torch.no_grad():
        assert compare(model, run, run, with_graph=with_graph).equal
    assert len(kept) == 3 * (1 + len(list(model.parameters())))
    assert not [ref for ref in kept if not ref.expired()]


def test_negative_zeros_and_nan_of_buffers_are_kept_to_the_bit():
    model = nn.Module()
    model.register_buffer("numbers", torch.tensor([0.0, -0.0, float("nan"), 1.0]))
    model.register_buffer("complex", torch.tensor([1 + 2j, 3j]))
    before = {
        name: odd_models.bits(torch.view_as_real(b) if b.is_complex() else b) for name, b in model.named_buffers()
    }
    versions = {name: b._version for name, b in model.named_buffers()}
    with untouched(model):
        pass
    assert versions == {name: b._version for name, b in model.named_buffers()}, "a graph may hold what nobody wrote to"
    with untouched(model):
        model.numbers.neg_()
        model.complex.zero_()
    assert before == {
        name: odd_models.bits(torch.view_as_real(b) if b.is_complex() else b) for name, b in model.named_buffers()
    }
