"""The arithmetic of the 8-bit prototypes by hand, and what the counted times are made of."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from bench import _low_precision as low
from bench.prototypes import coat, int8_fallback, jetfire, unit_scaling


@pytest.fixture
def normal():
    def draw(*shape, seed=0):
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

    return draw


# --- the linear that all of them share -----------------------------------------------------------------------------


def test_a_quantizer_that_rounds_nothing_gives_the_linear(normal):
    x, weight, grad = normal(2, 3, 8), normal(4, 8, seed=1), normal(2, 3, 4, seed=2)
    results = []
    for product in (nn.functional.linear, lambda x, w: low.quantized_linear(x, w, lambda t, role, dim: t)):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        y = product(*leaves)
        y.backward(grad)
        results.append((y, *(leaf.grad for leaf in leaves)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_three_products_see_rounded_operands_along_the_summed_dimension(normal):
    seen = []

    def record(tensor, role, contracted):
        seen.append((role, tuple(tensor.shape), contracted))
        return tensor

    x = normal(5, 8).requires_grad_()
    low.quantized_linear(x, normal(4, 8).requires_grad_(), record).sum().backward()
    assert seen == [
        ("input", (5, 8), 1),
        ("weight", (4, 8), 1),
        ("grad", (5, 4), 1),
        ("weight", (4, 8), 0),
        ("grad", (5, 4), 0),
        ("input", (5, 8), 0),
    ]


def test_only_linears_of_the_layers_are_replaced():
    model = low.quantize_layers(low.build(0), lambda: low.to_bf16)
    replaced = [name for name, module in model.named_modules() if isinstance(module, low.QuantizedLinear)]
    assert len(replaced) == 14 and all(name.startswith("model.layers.") for name in replaced)
    model = low.quantize_layers(low.build(0), lambda: low.int8_by_row, in_bf16=("down_proj",))
    kept = [name for name, m in model.named_modules() if getattr(m, "quantize", None) is low.to_bf16]
    assert kept == [f"model.layers.{layer}.mlp.down_proj" for layer in range(2)]


def test_formats_by_row():
    x = torch.tensor([[127.0, 1.2, -0.4], [0.0, 0.0, 0.0], [254.0, 3.1, 0.9]])
    assert torch.equal(
        low.int8_by_row(x, "input", 1), torch.tensor([[127.0, 1, 0], [0, 0, 0], [254, 4, 0]])
    )  # scales 1, none, 2: 3.1 / 2 rounds to 2, 0.9 / 2 to 0
    assert torch.equal(low.int8_by_row(x.T, "input", 0), low.int8_by_row(x, "input", 1).T)
    y = torch.tensor([[448.0, 17.0, 0.0], [0.0, 0.0, 0.0]])
    assert torch.equal(
        low.fp8_by_row(y, "input", 1), torch.tensor([[448.0, 16, 0], [0, 0, 0]])
    )  # 17 lies between 16, 18


# --- Jetfire -------------------------------------------------------------------------------------------------------


def test_each_block_has_its_own_scale():
    x = torch.tensor([[127.0, 1.2, 0.0, 0.5], [-3.4, 0.0, 0.0, 0.0]])
    q, scale = jetfire.block_int8(x, block=2)
    assert q.dtype == torch.int8 and q.tolist() == [[127, 1, 0, 127], [-3, 0, 0, 0]]
    torch.testing.assert_close(scale, torch.tensor([[1.0, 0.5 / 127]]))


@pytest.mark.parametrize("shape", [(64, 64), (33, 65), (1, 1), (5, 40)])
def test_error_of_a_block_is_at_most_half_its_scale(normal, shape):
    x = normal(*shape)
    _, scale = jetfire.block_int8(x)
    error = (jetfire.round_trip(x) - x).abs()
    assert (error <= jetfire.expand(scale, x.shape) / 2 * (1 + 1e-6)).all()


def test_a_block_of_zeros_and_a_block_of_equals_are_exact():
    for value in (0.0, -2.5):
        x = torch.full((32, 32), value)
        torch.testing.assert_close(jetfire.round_trip(x), x)


def test_a_square_block_serves_both_layouts(normal):
    x = normal(40, 70)
    assert torch.equal(jetfire.round_trip(x.T), jetfire.round_trip(x).T)


def test_an_outlier_costs_its_block_only(normal):
    x = normal(64, 64)
    x[0, 0] = 1000.0
    error = (jetfire.round_trip(x) - x).abs()
    assert error[:32, :32].max() > 1 > 0.05 > error[32:].max()


# --- fallback ------------------------------------------------------------------------------------------------------


def test_an_outlier_block_gets_a_second_term():
    x = torch.tensor([[100.0, 0.3], [0.0, 0.0]])
    without, _ = int8_fallback.with_residual(x, threshold=100.0, block=2)  # not above it
    with_it, rate = int8_fallback.with_residual(x, threshold=99.0, block=2)
    assert without[0, 1] == 0.0 and rate == 1.0
    torch.testing.assert_close(with_it, x)  # 0.3 is the largest of what is left over, so exact


def test_a_second_term_has_about_16_bits(normal):
    x = normal(128, 128)
    _, scale = jetfire.block_int8(x, 128)
    rounded, rate = int8_fallback.with_residual(x, threshold=0.0)
    assert rate == 1.0
    assert (rounded - x).abs().max() <= scale / 508 * (1 + 1e-3)


def test_only_blocks_above_the_threshold_fall_back(normal):
    x = normal(256, 256)
    x[0, 0] = 100.0
    rounded, rate = int8_fallback.with_residual(x, threshold=50.0)
    plain = jetfire.round_trip(x, 128)
    assert rate == 0.25
    assert torch.equal(rounded[128:], plain[128:]) and torch.equal(rounded[:128, 128:], plain[:128, 128:])
    assert (rounded - x)[:128, :128].norm() < 0.01 * (plain - x)[:128, :128].norm()


@pytest.mark.parametrize(("rate", "factor"), [(0.31, 1.3), (0.3, 1.0), (0.1, 1.0), (0.09, 1 / 1.3), (0.0, 1 / 1.3)])
def test_the_threshold_follows_the_rate(rate, factor):
    quantizer = int8_fallback.FallbackQuantizer()
    quantizer.threshold, quantizer.rate = 2.0, rate
    quantizer.adapt()
    assert quantizer.threshold == pytest.approx(2.0 * factor) and quantizer.history == [rate]


def test_the_rate_settles_between_its_bounds(normal):
    quantizer = int8_fallback.FallbackQuantizer()
    x = normal(1280, 128) * normal(10, 1, seed=1).exp().repeat_interleave(128, 0)
    for _ in range(40):
        quantizer(x, "input", 1)
        quantizer.adapt()
    assert 0.1 <= quantizer.rate <= 0.3


def test_weights_and_gradients_do_not_fall_back(normal):
    quantizer, x = int8_fallback.FallbackQuantizer(), normal(128, 128)
    quantizer.threshold = 0.0
    for role in ("weight", "grad"):
        assert torch.equal(quantizer(x, role, 1), jetfire.round_trip(x, 128))
    assert not torch.equal(quantizer(x, "input", 1), jetfire.round_trip(x, 128))


# --- COAT ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "k"),
    # 16 * 16.6147 / log2(ratio), rounded down to sixteenths
    [(2.0**10, 26 / 16), (2.0**20, 13 / 16), (4.0, 132 / 16), (2.0, 265 / 16), (1.0, 265 / 16)],
)
def test_power_of_the_expansion(ratio, k):
    assert coat.power(torch.tensor(ratio)).item() == k


def test_expansion_by_hand():
    x = torch.zeros(128)
    x[:3] = torch.tensor([4.0, -1.0, 2.0])
    packed = coat.compress(x)
    assert packed.values.dtype == torch.float8_e4m3fn and packed.values.shape == (1, 128)
    assert packed.power.item() == 132 / 16 and packed.middle.item() == 2.0
    assert packed.scale.item() == pytest.approx(2 ** (132 / 16) / 448)
    assert packed.values[0, 0].float() == 448.0
    back = coat.restore(packed, x.shape)
    assert back[0] == pytest.approx(4.0) and back[1] < 0 and (back[3:] == 0).all()
    assert back[2] == pytest.approx(2.0, rel=0.01)


@pytest.mark.parametrize("exponent", [-24.0, 0.0, 24.0])
def test_expansion_narrows_the_error_over_three_decades(normal, exponent):
    x = 2.0**exponent * torch.exp2(10 * torch.rand(1000, generator=torch.Generator().manual_seed(0)) - 5)
    error = ((coat.restore(coat.compress(x), x.shape) - x) / x).abs()
    plain = ((coat.unpack(coat.pack(nn.functional.pad(x, (0, 24)).view(1, -1)))[0, :1000] - x) / x).abs()
    assert error.max() < 0.2 and error.median() < 0.8 * plain.median()


@pytest.mark.parametrize("value", [0.0, 1e-30, -3.0])
def test_equal_values_survive(value):
    x = torch.full((130,), value)
    torch.testing.assert_close(coat.restore(coat.compress(x), x.shape), x, rtol=1e-5, atol=0)


def test_coat_begins_as_adamw_and_keeps_two_bytes(normal):
    start, grads = normal(64, 128), [normal(64, 128, seed=s) for s in (1, 2)]
    ends = []
    for make in (coat.CoatAdamW, low.adamw):
        p = nn.Parameter(start.clone())
        optimizer, path = make([p], lr=1e-2), []
        for grad in grads:
            p.grad = grad
            optimizer.step()
            path.append(p.detach().clone())
        ends.append(path)
    torch.testing.assert_close(ends[0][0], ends[1][0])  # the first step sees moments before they are rounded
    assert 0 < (ends[0][1] - ends[1][1]).abs().max() < 2e-3
    optimizer = coat.CoatAdamW([p := nn.Parameter(start.clone())], lr=1e-2)
    p.grad = grads[0]
    optimizer.step()
    found = sum(part.nbytes for name in ("exp_avg", "exp_avg_sq") for part in optimizer.state[p][name])
    assert found == 2 * (1 + 12 / 128) * p.numel()


def test_pack_by_hand(normal):
    x = torch.zeros(2, 256)
    x[0, 0], x[0, 1], x[0, 200] = 448.0, 17.0, 1.0
    values, scale = coat.pack(x)
    assert values.dtype == torch.float8_e4m3fn
    torch.testing.assert_close(scale.flatten(), torch.tensor([1.0, 1 / 448, 1.0, 1.0]))
    back = coat.unpack((values, scale))
    assert back[0, :2].tolist() == [448.0, 16.0] and back[0, 200] == pytest.approx(1.0) and not back[1].any()


def test_saved_activations_take_a_byte_and_move_the_gradient_little():
    tokens = torch.randint(128, (2, 32), generator=torch.Generator().manual_seed(0))
    grads = []
    for prepare in (lambda model: None, coat.SavedInFp8):
        model = low.build(0)
        saved = prepare(model)
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        grads.append((loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    (loss, want), (other_loss, got) = grads
    assert torch.equal(loss, other_loss)  # only what the backward reads is rounded
    assert 0 < low.relative_error(got, want) < 0.05
    assert 0.5 < saved.stored / saved.bf16 < 0.75


# --- unit scaling --------------------------------------------------------------------------------------------------


def test_static_casts_clip_and_flush():
    cast = unit_scaling.StaticCast()
    x = torch.tensor([[1000.0, 1e-5, 17.0, 0.0]])
    assert cast(x, "input", 1).tolist() == [[448.0, 0.0, 16.0, 0.0]]
    assert (cast.overflows, cast.underflows, cast.elements) == (1, 1, 4)
    # e5m2 reaches further at both ends, with one bit less
    assert cast(torch.tensor([[1e5, 2.0**-16, 17.0]]), "grad", 1).tolist() == [[57344.0, 2.0**-16, 16.0]]


def test_dynamic_casts_follow_the_scale(normal):
    x = normal(8, 8)
    for role in ("input", "grad"):
        rounded = unit_scaling.dynamic_cast(x, role, 1)
        assert torch.equal(unit_scaling.dynamic_cast(1024 * x, role, 1), 1024 * rounded)
        assert 0 < low.relative_error(rounded, x) < 0.1
    assert not unit_scaling.dynamic_cast(torch.zeros(2, 2), "input", 1).any()


def test_unit_linear_and_mix_by_hand():
    linear = unit_scaling.UnitLinear(4, 1, bias=False)
    linear.quantize = unit_scaling.StaticCast()
    linear.weight.data = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert linear(torch.ones(1, 4)).item() == 5.0  # 10 / sqrt(4)
    head = unit_scaling.UnitHead(4, 1, bias=False)
    head.weight.data = linear.weight.data
    assert head(torch.ones(1, 4)).item() == 2.5  # 10 / 4
    mixed = unit_scaling.mix(torch.tensor(1.0), torch.tensor(10.0), tau=0.36)
    assert mixed.item() == pytest.approx(0.8 + 6.0)
    assert unit_scaling.loss_scale(512, 128) == 2.0**16


def test_hidden_states_begin_with_unit_scale():
    model = unit_scaling.build_unit_scaled(0)
    tokens = torch.randint(128, (4, 32), generator=torch.Generator().manual_seed(0))
    hidden = model(tokens, output_hidden_states=True).hidden_states
    assert len(hidden) == 3
    for state in hidden:
        assert state.square().mean().sqrt().item() == pytest.approx(1.0, abs=0.1)


# --- counts and verdicts -------------------------------------------------------------------------------------------

SLOW = low.Card(bf16=1.0, int8=2.0, fp8=None, fma=4.0, convert=4.0, bandwidth=1.0)


def test_counted_time_by_hand():
    macs = 3 * low.TOKENS * low.WEIGHTS
    assert low.step_seconds(SLOW, rate=2.0, pass_bytes=0) == macs
    assert low.step_seconds(SLOW, rate=2.0, pass_bytes=4) == macs + 4 * low.OPERANDS
    # a quarter of a second each for conversion and multiply-add, once for each block of the sum
    assert low.step_seconds(SLOW, rate=2.0, pass_bytes=0, block=32) == macs
    assert low.step_seconds(SLOW, rate=200.0, pass_bytes=0, block=32) == pytest.approx(macs / 32 * 0.5)
    assert low.step_seconds(SLOW, 2.0, 0, products=6) == 2 * macs


def test_all_but_one_linear_in_int8():
    """The down projection takes its share of the products at the rate of bf16, and no pass."""
    card = low.Card(bf16=1.0, int8=math.inf, fp8=None, fma=1.0, convert=1.0, bandwidth=math.inf)
    share = 4096 * 14336 / low.WEIGHTS
    assert low.alternatives(card)["int8 by row but down_proj"] == pytest.approx(share * low.alternatives(card)["bf16"])
    card = low.Card(bf16=math.inf, int8=math.inf, fp8=None, fma=1.0, convert=1.0, bandwidth=1.0)
    elements = 8192 * (3 * 4096) + low.WEIGHTS - 4096 * 14336 + 8192 * (2 * 4096 + 2 * 1024 + 2 * 14336)
    assert low.alternatives(card)["int8 by row but down_proj"] == 6 * elements


@pytest.mark.parametrize(("share", "expected"), [(0.424, (1.205, 1.003, 0.731)), (0.2, (1.074, 0.894, 0.656))])
def test_counts_that_the_card_of_fallback_quotes(share, expected):
    rows = low.counted_rows(
        lambda c: low.step_seconds(c, c.int8, low.BLOCK_PASS, products=3 + 2 * share, block=128),
        ["bf16", "fp8 by row", "int8 by row but down_proj"],
    )
    assert [row["ratio"] for row in rows] == pytest.approx(expected, abs=2e-3)


def test_shape_is_llama_8b():
    assert low.WEIGHTS == 4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336
    assert low.step_seconds(low.CARDS["h200"], 790e12, 0) == pytest.approx(13.57e-3, rel=1e-3)


def test_ratio_is_to_the_best_usable_alternative():
    best = low.counted_rows(lambda card: 1.0, ["bf16", "int8 by row", "fp8 by row"])
    bf16 = low.counted_rows(lambda card: 1.0, ["bf16"])
    assert [row["card"] for row in best] == list(low.CARDS)
    for row, other in zip(best, bf16, strict=True):
        times = low.alternatives(low.CARDS[row["card"]])
        assert row["ratio"] == round(1 / min(times.values()), 3)
        assert other["best alternative"] == "bf16" and other["ratio"] == round(1 / times["bf16"], 3)
    assert "fp8 by row ms" not in best[1] and best[1]["card"] == "a100"
    assert not low.counted_rows(lambda card: None, ["bf16"])


def test_gap_and_usable_alternatives():
    runs = {"bf16": (1.0, 2.0, 3.0), "int8 by row": (1.5, 2.5, 3.5), "fp8 by row": (3.0, 4.0, 5.0)}
    rows = [{"arm": arm, "loss": loss} for arm, losses in runs.items() for loss in losses]
    assert low.gap_in_seed_sd(rows, "int8 by row", "bf16") == 0.5
    assert low.gap_in_seed_sd(rows, "fp8 by row", "bf16") == 2.0
    assert low.usable_alternatives(rows) == ["bf16", "int8 by row"]


def test_every_arm_is_tuned_until_its_best_is_inside():
    assert set(low.tune(lambda lr: (lr - 4) ** 2, [2, 4, 8])) == {2, 4, 8}
    assert set(low.tune(lambda lr: -lr, [2, 4, 8])) == {2, 4, 8, 16, 32, 64}
    assert set(low.tune(lambda lr: abs(math.log2(lr)), [2, 4, 8])) == {0.5, 1, 2, 4, 8}
