"""The long-sequence benches: every arm trains the same, and the ladder for a GPU runs on a tiny CPU model."""

from __future__ import annotations

import pytest
import torch

from bench import long_sequence
from bench.gpu import long_sequence as gpu_long_sequence


def test_every_arm_has_the_gradients_of_the_plain_one():
    model = long_sequence.build(seed=0)
    wanted = None
    for arm, switches in long_sequence.ARMS.items():
        if "ranks" in switches:
            continue
        with long_sequence.switched_on(model, switches):
            loss = long_sequence.step(model, 96, seed=0)
        found = [loss, *(weight.grad.clone() for weight in model.parameters())]
        wanted = wanted or found
        for mine, plain in zip(found[1:], wanted[1:], strict=True):
            assert (mine - plain).abs().max() <= 1e-5 * plain.abs().max(), arm
        assert found[0] == pytest.approx(wanted[0], rel=1e-6), arm
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_the_headline_is_the_furthest_arm_within_the_time():
    rows = [
        {"seed": 0, "arm": arm, "longest": longest, "time_over_checkpoint": time}
        for arm, longest, time in (
            ("plain", 100, 0.8),
            ("checkpoint", 200, 1.0),
            ("+ tiled loss", 700, 1.0),
            ("+ tiled MLP", 900, 1.05),
            ("+ offload", 1000, 1.2),
            ("StreamLayer + tiled loss + offload", 1100, 1.4),
        )
    ]
    length, seconds = long_sequence.summarize(rows)
    assert (length["value"], length["met"]) == (9.0, True)
    assert (seconds["value"], seconds["met"]) == (1.05, True)


def test_the_ladder_for_a_gpu_runs_on_a_tiny_cpu_model(tmp_path, capsys):
    rows = gpu_long_sequence.main(gpu_long_sequence.parse(["--dry-run-cpu", "--layers", "2"]), tmp_path)
    ours = [row for row in rows if "use_kernels" not in row["rung"] and "liger" not in row["rung"]]
    assert [row["longest"] for row in ours] == [256] * len(ours)
    absent = [row for row in rows if row not in ours]
    assert all(row["longest"] or row["ended_by"].startswith("not available") for row in absent)
    assert (tmp_path / "long_sequence_gpu.json").exists()
    assert "StreamLayer" in capsys.readouterr().out


def test_without_a_gpu_the_ladder_says_so(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match="--dry-run-cpu"):
        gpu_long_sequence.main(gpu_long_sequence.parse([]), tmp_path)
