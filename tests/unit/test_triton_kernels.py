"""
Our Triton kernels by triton's interpreter on CPU tensors, against fp32 truth and the error of torch in the dtype.
"""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

from hf_effi._compat import is_available
from tests.helpers import run_distributed

pytestmark = pytest.mark.skipif(not is_available("triton"), reason="triton is an optional package: extra `kernels`")

DTYPES = (torch.float32, torch.float16)
#: rows, width, vocabulary: one of each, and what is no multiple of a block or a tile
HEADS = {"one": (1, 3, 1), "odd": (11, 6, 29), "blocks": (8, 4, 32)}
SCALINGS = {"plain": {}, "all": {"temperature": 1.3, "softcap": 5.0, "logit_scale": -0.6}}
ROWS = {"one": (1, 1), "odd": (3, 5), "wide": (7, 33), "blocks": (4, 64), "none": (0, 4)}
GATES = {"one": (1,), "odd": (3, 43), "blocks": (4, 64), "none": (0, 4)}
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
MERGES = {"one": (1, 1), "odd": (3, 5, 7), "wide": (2, 33), "none": (0, 4)}


def errors(found, own, truth):
    """Return `(error, error of torch in the same dtype)` for each result, relative to the largest entry."""

    def error(one, two):
        scale = max(two.double().abs().max().item(), 1e-30) if two.numel() else 1.0
        return (one.double() - two.double()).abs().max().item() / scale if two.numel() else 0.0

    return [(error(a, t), error(b, t)) for a, b, t in zip(found, own, truth, strict=True)]


def in_interpreter():
    """Run every case with Triton's kernels and again with torch; everything interpreted runs in this one process."""
    import os

    os.environ["TRITON_INTERPRET"] = "1"
    import hf_effi.kernels.lm_head as lm_head
    from hf_effi.attention import _merge_triton as _attention_merge_triton
    from hf_effi.attention.merge import merge_attention, merge_attention_reference
    from hf_effi.kernels import _gated_product_triton, _lm_head_triton
    from tests.unit.test_attention_merge import gradients as merge_gradients
    from tests.unit.test_attention_merge import partials
    from tests.unit.test_lm_head import gradients, inputs, peaked, upstream

    lm_head.ROW_CHUNK, lm_head.VOCABULARY_TILE = 8, 24
    _lm_head_triton.FOLD_COLUMNS, _lm_head_triton.GRAD_ROWS, _lm_head_triton.GRAD_COLUMNS = 16, 4, 16
    _attention_merge_triton.ELEMENTS = _gated_product_triton.BLOCK = 64
    launches = count_launches()

    def head(dtype, size, scaling, wide=False, **options):
        tensors = [
            t.to(torch.float64 if wide else dtype).detach().requires_grad_() if t.is_floating_point() else t
            for t in inputs(*size, dtype=dtype)
        ]
        out = lm_head.lm_head_log_probs(*tensors, outputs=lm_head.OUTPUTS, **scaling, **options)
        on = upstream(size[0], dtype=out.log_probs.dtype)
        leaves = (tensors[0], tensors[1], tensors[3])
        grads = gradients(out, leaves, *on) + gradients(
            lm_head.lm_head_log_probs(*tensors, grad_in_forward=True, **scaling), leaves, on[0][0]
        )
        return [x.detach() for x in out], list(grads)

    def by_torch(function, *args):
        del os.environ["TRITON_INTERPRET"]
        try:
            return function(*args)
        finally:
            os.environ["TRITON_INTERPRET"] = "1"

    def merge(dtype, shape, wide=False):
        leaves = partials(*shape, dtype=dtype)
        if wide:
            leaves = [t.detach().double().requires_grad_() for t in leaves]
        merged = (merge_attention_reference if wide else merge_attention)(*leaves)
        return [t.detach() for t in merged], list(merge_gradients(merged, leaves))

    found = {}
    for dtype in DTYPES:
        for size in HEADS:
            for scaling in SCALINGS:
                case = (dtype, HEADS[size], SCALINGS[scaling])
                found["head", dtype, size, scaling] = [
                    errors(*parts) for parts in zip(head(*case), by_torch(head, *case), head(*case, True), strict=True)
                ]
        for shape in MERGES:
            case = (dtype, MERGES[shape])
            found["merge", dtype, shape] = [
                errors(*parts) for parts in zip(merge(*case), by_torch(merge, *case), merge(*case, True), strict=True)
            ]
    hidden, weight, targets = (t.float().detach() if t.is_floating_point() else t for t in peaked())
    hidden.requires_grad_()

    def filtered():
        counters = lm_head.LMHeadCounters()
        out = lm_head.lm_head_log_probs(hidden, weight, targets, column_eps=1e-3, counters=counters)
        return counters, torch.autograd.grad(out.log_probs.sum(), hidden)[0]

    found["filter"] = filtered(), by_torch(filtered)
    out_a, lse_a, out_b, lse_b = partials(3, 4, dtype=torch.float32)
    with torch.no_grad():
        lse_a[0], out_a[0], lse_a[2], lse_b[2] = -math.inf, math.nan, -math.inf, -math.inf
    merged = merge_attention(out_a, lse_a, out_b, lse_b)
    found["rows"] = quantized_rows(by_torch)
    found |= {("gate", *case): gated_products(by_torch, *case) for case in product(DTYPES, GATES, ACTIVATIONS)}
    found["tiles"] = tiled_mlp(), by_torch(tiled_mlp)
    found["empty"] = [t.detach() for t in (*merged, out_b, *merge_gradients(merged, (out_a, lse_a, out_b, lse_b)))]
    return found, launches


