"""Models without data: shapes, storages and graphs are those of a real run, and what is invented is named."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_effi.functional.saved_bytes import SavedBytes
from hf_effi.functional.shape_run import ShapeRun, _TooManyOperations, storage_of, weights_of
from hf_effi.report.reachable import backward, bytes_of_cache, leaves_of_graph


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.LayerNorm(8)
        self.unused = nn.Linear(3, 3)
        self.register_buffer("positions", torch.arange(5))

    def forward(self, ids):
        return self.head(self.norm(self.embed(ids)))


IDS = torch.tensor([[1, 2, 3, 4, 5]])


# --- weights ---------------------------------------------------------------------------------------------------------


def test_an_emptied_model_saves_what_the_real_one_saves():
    real = Tied()
    with torch.device("meta"):
        built = Tied()
    run = ShapeRun()
    model = run.emptied(built)
    assert model.head.weight is model.embed.weight, "tied weights stay tied"
    assert torch.equal(model.positions, torch.arange(5)), "whole numbers are real"
    with SavedBytes(real.parameters()) as expected:
        logits = real(IDS)
    with run, SavedBytes(model.parameters()) as found:
        out = model(IDS)
    assert out.shape == logits.shape and found.total == expected.total > 0
    assert run.invented == set() and run.operations > 0


def test_a_copied_model_is_left_as_it_is():
    real = Tied()
    real.plain = real.norm.weight * 2  # has a graph, which cannot be copied
    before = {name: value.clone() for name, value in real.state_dict().items()}
    run = ShapeRun()
    model = run.copied(real)
    with run:
        model(IDS)
    assert model.head.weight is model.embed.weight and model.embed.weight is not real.embed.weight
    assert all(torch.equal(value, before[name]) for name, value in real.state_dict().items())
    used = {id(weight) for key, weight in weights_of(model) if key in run.used}
    assert used == {id(model.embed.weight), id(model.norm.weight), id(model.norm.bias)}
    assert storage_of(model.unused.weight) not in run.used


def test_casts_of_weights_are_noted():
    run = ShapeRun()
    layer = run.emptied(nn.Linear(4, 4, device="meta"))
    with run, torch.autocast("cpu", dtype=torch.bfloat16):
        layer(torch.ones(2, 4))
    noted = {(id(weight), copy.dtype) for weight, copy in run.casts}
    assert noted == {(id(layer.weight), torch.bfloat16), (id(layer.bias), torch.bfloat16)}


# --- what is real, and what is invented ------------------------------------------------------------------------------


def test_code_that_branches_on_tokens_sees_them():
    run = ShapeRun()
    weight = run.without_data(nn.Parameter(torch.ones(11, 4)))
    with run:
        mask = IDS > 2
        picked = F.embedding(IDS, weight)[mask]
        assert bool(mask.any()) and int(mask.sum()) == 3
    assert picked.shape == (3, 4) and run.invented == set()


@pytest.mark.parametrize("call", [lambda x: x.topk(2).indices, lambda x: x.argsort(dim=-1)[..., :2]])
def test_places_picked_by_value_are_spread(call):
    run = ShapeRun()
    weight = run.without_data(nn.Parameter(torch.ones(6, 4)))
    with run:
        chosen = call(weight * 2)
        counts = torch.bincount(chosen.flatten(), minlength=4)
    assert run.invented == {"routing"}
    assert counts.sum() == 12 and counts.min() >= 1, "no expert is without tokens"


def test_values_that_are_guessed_are_named():
    for call in (lambda x: x.sum().item(), lambda x: (x > 0).nonzero(), lambda x: x[x > 0]):
        run = ShapeRun()
        weight = run.without_data(nn.Parameter(torch.ones(3, 2)))
        with run:
            call(weight)
        assert run.invented == {"values"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "weight", "ends"),
    [((6, 8), (3, 6, 8), [2, 4, 6]), ((8, 8), (16, 8), [2, 4, 8]), ((3, 4, 8), (3, 6, 8), None)],
    ids=["rows by experts", "gradient of experts", "batches"],
)
def test_grouped_products_have_the_layout_of_real_ones(dtype, rows, weight, ends):
    """Rows are padded to 16 bytes, and the padding is memory too."""
    first, second = torch.ones(rows, dtype=dtype), torch.ones(weight, dtype=dtype).transpose(-2, -1)
    offsets = None if ends is None else torch.tensor(ends, dtype=torch.int32)
    real = torch._grouped_mm(first, second, offs=offsets)
    run = ShapeRun()
    first, second = (run.without_data(nn.Parameter(tensor)).detach() for tensor in (first, second))
    with run:
        found = torch._grouped_mm(first, second, offs=offsets)
    assert (found.shape, found.stride(), found.dtype) == (real.shape, real.stride(), real.dtype)
    assert found.untyped_storage().nbytes() == real.untyped_storage().nbytes()


# --- giving up -------------------------------------------------------------------------------------------------------


def test_a_long_loop_is_given_up_also_between_writes_in_place():
    run = ShapeRun()
    weight = run.without_data(nn.Parameter(torch.ones(4)))
    with pytest.raises(_TooManyOperations, match="more than 50 operators"), run, run.limited(50):
        states = weight.new_zeros(1000, 4)
        for step in range(1000):
            states[step] = weight * step
    assert 50 < run.operations < 60
    with run:
        assert (weight * 2).shape == (4,), "the run goes on after it"


# --- what hangs on an output -----------------------------------------------------------------------------------------


class Backwards(torch.autograd.Function):
    """A function that reaches a weight in its backward pass only."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        ctx.save_for_backward(x)
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            ctx.layer(*ctx.saved_tensors).backward(grad)
        return grad, None


class Output(dict):
    loss = None


def test_weights_that_get_a_gradient_are_the_leaves_of_the_graph():
    model = Tied()
    out = Output(logits=model(IDS))
    leaves, functions = leaves_of_graph(out)
    assert leaves == {id(model.embed.weight), id(model.norm.weight), id(model.norm.bias)} and functions == set()
    backward(out)
    assert {id(weight) for weight in model.parameters() if weight.grad is not None} == leaves


def test_functions_with_a_backward_of_their_own_are_named():
    layer, x = nn.Linear(2, 2), torch.ones(1, 2, requires_grad=True)
    out = Output()
    out.loss = Backwards.apply(x, layer).sum()
    leaves, functions = leaves_of_graph(out)
    assert leaves == {id(x)} and functions == {"Backwards"}
    backward(out)
    assert layer.weight.grad is not None


def test_a_cache_counts_each_storage_of_floats_once():
    class Layer:
        def __init__(self, keys):
            self.keys, self.length = keys, torch.tensor([7])

    keys = torch.zeros(2, 8)
    assert bytes_of_cache(None) == bytes_of_cache() == 0
    assert bytes_of_cache([Layer(keys), {"again": keys.view(4, 4), "more": (torch.zeros(3),)}]) == 64 + 12


# --- saved bytes -----------------------------------------------------------------------------------------------------


def test_what_is_freed_again_no_longer_counts():
    x = torch.ones(100, requires_grad=True)
    with SavedBytes([x]) as saved:
        first = x.exp()  # saves its output
        held = saved.holds(first)
        kept = x.sigmoid()
        del first
        freed = saved.now
        again = kept.tanh()
    assert held and (freed, saved.now, saved.total) == (400, 800, 800)
    again.sum().backward()
    assert torch.equal(x.grad, torch.full((100,), x.grad[0].item())), "what is saved comes back"
    assert saved.now == 0
