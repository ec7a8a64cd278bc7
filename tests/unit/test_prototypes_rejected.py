"""CLASSP, normalise-and-project, SoRA and outlier-safe pre-training against values computed by hand."""

import math

import pytest
import torch
from torch import nn

from bench import data_repeats, rejected_optimizers
from bench._rejected_study import build, interpolate, worst_gap
from bench.prototypes.classp import Classp
from bench.prototypes.normalize_project import Projection, is_query_or_key
from bench.prototypes.outlier_safe import (
    MuonAll,
    SSNorm,
    add_embedding_projections,
    excess_kurtosis,
    fold_embedding_projections,
    muon_update,
    orthogonalised,
    round_layers,
    rounded,
    use_ss_norm,
)
from bench.prototypes.sora import adapt, fold, proximal_step, soft_threshold


def parameter(*values):
    return nn.Parameter(torch.tensor(values))


# --- CLASSP ----------------------------------------------------------------------------------------------------------


def test_classp_moves_what_is_above_the_threshold_and_nothing_else():
    weight = parameter(1.0, 2.0, -3.0, 0.1)
    before = weight.detach().clone()
    optimizer = Classp([weight], lr=0.2, threshold=0.25, eps=0.0, power=1.0)
    weight.grad = torch.tensor([0.5, -2.0, 0.6, math.nan])
    optimizer.step()
    # 0.5^2 is not above 0.25; NaN is above nothing. Others move by lr g / |g|.
    assert torch.equal(weight[[0, 3]].detach(), before[[0, 3]])
    assert weight[1].item() == pytest.approx(2.2) and weight[2].item() == pytest.approx(-3.2)
    weight.grad = torch.tensor([0.0, -2.0, 0.0, 0.0])
    optimizer.step()
    assert weight[1].item() == pytest.approx(2.3), "importance 4, so half of the step"
    assert optimizer.state[weight]["importance"].tolist() == pytest.approx([0, 4, 0.6, 0])
    assert optimizer.moved_share() == 0.5


def test_classp_importance_never_falls_and_power_two_is_adagrad():
    torch.manual_seed(0)
    one, two = nn.Parameter(torch.randn(7)), nn.Parameter(torch.zeros(7))
    two.data.copy_(one.data)
    ours, adagrad = Classp([one], lr=0.1, threshold=0.0, eps=0.0, power=2.0), torch.optim.Adagrad([two], lr=0.1, eps=0)
    last = torch.zeros(7)
    for _ in range(5):
        one.grad = torch.randn(7)
        two.grad = one.grad.clone()
        ours.step()
        adagrad.step()
        assert (ours.state[one]["importance"] >= last).all()
        last = ours.state[one]["importance"].clone()
    assert torch.allclose(one, two, atol=1e-6)
    with pytest.raises(ValueError, match="threshold=-1"):
        Classp([one], threshold=-1)
    with pytest.raises(ValueError, match="power=0"):
        Classp([one], power=0)


# --- normalise-and-project -------------------------------------------------------------------------------------------


def test_projection_keeps_norms_and_a_scale_free_function():
    model = build(0)
    tokens = torch.arange(16).view(2, 8)
    projection = Projection(model, is_query_or_key)
    assert len(projection.weights) == 4
    norms = {name: weight.norm().item() for name, weight in projection.weights.items()}
    logits = model(tokens).logits
    for weight in projection.weights.values():
        weight.data.mul_(3)
    assert torch.allclose(model(tokens).logits, logits, atol=1e-4), "queries and keys are normalised, up to eps"
    projection.project()
    for name, weight in projection.weights.items():
        assert weight.norm().item() == pytest.approx(norms[name], rel=1e-6)
    with pytest.raises(ValueError, match="No matrix"):
        Projection(model, lambda name: False)


# --- SoRA ------------------------------------------------------------------------------------------------------------


def test_soft_threshold_golden():
    values = torch.tensor([0.5, 1.5, 2.5, -1.5, -3.0])
    assert soft_threshold(values, 1.0).tolist() == [0.0, 0.5, 1.5, -0.5, -2.0]
    assert torch.equal(soft_threshold(values, 0.0), values) and soft_threshold(values, 9.0).abs().sum() == 0
    assert soft_threshold(torch.tensor([1.0, -1.0]), 1.0).abs().tolist() == [0, 0]
    assert soft_threshold(torch.tensor([]), 1.0).numel() == 0


def test_the_threshold_is_the_penalty_times_the_learning_rate():
    model = build(0)
    adapters = adapt(model, lambda name: 2, 1.0, gated=True)
    gate = next(iter(adapters.values())).gate
    gate.data.copy_(torch.tensor([0.3, -0.05]))
    proximal_step(adapters, learning_rate=0.1, penalty=1.0)
    assert gate.tolist() == pytest.approx([0.2, 0.0])
    proximal_step(adapters, learning_rate=0.1, penalty=0.0)
    assert gate.tolist() == pytest.approx([0.2, 0.0])


