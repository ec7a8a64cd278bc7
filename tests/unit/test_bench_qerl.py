"""The bench of the noise runs on a tiny model, and its figures follow from its rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from bench import qerl


def test_the_smoke_run_writes_a_whole_result(tmp_path: Path) -> None:
    result = json.loads(qerl.main(["--smoke"], tmp_path).read_text())
    arms = {row["arm"] for row in result["rows"] if row["part"] == "training"}
    assert arms == set(qerl.arms(0)) and len(result["seeds"]) == 3
    assert {row["weights"] for row in result["rows"] if row["part"] == "memory"} == {
        "bf16", "NF4", "NF4, scales packed",
    }  # fmt: skip


def test_all_arms_with_noise_have_the_same_mean_of_sigma() -> None:
    large = ("adaptive x10", "constant x10", "shuffled x10", "corrected x10")
    for factor, names in ((1, ("adaptive", "constant")), (10, large)):
        for name in names:
            sigmas = [qerl.arms(1)[name].sigma(step, 40) for step in range(40)]
            assert sum(sigmas) / 40 == pytest.approx(factor * sum(qerl.SIGMAS) / 10)
    shuffled = [qerl.arms(1)["shuffled x10"].sigma(step, 40) for step in range(40)]
    assert shuffled != sorted(shuffled, reverse=True)


def test_bytes_of_weights_count_what_is_tied_once() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
    assert qerl.weight_bytes(model) == 2 * 64
    model["b"].weight = model["a"].weight
    assert qerl.weight_bytes(model) == 64 and qerl.weight_bytes(model.to(torch.bfloat16)) == 32
