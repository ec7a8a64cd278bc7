"""The prototypes of 2:4 sparse training and of structured FFNs against values computed by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bench._ffn_study import build, ffn_linears
from bench.prototypes.sparse_24 import (
    Sparse24Linear,
    flip_rate,
    masked_decay_,
    mvue_24,
    soft_threshold_24,
    soft_threshold_scale,
    tile_patterns,
    transposable_mask,
)
from bench.prototypes.structured_ffn import BlockDense, BlockShuffle, LowRank, guide_alpha
from bench.sparse_24 import MASKED, counted, tried
from bench.structured_ffn import SHALLOW, WIDTHS, dense_arm, gaps, interpolate

# --- 2:4 masks -------------------------------------------------------------------------------------------------------


def test_there_are_90_transposable_tiles():
    tiles = tile_patterns()
    assert tiles.shape == (90, 4, 4) and len({tuple(tile.flatten().tolist()) for tile in tiles}) == 90
    assert (tiles.sum(1) == 2).all() and (tiles.sum(2) == 2).all()


def test_mask_is_2_of_4_in_both_directions():
    torch.manual_seed(0)
    mask = transposable_mask(torch.randn(24, 36))
    assert mask.dtype == torch.bool and mask.shape == (24, 36)
    for side in (mask, mask.t()):
        assert (side.reshape(-1, 4).sum(1) == 2).all()


def test_mask_by_hand():
    weight = torch.tensor([[9.0, -8, 1, 1], [-7, 9, 0, 1], [1, 0, 8, 9], [2, 1, -9, 8]])
    assert transposable_mask(weight).int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]


def test_mask_is_the_best_of_all_that_are_allowed():
    torch.manual_seed(1)
    weight = torch.randn(8, 4)
    pairs = [[i in pair for i in range(4)] for pair in itertools.combinations(range(4), 2)]
    allowed = [torch.tensor(rows) for rows in itertools.product(pairs, repeat=4)]
    allowed = [mask for mask in allowed if (mask.sum(0) == 2).all()]
    for tile, mask in zip(weight.split(4), transposable_mask(weight).split(4), strict=True):
        best = max((tile.abs() * other).sum().item() for other in allowed)
        assert (tile.abs() * mask).sum().item() == pytest.approx(best)


def test_mask_refuses_other_sizes():
    with pytest.raises(ValueError, match=r"divisible by 4, got \(6, 8\)"):
        transposable_mask(torch.zeros(6, 8))


def test_flip_rate():
    before = torch.tensor([[True, True, False, False]])
    assert flip_rate(before, before) == 0.0
    assert flip_rate(before, torch.tensor([[True, False, True, False]])) == 0.5
    assert flip_rate(before, ~before) == 1.0


def test_masked_decay_goes_to_the_gradient_of_the_masked_weights_only():
    weight = nn.Parameter(torch.tensor([[1.0, 2.0, -4.0, 8.0]]))
    weight.grad = torch.ones(1, 4)
    masked_decay_(weight, torch.tensor([[True, False, False, True]]), 0.5)
    assert weight.grad.tolist() == [[1.0, 2.0, -1.0, 1.0]]
    assert weight.tolist() == [[1.0, 2.0, -4.0, 8.0]]


# --- unbiased pruning ------------------------------------------------------------------------------------------------


def test_mvue_is_unbiased_with_the_least_variance():
    """Probabilities of (4, -2, 1, 1): (1, 1/2, 1/4, 1/4), so variances a^2 (1/p - 1) = (0, 4, 3, 3)."""
    torch.manual_seed(0)
    values = torch.tensor([4.0, -2.0, 1.0, 1.0])
    draws = mvue_24(values.repeat(10_000, 1))
    assert ((draws != 0).sum(1) == 2).all()
    for column, value, size in zip(draws.t(), values, (4.0, 4.0, 4.0, 4.0), strict=True):
        assert {round(kept, 4) for kept in column.tolist()} <= {0.0, math.copysign(size, value)}
    error = (draws.mean(0) - values).abs()
    assert error[0] == 0 and (error[1:] < 4 * torch.tensor([4.0, 3.0, 3.0]).sqrt() / 100).all()
    assert draws.var(0).tolist() == pytest.approx([0.0, 4.0, 3.0, 3.0], rel=0.1, abs=1e-6)
    assert draws.var(0).sum() < 0.5 * values.square().sum()  # of a uniform choice: sum a^2 (2 - 1) = 22


def test_mvue_of_random_values_is_unbiased():
    torch.manual_seed(1)
    values = torch.randn(6, 8)
    draws = mvue_24(values.repeat(10_000, 1)).view(10_000, 6, 8)
    assert ((draws.view(-1, 4) != 0).sum(1) <= 2).all()
    error = (draws.mean(0) - values).abs() / (draws.std(0) / 100).clamp(min=1e-6)
    assert error.max() < 4.5


@pytest.mark.parametrize("values", [[0.0, 0, 0, 0], [0, 0, -3, 0], [2, 0, 0, 2], [9, 1, 0, 0]])
def test_mvue_keeps_what_already_is_2_of_4(values):
    row = torch.tensor([values], dtype=torch.float32)
    assert all(torch.equal(mvue_24(row), row) for _ in range(50))


def test_mvue_of_an_outlier_keeps_it():
    draws = mvue_24(torch.tensor([10.0, 1, 1, 2]).repeat(2000, 1))
    assert (draws[:, 0] == 10).all() and ((draws != 0).sum(1) == 2).all()
    assert set(draws[:, 3].tolist()) == {0.0, 4.0}


# --- soft threshold, layer -------------------------------------------------------------------------------------------


def test_soft_threshold_by_hand():
    weight = torch.tensor([[4.0, -3.0, 2.0, 1.0], [2.0, 2.0, -2.0, 1.0]])
    assert soft_threshold_24(weight).tolist() == [[2.0, -1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    assert soft_threshold_scale(weight).item() == pytest.approx((4 * 2 + 3) / (4 + 1))


def layer(soft: bool = False) -> tuple[Sparse24Linear, torch.Tensor]:
    torch.manual_seed(0)
    linear = nn.Linear(8, 12, bias=False)
    return Sparse24Linear(linear, soft), torch.randn(16, 8, requires_grad=True)


@pytest.mark.parametrize("soft", [False, True])
def test_sparse_layer_multiplies_by_2_of_4_weights_forward_and_backward(soft):
    sparse, x = layer(soft)
    weight = sparse.weight.detach()
    kept = sparse.scale * soft_threshold_24(weight) if soft else weight * sparse.mask
    y = sparse(x)
    torch.testing.assert_close(y, x @ kept.t())
    dy = torch.randn(16, 12)
    torch.testing.assert_close(torch.autograd.grad(y, x, dy)[0], dy @ kept)


def test_sparse_layer_gives_every_weight_its_gradient_on_average():
    sparse, x = layer()
    dy = torch.randn(16, 12)
    draws = torch.stack([torch.autograd.grad(sparse(x), sparse.weight, dy)[0] for _ in range(1000)])
    error = (draws.mean(0) - dy.t() @ x.detach()).abs() / (draws.std(0) / math.sqrt(1000))
    assert error.max() < 4.5 and (draws.mean(0)[~sparse.mask] != 0).all()


def test_dense_sparse_layer_is_the_linear_layer():
    sparse, x = layer()
    sparse.dense = True
    dy = torch.randn(16, 12)
    found = torch.autograd.grad(sparse(x), [x, sparse.weight], dy)
    expected = torch.autograd.grad(F.linear(x, sparse.weight), [x, sparse.weight], dy)
    assert all(map(torch.equal, found, expected))


def test_refresh_follows_the_weight():
    sparse, _ = layer()
    assert sparse.refresh() == 0.0
    with torch.no_grad():
        sparse.weight.copy_(torch.where(sparse.mask, 0.0, 1.0))
    assert sparse.refresh() == 1.0


# --- structured factors ----------------------------------------------------------------------------------------------

LAYERS = {
    "low rank": lambda: LowRank(8, 12, 3),
    "block dense": lambda: BlockDense(8, 12, 4, 2),
    "block shuffle, wider": lambda: BlockShuffle(4, 12, 2),
    "block shuffle, narrower": lambda: BlockShuffle(12, 4, 2),
}


@pytest.fixture(params=LAYERS)
def structured(request):
    torch.manual_seed(0)
    return LAYERS[request.param]()


def shuffle(width: int, blocks: int) -> torch.Tensor:
    """Return the permutation matrix that deals `width` values out to `blocks` hands."""
    order = [i for block in range(blocks) for i in range(block, width, blocks)]
    return torch.eye(width)[order]


@pytest.mark.parametrize(("inputs", "outputs", "blocks"), [(4, 12, 2), (12, 4, 2), (9, 9, 3), (4, 4, 1)])
def test_block_shuffle_is_the_product_of_its_factors(inputs, outputs, blocks):
    torch.manual_seed(0)
    made = BlockShuffle(inputs, outputs, blocks)
    inner = min(inputs, outputs)
    expected = (
        shuffle(outputs, blocks).t()
        @ torch.block_diag(*made.second)
        @ shuffle(inner, blocks)
        @ torch.block_diag(*made.first)
    )
    x = torch.randn(5, 2, inputs)
    torch.testing.assert_close(made.dense_weight(), expected)
    torch.testing.assert_close(made(x), x @ expected.t())


def test_block_shuffle_mixes_all_inputs_where_blocks_are_large_enough():
    assert (BlockShuffle(9, 9, 3).dense_weight() != 0).all()
    made = BlockShuffle(4, 4, 2)
    with torch.no_grad():
        made.first.copy_(torch.eye(2).expand(2, 2, 2))
        made.second.copy_(torch.eye(2).expand(2, 2, 2))
    assert made(torch.tensor([[1.0, 2.0, 3.0, 4.0]])).tolist() == [[1.0, 2.0, 3.0, 4.0]]


def test_block_dense_is_the_product_of_its_factors():
    made = BlockDense(8, 12, 4, 2)
    assert made.first.shape == (2, 2, 4) and made.second.shape == (12, 4)
    torch.testing.assert_close(made.dense_weight(), made.second @ torch.block_diag(*made.first))


def test_low_rank_begins_as_the_best_approximation_of_a_random_matrix():
    torch.manual_seed(3)
    made = LowRank(8, 12, 3)
    torch.manual_seed(3)
    dense = torch.randn(12, 8) / math.sqrt(8)
    values = torch.linalg.svdvals(dense)
    error = torch.linalg.matrix_norm(dense - made.dense_weight())
    assert error.item() == pytest.approx(values[3:].square().sum().sqrt().item(), rel=1e-4)
    for gram in (made.up.t() @ made.up, made.down @ made.down.t()):  # each factor holds the root of the values
        torch.testing.assert_close(gram, torch.diag(values[:3]), atol=1e-5, rtol=1e-4)


def test_blocks_begin_orthogonal():
    made = BlockShuffle(12, 4, 2)
    for factor in (made.first, made.second):
        torch.testing.assert_close(factor @ factor.transpose(1, 2), torch.eye(2).expand(2, 2, 2))
    wide = BlockDense(8, 12, 4, 2)
    torch.testing.assert_close(wide.second.t() @ wide.second, torch.eye(4))


def test_guide_begins_as_the_product_and_ends_unused(structured):
    structured.add_guide()
    x = torch.randn(6, structured.in_features)
    product = structured.product(x).detach()
    torch.testing.assert_close(structured(x), product)
    with torch.no_grad():
        structured.guide.mul_(3.0)
    for alpha, expected in ((1.0, 3 * product), (0.25, 1.5 * product), (0.0, product)):
        structured.alpha = alpha
        torch.testing.assert_close(structured(x), expected)


def test_gradient_goes_to_the_guide_at_1_and_to_the_factors_at_0(structured):
    structured.add_guide()
    factors = [p for p in structured.parameters() if p is not structured.guide]
    x = torch.randn(6, structured.in_features)
    structured(x).sum().backward()
    assert structured.guide.grad.any() and not any(p.grad.any() for p in factors)
    structured.zero_grad()
    structured.alpha = 0.0
    structured(x).sum().backward()
    assert structured.guide.grad is None and all(p.grad.any() for p in factors)


@pytest.mark.parametrize(("step", "alpha"), [(0, 1.0), (25, 0.5), (50, 0.0), (51, 0.0), (100, 0.0)])
def test_guide_alpha(step, alpha):
    assert guide_alpha(step, 100) == pytest.approx(alpha)


def test_gradients(structured):
    structured.double().add_guide()
    structured.alpha = 0.3
    x = torch.randn(3, structured.in_features, dtype=torch.double, requires_grad=True)
    names, values = zip(*structured.named_parameters(), strict=True)

    def run(x, *parameters):
        return torch.func.functional_call(structured, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *values))


# --- studies ---------------------------------------------------------------------------------------------------------


def test_models_of_one_seed_differ_in_their_ffn_only():
    wide, narrow, shallow = build(0), build(0, 80), build(0, layers=1)
    weights = wide.state_dict()
    for other in (narrow, shallow):
        kept = {name: value for name, value in other.state_dict().items() if ".mlp." not in name}
        assert all(torch.equal(value, weights[name]) for name, value in kept.items())
    assert len(ffn_linears(wide)) == 6 and len(ffn_linears(shallow)) == 3
    assert ffn_linears(narrow)[0][2].weight.shape == (80, 64)


# --- verdicts --------------------------------------------------------------------------------------------------------


def test_counted_times_by_hand():
    rows = {row["sparse_product_speed"]: row for row in counted() if row["counted"] == MASKED}
    dense = 3 * 2 * 16384 * 3 * 4096 * 14336 / 790e12 * 1e3
    packing = 3 * 4096 * 14336 * 4.375 / 4.3e12 * 1e3
    pruning = 16384 * (2 * 14336 + 4096) * 3.125 / 4.3e12 * 1e3
    for name, speed in (("1_2", 1.2), ("1_5", 1.5), ("ideal", 2.0)):
        assert rows[name]["ffn_speedup"] == pytest.approx(dense / (dense / speed + packing + pruning), rel=2e-3)
        assert 1 < rows[name]["run_speedup"] < rows[name]["ffn_speedup"] < speed


def test_torch_has_no_2_of_4_product_on_a_cpu():
    assert all(row["outcome"] != "runs" for row in tried())


def test_interpolate():
    assert [interpolate(x, [1, 2, 4], [10, 20, 0]) for x in (0.5, 1, 1.5, 2, 3, 4, 9)] == [5, 10, 15, 20, 10, 0, 0]


def test_a_structure_wins_only_on_every_seed_and_at_both_costs():
    blocks = [
        {"block": name, "hidden": hidden, "products_over_dense": share, "cpu_time_over_dense": share}
        for hidden in (64, 512)
        for name, share in [*((dense_arm(w), w) for w in WIDTHS), ("LowRank", 0.5)]
    ]
    dense = dict(zip(WIDTHS, (2.2, 2.1, 1.9), strict=True))
    rows = [{"arm": dense_arm(w), "seed": seed, "loss": loss} for w, loss in dense.items() for seed in (0, 1)]
    rows += [{"arm": SHALLOW, "seed": seed, "loss": 2.3} for seed in (0, 1)]
    structured = [{"arm": "LowRank", "seed": seed, "loss": 2.05} for seed in (0, 1)]
    found = gaps(rows + structured, blocks, "LowRank", "")
    assert found["wins"] and found["loss_minus_dense_at_equal_products"] == pytest.approx([-0.05, -0.05])
    structured[1]["loss"] = 2.11
    assert not gaps(rows + structured, blocks, "LowRank", "")["wins"]
    structured[1]["loss"] = 2.05
    blocks[-1]["cpu_time_over_dense"] = 0.75
    found = gaps(rows + structured, blocks, "LowRank", "")
    assert not found["wins"] and found["loss_minus_dense_at_equal_cpu_time"] == pytest.approx([0.05, 0.05])
    rows[-1]["loss"] = 2.0
    assert not gaps(rows + structured, blocks, "LowRank", "")["wins"]  # one layer is the better dense model
