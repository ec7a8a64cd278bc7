"""A probe leaves the hooks by which DDP and ZeRO reduce gradients: they hang on the node behind a parameter."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_effi.patching.probe import compare, gradients, looking
from tests.helpers import tiny_llama


def _node(parameter: nn.Parameter) -> object:
    return parameter.expand_as(parameter).grad_fn.next_functions[0][0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hooks_on_gradient_nodes_still_fire(dtype):
    model = tiny_llama().to(dtype)
    fired = []
    nodes = {name: _node(p) for name, p in model.named_parameters()}
    for name, node in nodes.items():
        node.register_hook(lambda *_, name=name: fired.append(name))
    ids = torch.tensor([[5, 6, 7, 8]])

    def run(m):
        logits = m(input_ids=ids).logits
        return {"the logits": logits, **gradients(m, logits)}

    found = compare(model, run, run)
    assert found.equal and not fired
    assert all(_node(p) is nodes[name] for name, p in model.named_parameters())
    model(input_ids=ids).logits.sum().backward()
    assert sorted(fired) == sorted(nodes)


def test_wide_parameters_stand_in_for_all_places_of_the_real_ones():
    """Tied weights are one parameter in two places, and a recurrent layer keeps a list of its own."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head, self.cell = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False), nn.LSTM(4, 4)
            self.head.weight = self.embed.weight
            self.embed.weight.mark = "kept"

        def get_input_embeddings(self) -> nn.Module:
            return self.embed

    model = Tied()
    real = dict(model.named_parameters())
    flat = list(model.cell._flat_weights)
    with looking(model, torch.float64) as look:
        assert model.embed.weight is model.head.weight is look.watched["embed.weight"]
        assert model.embed.weight.dtype == torch.float64 and model.embed.weight.mark == "kept"
        assert all(any(w is p for p in look.watched.values()) for w in model.cell._flat_weights)
        hidden, _ = model.cell(model.embed(torch.tensor([[1], [2]])))
        assert all(float(g.abs().sum()) > 0 for g in gradients(model, model.head(hidden)).values() if not g.is_sparse)
    assert {n: id(p) for n, p in model.named_parameters()} == {n: id(p) for n, p in real.items()}
    assert all(now is before for now, before in zip(model.cell._flat_weights, flat, strict=True))