def test_folded_adapters_are_the_gated_ones():
    torch.manual_seed(0)
    model = build(0)
    tokens = torch.arange(16).view(2, 8)
    stock = model(tokens).logits
    adapters = adapt(model, lambda name: 4, 2.0, gated=True)
    assert torch.equal(model(tokens).logits, stock), "B begins at 0"
    for number, adapter in enumerate(adapters.values()):
        nn.init.normal_(adapter.lora_b, std=0.1)
        adapter.gate.data[: number % 5] = 0.0  # from none to all four are closed
    gated = model(tokens).logits
    assert not torch.allclose(gated, stock, atol=1e-3)
    plain = fold(model, adapters)
    assert [adapter.rank for adapter in plain.values()] == [4 - number % 5 for number in range(len(plain))]
    assert all(adapter.gate is None for adapter in plain.values())
    assert torch.allclose(model(tokens).logits, gated, atol=1e-6)
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert trained and all("lora_" in name for name in trained)


# --- outlier-safe pre-training ---------------------------------------------------------------------------------------


def test_orthogonalised_matrices_have_singular_values_near_one():
    torch.manual_seed(0)
    for shape in ((8, 24), (24, 8), (8, 8)):
        values = torch.linalg.svdvals(orthogonalised(torch.randn(shape)))
        assert 0.3 < values.min() and values.max() < 1.3
    assert muon_update(torch.tensor(-3.0)).item() == pytest.approx(-0.2)
    assert muon_update(torch.tensor([3.0, 4.0])).tolist() == pytest.approx([0.2 * 2**0.5 * 0.6, 0.2 * 2**0.5 * 0.8])


def test_the_first_step_of_muon_on_all_by_hand():
    scalar = nn.Parameter(torch.tensor(1.0))
    optimizer = MuonAll([scalar, nn.Parameter(torch.ones(2))], lr=0.1, weight_decay=0.5)
    scalar.grad = torch.tensor(2.0)
    optimizer.step()
    assert scalar.item() == pytest.approx(1 * (1 - 0.05) - 0.1 * 0.2)


def test_one_gain_is_rms_norm_with_equal_gains():
    torch.manual_seed(0)
    model = build(0, tied=False)
    norm, x = model.model.norm, torch.randn(3, 64)
    norm.weight.data.fill_(1.5)
    ours = SSNorm(norm.variance_epsilon)
    ours.gain.data.fill_(1.5)
    assert torch.equal(ours(x), norm(x))
    tokens = torch.arange(8).view(1, 8)
    norm.weight.data.fill_(1.0)
    logits = model(tokens).logits
    assert use_ss_norm(model) == 9  # two before, two of queries and keys in each layer, and the last
    assert torch.equal(model(tokens).logits, logits)


def test_projections_of_embeddings_fold():
    model = build(0, tied=False)
    tokens = torch.arange(8).view(1, 8)
    add_embedding_projections(model)
    logits = model(tokens).logits
    fold_embedding_projections(model)
    assert torch.allclose(model(tokens).logits, logits, atol=1e-5)
    with pytest.raises(ValueError, match="tied"):
        add_embedding_projections(build(0))


def test_kurtosis_is_centred_and_by_token():
    assert excess_kurtosis(torch.tensor([0.0, 0.0, 0.0, 10.0])).item() == pytest.approx(-2 / 3)
    torch.manual_seed(0)
    assert abs(excess_kurtosis(torch.randn(1_000_000)).item()) < 0.05
    values = torch.zeros(2, 64)
    values[0, 0], values[1] = 1.0, torch.randn(64)
    assert excess_kurtosis(values)[0] > 50 and excess_kurtosis(values)[1] < 5
    assert excess_kurtosis(torch.ones(4)).item() == -3.0, "all equal: no spread"


def test_rounding_to_four_bits():
    assert rounded(torch.tensor([7.0, 3.4, -0.6, 0.0])).tolist() == [7.0, 3.0, -1.0, 0.0]
    assert rounded(torch.zeros(3)).tolist() == [0, 0, 0]
    model = build(0, tied=False)
    assert round_layers(model) == 14 and torch.isfinite(model(torch.arange(8).view(1, 8)).logits).all()


# --- the benches -----------------------------------------------------------------------------------------------------


def test_gaps_by_hand():
    rows = [{"arm": arm, "loss": loss} for arm, loss in (("a", 1.0), ("a", 2.0), ("b", 1.5), ("b", 1.9))]
    assert worst_gap(rows, "a", "b") == 0.1
    points = [(1.0, 5.0), (2.0, 3.0)]
    assert [interpolate(points, x) for x in (0.0, 1.0, 1.5, 2.0, 9.0)] == [5.0, 5.0, 4.0, 3.0, 3.0]
    assert interpolate([(1.0, 5.0)], 1.0) == 5.0


def test_every_part_runs_in_its_smallest_size(tmp_path):
    rows, figures = rejected_optimizers.main(["--quick"], tmp_path)
    arms = {row["arm"] for row in rows}
    assert {"AdamW", "CLASSP", "SoRA", "LoRA of SoRA's ranks", "AdaLoRA", *rejected_optimizers.SCRATCH} <= arms
    assert len(figures) == 18 and all(math.isfinite(figure["value"]) for figure in figures)
    repeated, more = data_repeats.main(["--quick"], tmp_path)
    assert len(repeated) == 6 and len(more) == 4 and not list(tmp_path.iterdir())
    data = data_repeats.RepeatedData()
    passes = [torch.cat([data.batch(0, 16 * turn + step) for step in range(16)]) for turn in range(2)]
    assert not torch.equal(*passes)
    assert sorted(map(tuple, passes[0].tolist())) == sorted(map(tuple, passes[1].tolist()))
