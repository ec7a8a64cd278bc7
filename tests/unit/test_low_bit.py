"""Products of 8-bit rows: values by hand, error and bias of a product, devices, and LoRA on top."""

from __future__ import annotations

import math

import pytest
import torch

from hf_effi.errors import RefusedError
from hf_effi.kernels import low_bit
from hf_effi.kernels.fused_lora import LoRAWeights, fused_lora, fused_lora_reference
from hf_effi.kernels.low_bit import FORMATS, LowBitWeight, QuantizedRows, check_device, quantize_rows

EACH_FORMAT = pytest.mark.parametrize("format", FORMATS)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def relative(found, truth):
    return ((found.double() - truth.double()).norm() / truth.double().norm()).item()


# --- rounding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "format", "values", "scale"),
    [
        ([1.0, -2.0, 4.0], "int8", [32, -64, 127], 4 / 127),  # 31.75, -63.5 (a tie, to even), 127
        ([1.0, -2.0, 4.0], "fp8", [112, -224, 448], 4 / 448),
        ([254.0, 1.0, 3.0], "int8", [127, 0, 2], 2.0),  # 0.5 and 1.5 are ties
        ([448.0, 17.0, 19.0, 1.1, 2**-10], "fp8", [448, 16, 20, 1.125, 0], 1.0),  # 16, 18, 20 exist; 2^-10 is a tie
        ([0.0, 0.0, 0.0], "fp8", [0, 0, 0], low_bit.FLOOR / 448),
        ([3.0, 3.0, 3.0], "int8", [127, 127, 127], 3 / 127),
        ([-5.0], "int8", [-127], 5 / 127),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_by_hand(row, format, values, scale, dtype):
    found = quantize_rows(torch.tensor([row], dtype=dtype), format)
    assert found.values.dtype == FORMATS[format].dtype and found.scale.dtype == torch.float32
    assert found.values.float().tolist() == [values]
    assert found.scale.item() == pytest.approx(scale)


@EACH_FORMAT
def test_each_row_has_its_own_scale(format):
    x = torch.tensor([[1.0, 2.0], [100.0, 200.0], [1e-6, 2e-6]])
    found = quantize_rows(x, format)
    assert torch.equal(found.values[0].float(), found.values[1].float())
    torch.testing.assert_close(found.dense(), x, rtol=0.02, atol=0)


@EACH_FORMAT
def test_column_scale_is_multiplied_in_first(format):
    x, columns = normal(3, 8), torch.rand(8, generator=torch.Generator().manual_seed(1)) + 0.5
    found, expected = quantize_rows(x, format, columns), quantize_rows(x * columns, format)
    assert torch.equal(found.values.float(), expected.values.float()) and torch.equal(found.scale, expected.scale)


@EACH_FORMAT
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_stays_so_and_the_others_are_whole(format, bad):
    x = normal(3, 16)
    x[1, 4] = bad
    y = LowBitWeight.of(normal(16, 16, seed=1), format).product(quantize_rows(x, format), torch.float32)
    assert not y[1].isfinite().any() and y[[0, 2]].isfinite().all()


@EACH_FORMAT
def test_no_rows(format):
    weight = LowBitWeight.of(normal(16, 32), format)
    assert weight.product(quantize_rows(torch.zeros(0, 32), format), torch.bfloat16).shape == (0, 16)
    assert weight.grad_input(torch.zeros(0, 16), torch.float32).shape == (0, 32)


def test_no_gradient_passes():
    x = normal(3, 16).requires_grad_()
    rows = quantize_rows(x, "int8")
    assert not rows.scale.requires_grad
    assert not LowBitWeight.of(normal(16, 16), "int8").product(rows, torch.float32).requires_grad


# --- products --------------------------------------------------------------------------------------------------------


@EACH_FORMAT
@pytest.mark.parametrize(("rows", "size_in", "size_out"), [(1, 16, 16), (5, 48, 32), (64, 256, 128)])
def test_products_are_those_of_the_rounded_matrices(format, rows, size_in, size_out):
    x, weight = (
        quantize_rows(normal(rows, size_in), format),
        LowBitWeight.of(normal(size_out, size_in, seed=1), format),
    )
    dense = weight.rows.dense().double()
    assert relative(weight.product(x, torch.float32), x.dense().double() @ dense.t()) < 1e-6
    grad = normal(rows, size_out, seed=2)
    folded = quantize_rows(grad * weight.rows.scale.view(-1), format).dense().double()
    expected = folded @ weight.rows.values.double()
    assert relative(weight.grad_input(grad, torch.float32), expected) < 1e-6
    assert weight.product(x, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(("format", "most"), [("fp8", 0.04), ("int8", 0.013)])
@pytest.mark.parametrize("seed", range(3))
def test_error_of_a_product(format, most, seed):
    """
    At most 4 % by norm, and no bias: errors average to nothing, and the best factor between found and true is 1.

    Rounding to nearest takes about its own square off that factor, 0.025^2 for each operand in e4m3.
    """
    x, w, grad = normal(256, 512, seed=seed), 0.02 * normal(384, 512, seed=10 + seed), normal(256, 384, seed=20 + seed)
    weight = LowBitWeight.of(w, format)
    pairs = [
        (weight.product(quantize_rows(x, format), torch.float32), x @ w.t()),
        (weight.grad_input(grad, torch.float32), grad @ w),
    ]
    for found, truth in pairs:
        assert relative(found, truth) <= most
        error = (found - truth).double()
        assert abs((found * truth).sum() / truth.square().sum() - 1) < 2e-3
        assert abs(error.mean()) < 4 * error.std() / error.numel() ** 0.5
        assert torch.cosine_similarity(found.flatten(), truth.flatten(), dim=0) >= 0.998


@EACH_FORMAT
def test_bytes_and_error_of_a_weight(format):
    w = normal(32, 64)
    weight = LowBitWeight.of(w, format)
    assert weight.nbytes == 32 * 64 + 32 * 4
    assert weight.relative_error(w) == pytest.approx(relative(weight.rows.dense(), w), rel=1e-5)
    assert LowBitWeight.of(torch.zeros(8, 8), format).relative_error(torch.zeros(8, 8)) == 0.0


def test_rows_are_padded_for_a_gpu():
    rows = quantize_rows(normal(3, 8), "fp8")
    padded = low_bit._padded(rows)
    assert padded.values.shape == (32, 8) and padded.scale.shape == (32, 1)
    assert torch.equal(padded.values[:3].float(), rows.values.float()) and not padded.values[3:].float().any()
    assert len(low_bit._padded(quantize_rows(normal(33, 8), "int8")).values) == 48
    whole = quantize_rows(normal(64, 8), "int8")
    assert low_bit._padded(whole) is whole


@pytest.mark.parametrize("rows", [1, 17, 64])
def test_arguments_of_the_product_on_a_gpu(monkeypatch, rows):
    """`_scaled_mm` gets rows in multiples of 16, a second operand whose summed dimension is dense, and 2-d scales."""
    calls = []

    def scaled_mm(a, b, scale_a, scale_b, *, out_dtype, use_fast_accum):
        calls.append((a.shape, b.stride(), scale_a.shape, scale_b.shape, scale_b.is_contiguous()))
        return ((a.float() * scale_a) @ (b.float() * scale_b)).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    monkeypatch.setattr(low_bit, "_on_gpu", lambda tensor: True)
    w, x, grad = normal(32, 16), normal(rows, 16), normal(rows, 32)
    weight = LowBitWeight.of(w, "fp8")
    y, dx = weight.product(quantize_rows(x, "fp8"), torch.float32), weight.grad_input(grad, torch.float32)
    assert y.shape == (rows, 32) and relative(y, x @ w.t()) < 0.06
    assert dx.shape == (rows, 16) and relative(dx, grad @ w) < 0.06
    padded = max(32, math.ceil(rows / 16) * 16)
    assert calls == [
        ((padded, 16), (1, 16), (padded, 1), (1, 32), True),
        ((padded, 32), (1, 32), (padded, 1), (1, 16), True),
    ]


# --- devices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "capability", "message"),
    [
        ("fp8", (9, 0), None),
        ("fp8", (10, 0), None),
        ("int8", (7, 5), None),
        ("int8", (12, 0), None),
        ("fp8", (8, 0), r"Card has compute capability 8\.0, and row-wise FP8 .* Use format='int8'"),
        ("fp8", (8, 9), "Use format='int8'"),
        ("fp8", (12, 0), "Use format='int8'"),
        ("fp8", (7, 0), "FusedLoRALinear"),
        ("int8", (7, 0), r"Card has compute capability 7\.0, and products of 8 bits need 7\.5"),
    ],
)
def test_cards(monkeypatch, format, capability, message):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card")
    if message is None:
        check_device(format, torch.device("cuda"))
        return
    with pytest.raises(RefusedError, match=message):
        check_device(format, torch.device("cuda"))


def test_other_devices():
    check_device("fp8", torch.device("cpu"))
    with pytest.raises(RefusedError, match="this is mps"):
        check_device("int8", torch.device("mps"))


def test_a_weight_goes_to_another_device_after_a_look_at_it(monkeypatch):
    asked, weight = [], LowBitWeight.of(normal(16, 16), "fp8")
    monkeypatch.setattr(low_bit, "check_device", lambda format, device: asked.append((format, device.type)))
    assert weight.to(torch.device("cpu")) is weight and not asked
    moved = weight.to(torch.device("meta"))
    assert asked == [("fp8", "meta")] and moved.rows.values.is_meta and moved.rows.scale.is_meta


# --- under an adapter ------------------------------------------------------------------------------------------------


def layer(out, size=32, rank=2, *, bias=False, seed=0, dtype=torch.float32):
    weight, a, b = (normal(*shape, seed=seed + i) for i, shape in enumerate(((out, size), (rank, size), (out, rank))))
    offset = normal(out, seed=seed + 3).to(dtype).requires_grad_() if bias else None
    return LoRAWeights(weight.to(dtype), offset, a.to(dtype).requires_grad_(), b.to(dtype).requires_grad_(), 0.5)


def low(weights, format):
    return weights._replace(weight=None, low_bit=LowBitWeight.of(weights.weight, format))


def rounded(weights, format):
    """The same layer with the values that 8 bits keep, in the dtype of before."""
    return weights._replace(weight=LowBitWeight.of(weights.weight, format).rows.dense().to(weights.weight.dtype))


@EACH_FORMAT
def test_the_adapter_is_exact(format):
    """Output and every gradient of adapter and bias: those of a plain layer whose `W x` is the 8-bit product."""
    linears = [layer(16, bias=True), layer(32, rank=3, seed=7)]
    x = normal(2, 5, 32, seed=30).requires_grad_()
    ours = fused_lora(x, [low(w, format) for w in linears])
    exact = fused_lora_reference(
        quantize_rows(x.detach().view(10, 32), format).dense(), [rounded(w, format) for w in linears]
    )
    plain = fused_lora_reference(
        x.detach().view(10, 32), [w._replace(weight=torch.zeros_like(w.weight), bias=None) for w in linears]
    )
    of_rounded = fused_lora_reference(
        quantize_rows(x.detach().view(10, 32), format).dense(),
        [w._replace(weight=torch.zeros_like(w.weight), bias=None) for w in linears],
    )
    for y, base, adapter, unwanted in zip(ours, exact, plain, of_rounded, strict=True):
        torch.testing.assert_close(y.view(10, -1), base - unwanted + adapter, rtol=1e-4, atol=1e-4)
    leaves = [t for w in linears for t in (w.bias, w.a, w.b) if t is not None]
    directions = [normal(*y.shape, seed=40 + i) for i, y in enumerate(ours)]
    found = torch.autograd.grad(ours, [x, *leaves], directions)
    truth = torch.autograd.grad(fused_lora_reference(x, linears), [x, *leaves], directions)
    assert relative(found[0], truth[0]) < FORMATS[format].error_budget
    for mine, exact_grad in zip(found[1:], truth[1:], strict=True):
        torch.testing.assert_close(mine, exact_grad, rtol=1e-4, atol=1e-4)


def test_siblings_round_their_input_once(monkeypatch):
    calls, real = [], quantize_rows

    def counted(x, format, column_scale=None):
        calls.append((tuple(x.shape), column_scale is not None))
        return real(x, format, column_scale)

    monkeypatch.setattr("hf_effi.kernels.fused_lora.quantize_rows", counted)
    monkeypatch.setattr(low_bit, "quantize_rows", counted)
    linears = [low(layer(16, seed=i), "int8") for i in range(3)]
    calls.clear()
    x = normal(4, 32).requires_grad_()
    outputs = fused_lora(x, linears)
    assert calls == [((4, 32), False)]
    sum(y.sum() for y in outputs).backward()
    assert calls[1:] == 3 * [((4, 16), True)], "each gradient has its own rounding"


def test_rank_zero_is_the_base_alone():
    weights = low(layer(16, bias=True), "int8")
    x = normal(4, 32)
    base = weights._replace(a=x.new_empty(0, 32), b=x.new_empty(16, 0))
    (y,) = fused_lora(x, [base])
    expected = weights.low_bit.product(quantize_rows(x, "int8"), torch.float32) + weights.bias
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@EACH_FORMAT
def test_half_precision(format, dtype):
    x, weights = normal(6, 32).to(dtype), layer(16, dtype=dtype)
    (y,) = fused_lora(x, [low(weights, format)])
    (truth,) = fused_lora_reference(
        x.double(), [LoRAWeights(*(t.double() if isinstance(t, torch.Tensor) else t for t in weights))]
    )
    assert y.dtype == dtype and relative(y, truth) < FORMATS[format].error_budget


def test_dense_of_a_quantized_matrix():
    assert QuantizedRows(torch.tensor([[2, 3]], dtype=torch.int8), torch.tensor([[0.5]])).dense().tolist() == [
        [1.0, 1.5]
    ]
