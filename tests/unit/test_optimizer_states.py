"""The bytes that the planners count for an optimizer of this package are those that it holds after a step."""

from __future__ import annotations

import pytest
import torch

from hf_effi.functional.memory import OPTIMIZERS, optimizer_bytes
from hf_effi.functional.optimizer_states import _RANK, Parameter
from hf_effi.optim.names import _FACTORIES, find_factory
from hf_effi.optim.report import innermost, report_of
from hf_effi.report.trace_memory import TracedModel
from tests.helpers import tiny_llama

NEEDS_PACKAGE = ("soap", "prodigy", "lars", "lamb")
RATES = {"prodigy": 1.0}
#: one of two layers is enough for FRUGAL to draw some blocks and not others
SHAPE = {"num_hidden_layers": 2, "tie_word_embeddings": True}


def held(optim: str, model: torch.nn.Module, **options: int) -> int:
    """Return the bytes of the tensors that an optimizer keeps after one step, kept projections included."""
    optimizer = find_factory(optim)(model, lr=RATES.get(optim, 1e-3), **options)
    ids = torch.arange(3, 13)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    kept = getattr(innermost(optimizer), "_kept", {}).values()
    return report_of(optimizer).state_bytes + sum(draw.numel() * draw.element_size() for _, draw in kept)


def test_every_optimizer_of_the_package_is_counted():
    assert set(_FACTORIES) <= set(OPTIMIZERS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optim", sorted(_FACTORIES))
def test_counted_is_held(optim, dtype, monkeypatch):
    if optim in NEEDS_PACKAGE:
        pytest.importorskip("pytorch_optimizer")
    options = {}
    if optim == "apollo":  # the default rank is larger than any side of a tiny model
        monkeypatch.setitem(_RANK, "apollo", 4)
        options = {"rank": 4}
    model = tiny_llama(**SHAPE).to(dtype)
    traced = TracedModel(model)
    traced.trace(1, 10)
    assert optimizer_bytes(traced.parameters, optim) == held(optim, model, **options)


def test_by_hand():
    matrix, norm = Parameter((8, 32), 2, True, role="hidden"), Parameter((8,), 2, True, role="norm")
    assert optimizer_bytes([matrix, norm], "muon") == 4 * 256 + 2 * 2 * 8 + 4
    assert optimizer_bytes([matrix, norm], "mars_m") == (4 + 2) * 256 + 2 * 2 * 8 + 4
    assert optimizer_bytes([matrix, norm], "apollo_mini") == 4 * (2 * 32 + 1 + 8) + 2 * 4 * 8
    assert optimizer_bytes([matrix, norm], "apollo") == 2 * 4 * (256 + 8)  # no side above the rank
    assert optimizer_bytes([Parameter((4, 8, 32), 4, True, role="experts")], "apollo_mini") == 4 * (2 * 4 * 32 + 4 + 8)
    assert optimizer_bytes([matrix, norm], "soap") == 2 * (2 * 256 + 2 * (64 + 1024) + 2 * 8)
    assert optimizer_bytes([Parameter((8, 32), 4, False, role="hidden")], "muon") == 0
    assert optimizer_bytes([], "frugal") == 0


def test_a_parameter_without_a_role_is_refused():
    with pytest.raises(ValueError, match="treats parameters by their role"):
        optimizer_bytes([Parameter((8, 32), 4, True)], "muon")
    assert optimizer_bytes([Parameter((8, 32), 4, True)], "nadamw") == 2 * 4 * 256