def gated_products(by_torch, dtype, shape, activation):
    """
    Return `(error, error of torch)` of the product and of what its backward returns; with zeros and huge entries.
    """
    from hf_effi.kernels.gated_product import gated_product, gated_product_backward

    generator = torch.Generator().manual_seed(3)
    grad, g, u = (4 * torch.randn(GATES[shape], generator=generator).to(dtype) for _ in range(3))
    if g.numel() > 2:
        g.view(-1)[:3] = torch.tensor([0.0, 100.0, -100.0])

    def run(wide=False):
        parts = [t.double() if wide else t.clone() for t in (grad, g, u)]  # fp64 stays with torch
        forward = gated_product(parts[1].clone(), parts[2], activation)
        return [forward, *gated_product_backward(*parts, activation)]

    return errors(run(), by_torch(run), run(wide=True))


def tiled_mlp():
    """Return the output of a tiled MLP and the gradients of its input and weights."""
    from hf_effi.kernels import tile_mlp
    from tests.unit.test_tiled_mlp import MLP, run

    torch.manual_seed(0)
    mlp, x = MLP(bias=True), torch.randn(13, 7)
    with tile_mlp(mlp, 3):
        out, grads = run(mlp, x)
    return [out, *grads.values()]


def quantized_rows(by_torch):
    """Return 8-bit rows by Triton and by torch, with a row of zeros, and rows that are not finite."""
    from triton.runtime import interpreter

    from hf_effi.kernels.low_bit import quantize_rows

    convert = interpreter._convert_float

    def convert_as_a_gpu(data, source, target, rounding):
        # Triton 3.9's interpreter loses the carry when it rounds up to a power of two.
        if str(target) != "fp8e4nv":
            return convert(data, source, target, rounding)
        return torch.from_numpy(data).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    interpreter._convert_float = convert_as_a_gpu
    found = {}
    for dtype in (*DTYPES, torch.bfloat16):
        for name, shape in ROWS.items():
            generator = torch.Generator().manual_seed(5)
            x = torch.randn(shape, generator=generator).to(dtype)
            columns = torch.rand(shape[1], generator=generator) + 0.5
            for row, value in ((1, 0.0), (2, math.nan), (3, math.inf)):
                if row < len(x):
                    x[row, slice(None) if value == 0.0 else 0] = value
            wide = torch.cat([x, x], 1)[:, : shape[1]]  # rows that do not lie side by side
            for format in ("fp8", "int8"):
                for kind, case in {
                    "plain": (x, format),
                    "columns": (x, format, columns),
                    "apart": (wide, format),
                }.items():
                    pair = quantize_rows(*case), by_torch(quantize_rows, *case)
                    found[dtype, name, format, kind] = [(p.values.float(), p.scale) for p in pair]
    return found


def count_launches():
    """Return a dict that counts the launches of each kernel: a test of torch against torch would prove nothing."""
    from triton.runtime import interpreter

    counts: dict[str, int] = {}
    run = interpreter.GridExecutor.__call__

    def counted(self, *args, **kwargs):
        counts[self.fn.__name__] = counts.get(self.fn.__name__, 0) + 1
        return run(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = counted
    return counts


@pytest.fixture(scope="module")
def interpreted():
    (result,) = run_distributed(in_interpreter, 1, fresh=True)
    return result


@pytest.fixture
def found(interpreted):
    return interpreted[0]


def test_every_kernel_was_launched(interpreted):
    assert set(interpreted[1]) == {
        "_lm_head_fwd_kernel",
        "_lm_head_bwd_kernel",
        "_attention_merge_fwd_kernel",
        "_attention_merge_bwd_kernel",
        "_quantize_rows_fwd_kernel",
        "_gated_product_fwd_kernel",
        "_gated_product_bwd_kernel",
    }


def assert_as_good_as_torch(pairs, dtype):
    for results in pairs:
        for error, own in results:
            assert error <= 2 * own + 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("size", HEADS)
def test_lm_head(found, dtype, size, scaling):
    assert_as_good_as_torch(found["head", dtype, size, scaling], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", MERGES)
def test_attention_merge(found, dtype, shape):
    assert_as_good_as_torch(found["merge", dtype, shape], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", GATES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_product(found, dtype, shape, activation):
    assert_as_good_as_torch([found["gate", dtype, shape, activation]], dtype)


def test_tiles_are_those_of_torch(found):
    ours, by_torch = found["tiles"]
    assert len(ours) == 8 and ours[0].shape == (13, 7)
    for one, other in zip(ours, by_torch, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_the_same_columns_are_dropped(found):
    (ours, grad), (by_torch, expected) = found["filter"]
    assert ours.columns_skipped == by_torch.columns_skipped > 0
    assert ours.dropped_mass == pytest.approx(by_torch.dropped_mass, rel=1e-4)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-6)


def test_queries_without_keys(found):
    out, lse, out_b, *grads = found["empty"]
    assert torch.equal(out[0], out_b[0]) and not out[2].any()
    assert lse[2] == -math.inf and lse[:2].isfinite().all()
    assert all(g.isfinite().all() for g in grads)


def test_rows_of_eight_bits(found):
    """The same values and scales as torch, to the bit; a row that is not finite has no finite product."""
    assert len(found["rows"]) == 3 * 5 * 2 * 3
    for case, ((values, scale), (expected, expected_scale)) in found["rows"].items():
        finite = expected_scale.flatten().isfinite()
        assert finite.sum() == min(2, len(finite)) + max(0, len(finite) - 4), case
        assert torch.equal(values[finite], expected[finite]) and torch.equal(scale[finite], expected_scale[finite]), (
            case
        )
        assert not (values * scale)[~finite].isfinite().any(), case
