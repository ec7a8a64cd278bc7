"""Norms of matrices that FSDP2 has sharded over two ranks are those of the whole ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_effi.recipes import weight_norm_report, weight_norms
from tests.helpers import run_distributed


def plain_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def sharded(folder: str):
    from torch.distributed.fsdp import fully_shard

    model, reference = plain_model(), weight_norms(plain_model())
    fully_shard(model)
    return type(model[0].weight).__name__, weight_norms(model), str(weight_norm_report(model, reference))


def test_two_ranks_report_the_whole_matrices(tmp_path):
    (kind, norms, text), other = run_distributed(sharded, 2, str(tmp_path))
    assert kind == "DTensor" and other == (kind, norms, text)
    assert norms == pytest.approx(weight_norms(plain_model()), rel=1e-6)
