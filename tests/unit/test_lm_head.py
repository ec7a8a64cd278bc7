"""The LM head in tiles against autograd through the full logits."""

from __future__ import annotations

import math

import pytest
import torch

import hf_effi.kernels.lm_head as lm_head
from hf_effi.kernels.lm_head import LMHeadCounters, lm_head_log_probs, lm_head_reference

SCALINGS = [{}, {"temperature": 0.7}, {"softcap": 3.0}, {"temperature": 1.3, "softcap": 5.0, "logit_scale": -0.6}]
ALL = lm_head.OUTPUTS


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several chunks of rows and tiles of columns, the last of each incomplete."""
    monkeypatch.setattr(lm_head, "ROW_CHUNK", 4)
    monkeypatch.setattr(lm_head, "VOCABULARY_TILE", 8)


def inputs(rows=11, width=6, vocabulary=29, dtype=torch.float64, seed=0, bias=True):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator, dtype=dtype).requires_grad_()
    offset = torch.randn(vocabulary, generator=generator, dtype=dtype).requires_grad_() if bias else None
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    return hidden, weight, targets, offset


def gradients(found, leaves, on_log_probs, on_entropy=None):
    loss = (found.log_probs * on_log_probs).sum()
    if on_entropy is not None:
        loss = loss + (found.entropy * on_entropy).sum()
    return torch.autograd.grad(loss, [leaf for leaf in leaves if leaf is not None and leaf.requires_grad])


def upstream(rows, seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, rows, generator=generator, dtype=dtype).unbind()


def test_uniform_logits_by_hand():
    found = lm_head_log_probs(torch.ones(2, 3), torch.zeros(10, 3), torch.tensor([0, 7]), outputs=ALL)
    torch.testing.assert_close(found.log_probs, torch.full((2,), -math.log(10)))
    torch.testing.assert_close(found.entropy, torch.full((2,), math.log(10)))
    torch.testing.assert_close(found.log_sum_sq_probs, torch.full((2,), -math.log(10)))
    assert found.mean_logits.tolist() == [0.0, 0.0]
    assert found.is_top1.tolist() == [True, False], "of equal logits the first is the prediction"


def test_two_tokens_by_hand():
    hidden = torch.tensor([[math.log(3.0)]], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[1.0], [0.0]], dtype=torch.float64, requires_grad=True)  # p = (3/4, 1/4)
    found = lm_head_log_probs(hidden, weight, torch.tensor([0]), outputs=ALL)
    assert found.log_probs.item() == pytest.approx(math.log(0.75))
    assert found.log_sum_sq_probs.item() == pytest.approx(math.log(10 / 16))
    assert found.entropy.item() == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    found.log_probs.sum().backward()
    assert hidden.grad.item() == pytest.approx(0.25)
    torch.testing.assert_close(weight.grad, torch.tensor([[0.25], [-0.25]], dtype=torch.float64) * math.log(3))


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_equals_autograd_in_double(scaling, bias):
    hidden, weight, targets, offset = inputs(bias=bias)
    expected = lm_head_reference(hidden, weight, targets, offset, **scaling)
    found = lm_head_log_probs(hidden, weight, targets, offset, outputs=ALL, **scaling)
    for name, one, two in zip(found._fields, found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12, msg=name)
    weights = upstream(len(targets))
    leaves = (hidden, weight, offset)
    for one, two in zip(gradients(found, leaves, *weights), gradients(expected, leaves, *weights), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 3, 8), (4, 5, 9), (5, 2, 16), (13, 7, 17)], ids=str)
def test_odd_sizes(shape):
    hidden, weight, targets, offset = inputs(*shape)
    expected = lm_head_reference(hidden, weight, targets, offset)
    found = lm_head_log_probs(hidden, weight, targets, offset, outputs=ALL)
    torch.testing.assert_close(found.log_probs, expected.log_probs)
    ones = torch.ones(shape[0], dtype=torch.float64)
    for one, two in zip(
        gradients(found, (hidden, weight, offset), ones), gradients(expected, (hidden, weight, offset), ones),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_ignored_rows_are_zero_and_have_no_gradient():
    hidden, weight, targets, offset = inputs()
    targets[::2] = -100
    shaped = hidden.view(1, *hidden.shape), targets.view(1, -1)
    found = lm_head_log_probs(shaped[0], weight, shaped[1], offset, outputs=ALL)
    expected = lm_head_reference(shaped[0], weight, shaped[1], offset)
    for one, two in zip(found, expected, strict=True):
        assert one.shape == targets.view(1, -1).shape
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
    weights = upstream(len(targets))
    ours = gradients(found, (hidden, weight, offset), *weights)
    for one, two in zip(ours, gradients(expected, (hidden, weight, offset), *weights), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
    assert not ours[0][::2].any()


@pytest.mark.parametrize("grad_in_forward", [False, True])
def test_all_rows_ignored_or_none_at_all(grad_in_forward):
    for rows in (3, 0):
        hidden, weight, targets, _ = inputs(rows=rows)
        targets.fill_(-100)
        found = lm_head_log_probs(hidden, weight, targets, outputs=ALL, grad_in_forward=grad_in_forward)
        assert found.log_probs.requires_grad and not found.log_probs.any()
        ours = gradients(found, (hidden, weight), torch.ones(rows, dtype=torch.float64))
        assert not any(grad.any() for grad in ours)


def test_rows_without_upstream_gradient_are_not_computed(monkeypatch):
    hidden, weight, targets, offset = inputs()
    on_log_probs, on_entropy = upstream(len(targets))
    on_log_probs[[0, 3, 4]] = 0.0
    on_entropy[[0, 3, 7]] = 0.0
    seen = []
    compute = lm_head.product
    monkeypatch.setattr(lm_head, "product", lambda h, *rest: (seen.append(h.shape[0]), compute(h, *rest))[1])
    counters = LMHeadCounters()
    found = lm_head_log_probs(hidden, weight, targets, offset, outputs=ALL, counters=counters)
    ours = gradients(found, (hidden, weight, offset), on_log_probs, on_entropy)
    expected = lm_head_reference(hidden, weight, targets, offset)
    for one, two in zip(ours, gradients(expected, (hidden, weight, offset), on_log_probs, on_entropy), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
    assert (counters.rows, counters.rows_skipped) == (11, 2)
    assert sum(seen) == 9 * 4, "nine rows for each of four tiles"
    found = lm_head_log_probs(hidden, weight, targets, offset, outputs=ALL)
    seen.clear()
    assert not any(g.any() for g in gradients(found, (hidden, weight, offset), 0 * on_log_probs, 0 * on_entropy))
    assert not seen


def test_nan_upstream_is_not_skipped():
    hidden, weight, targets, _ = inputs()
    on_log_probs = torch.zeros(len(targets), dtype=torch.float64)
    on_log_probs[2] = math.nan
    ours = gradients(lm_head_log_probs(hidden, weight, targets, column_eps=0.1), (hidden, weight), on_log_probs)
    assert ours[0][2].isnan().all() and not ours[0][3:].any() and ours[1].isnan().all()


def test_frozen_head_gets_no_gradient():
    hidden, weight, targets, _ = inputs()
    weight.requires_grad_(False)
    for options in ({}, {"grad_in_forward": True}):
        (ours,) = gradients(lm_head_log_probs(hidden, weight, targets, **options), (hidden, weight), torch.tensor(2.0))
        (theirs,) = gradients(lm_head_reference(hidden, weight, targets), (hidden, weight), torch.tensor(2.0))
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
@pytest.mark.parametrize("kept", [10**9, 29 * 8 * 3])
def test_gradient_in_the_forward(monkeypatch, scaling, kept):
    monkeypatch.setattr(lm_head, "KEPT_LOGIT_BYTES", kept)
    hidden, weight, targets, offset = inputs()
    targets[2] = -100
    counters = LMHeadCounters()
    found = lm_head_log_probs(
        hidden, weight, targets, offset, outputs=ALL, grad_in_forward=True, counters=counters, **scaling
    )
    expected = lm_head_reference(hidden, weight, targets, offset, **scaling)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
    leaves, mean = (hidden, weight, offset), torch.tensor(-0.3, dtype=torch.float64)
    for one, two in zip(gradients(found, leaves, mean), gradients(expected, leaves, mean), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
    assert counters.recomputed == 0


def test_gradient_in_the_forward_honours_any_upstream():
    hidden, weight, targets, offset = inputs()
    for weights in (upstream(len(targets)), (torch.ones(len(targets)).double(), upstream(len(targets))[1])):
        counters = LMHeadCounters()
        found = lm_head_log_probs(
            hidden, weight, targets, offset, outputs=("entropy",), grad_in_forward=True, counters=counters
        )
        expected = lm_head_reference(hidden, weight, targets, offset)
        leaves = (hidden, weight, offset)
        for one, two in zip(gradients(found, leaves, *weights), gradients(expected, leaves, *weights), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
        assert counters.recomputed == 1


def test_without_gradients_nothing_is_computed_ahead(monkeypatch):
    monkeypatch.setattr(lm_head, "_forward_with_gradients", None)
    with torch.no_grad():
        assert not lm_head_log_probs(*inputs(), grad_in_forward=True).log_probs.requires_grad


def peaked(rows=12, width=16, vocabulary=64):
    """A head that has learned: each hidden state points at its target, and targets lie in one tile."""
    hidden, weight, targets, _ = inputs(rows, width, vocabulary)
    targets = targets % 8
    hidden = (8 * weight[targets] / weight[targets].norm(dim=-1, keepdim=True)).detach().requires_grad_()
    return hidden, weight, targets


@pytest.mark.parametrize("filter_weight", [False, True])
@pytest.mark.parametrize("grad_in_forward", [False, True])
def test_dropped_columns_stay_within_the_bound(filter_weight, grad_in_forward):
    hidden, weight, targets = peaked()
    eps, scaling = 1e-3, {"temperature": 0.8, "logit_scale": 1.5}
    counters = LMHeadCounters()
    found = lm_head_log_probs(
        hidden, weight, targets, column_eps=eps, filter_weight=filter_weight, grad_in_forward=grad_in_forward,
        counters=counters, **scaling,
    )  # fmt: skip
    ours = gradients(found, (hidden, weight), torch.tensor(2.0))
    exact = gradients(lm_head_reference(hidden, weight, targets, **scaling), (hidden, weight), torch.tensor(2.0))
    threshold = eps * 1.5 / 0.8 * 2.0
    assert 0 < counters.columns_skipped < counters.columns
    assert 0 < counters.dropped_mass_per_row < eps * counters.columns_skipped
    error = (ours[0] - exact[0]).abs()
    assert error.max() > 1e-12, "something was dropped"
    assert (error <= threshold * weight.detach().abs().sum(0)).all()
    if filter_weight:
        assert ((ours[1] - exact[1]).abs() <= threshold * hidden.detach().abs().sum(0)).all()
        assert not torch.equal(ours[1], exact[1])
    else:
        torch.testing.assert_close(ours[1], exact[1], rtol=1e-12, atol=1e-12)


def test_targets_are_never_dropped():
    weight = torch.eye(40, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([3, 20])
    hidden = (30 * weight[targets]).detach().requires_grad_()  # p of each target is 1 - 4e-12
    hidden.data[1] *= 0.1
    ours = gradients(
        lm_head_log_probs(hidden, weight, targets, column_eps=0.9, filter_weight=True), (hidden, weight),
        torch.ones(2).double(),
    )  # fmt: skip
    exact = gradients(lm_head_reference(hidden, weight, targets), (hidden, weight), torch.ones(2).double())
    torch.testing.assert_close(ours[1][targets], exact[1][targets])
    assert not ours[1][30:].any() and exact[1][30:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_autocast(dtype):
    hidden, weight, targets, offset = inputs(dtype=dtype)
    truth = lm_head_reference(*(x.double() if x.is_floating_point() else x for x in inputs(dtype=dtype)))
    own = lm_head_reference(hidden, weight, targets, offset)
    found = lm_head_log_probs(hidden, weight, targets, offset, outputs=("entropy",))
    assert found.log_probs.dtype == found.entropy.dtype == torch.float32
    allowed = 2 * (own.log_probs - truth.log_probs).abs().max() + 1e-5
    assert (found.log_probs - truth.log_probs).abs().max() <= allowed
    for grad, leaf in zip(
        gradients(found, (hidden, weight, offset), torch.ones(())), (hidden, weight, offset), strict=True
    ):
        assert grad.dtype == dtype and grad.shape == leaf.shape
    if dtype == torch.bfloat16:
        wide = [x.float() if x.is_floating_point() else x for x in inputs(dtype=dtype)]
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(lm_head_log_probs(*wide).log_probs, found.log_probs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"softcap": -1.0}, "softcap=-1.0"),
        ({"column_eps": 1.0}, "column_eps=1.0"),
        ({"filter_weight": True}, "filter_weight"),
        ({"outputs": ("entropie",)}, "entropie"),
        ({"targets": torch.full((11,), 29)}, "29"),
        ({"targets": torch.full((11,), -1)}, "-1"),
        ({"targets": torch.zeros(10, dtype=torch.long)}, r"\(10,\)"),
    ],
)
def test_bad_settings_are_named(change, message):
    hidden, weight, targets, offset = inputs()
    targets = change.pop("targets", targets)
    with pytest.raises(ValueError, match=message):
        lm_head_log_probs(hidden, weight, targets, offset, **change)
