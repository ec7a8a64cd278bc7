"""The merge of two partial attentions against autograd and against one softmax over all keys."""

from __future__ import annotations

import math

import pytest
import torch

from hf_effi.attention.merge import merge_attention, merge_attention_reference


def partials(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)
    return [
        torch.randn(size, generator=generator, dtype=torch.float64).to(kind).requires_grad_()
        for size, kind in ((shape, dtype), (shape[:-1], wide)) * 2
    ]


def gradients(merged, leaves, seed=1):
    generator = torch.Generator().manual_seed(seed)
    directions = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in merged]
    return torch.autograd.grad(merged, leaves, directions)


def test_by_hand():
    """Three keys of score 0 with mean 1 and one with value 5: mean 2, lse log 4."""
    out, lse = merge_attention(
        torch.tensor([[1.0]]), torch.tensor([math.log(3.0)]), torch.tensor([[5.0]]), torch.zeros(1)
    )
    assert out.item() == pytest.approx(2.0) and lse.item() == pytest.approx(math.log(4.0))


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 7, 3), (2, 3, 4, 16), (0, 4)], ids=str)
def test_equals_autograd(shape):
    leaves = partials(*shape)
    ours, expected = merge_attention(*leaves), merge_attention_reference(*leaves)
    for one, two in zip((*ours, *gradients(ours, leaves)), (*expected, *gradients(expected, leaves)), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_a_query_without_keys_in_one_part_takes_the_other():
    out_a, lse_a, out_b, lse_b = partials(3, 4)
    with torch.no_grad():
        lse_a[0], out_a[0] = -math.inf, math.nan  # no keys in A
        lse_b[1], out_b[1] = -math.inf, math.inf
        lse_a[2] = lse_b[2] = -math.inf
    merged = merge_attention(out_a, lse_a, out_b, lse_b)
    assert torch.equal(merged[0][0], out_b[0]) and torch.equal(merged[0][1], out_a[1]) and not merged[0][2].any()
    assert torch.equal(merged[1], torch.stack([lse_b[0], lse_a[1], lse_a[2]]))
    grads = torch.autograd.grad(merged[0].sum(), (out_a, lse_a, out_b, lse_b))
    assert all(g.isfinite().all() for g in grads)
    assert grads[0][:, 0].tolist() == [0.0, 1.0, 0.0] and grads[2][:, 0].tolist() == [1.0, 0.0, 0.0]
    assert not grads[1].any() and not grads[3].any()


def test_far_apart_scores_do_not_overflow():
    out_a, lse_a, out_b, lse_b = partials(2, 4, dtype=torch.float32)
    merged = merge_attention(out_a, lse_a + 1e4, out_b, lse_b)
    torch.testing.assert_close(merged[0], out_a.detach())
    assert all(g.isfinite().all() for g in gradients(merged, (out_a, lse_a, out_b, lse_b)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_torch(dtype):
    leaves = partials(5, 8, dtype=dtype)
    truth = merge_attention_reference(*(t.double() for t in leaves))
    out, lse = merge_attention(*leaves)
    own = merge_attention_reference(*leaves)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert (out - truth[0]).abs().max() <= (own[0] - truth[0]).abs().max() + 1e-6
    assert [g.dtype for g in gradients((out, lse), leaves)] == [dtype, torch.float32] * 2


def attend(q, k, v, causal):
    """Return `(heads, queries, D)` and its log-sum-exp; the last query sees the last key."""
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(scores.shape[-1] - scores.shape[-2] + 1)
        scores = scores.masked_fill(hidden, -math.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


@pytest.mark.parametrize("suffixes", [(3,), (4, 1, 2)], ids=str)
def test_a_shared_prefix_gives_full_attention(suffixes):
    """The keys of the prefix are there once; each suffix is as if it had its own copy, values and gradients."""
    generator = torch.Generator().manual_seed(0)
    prefix, heads, size = 5, 2, 4
    length = prefix + sum(suffixes)
    q, k, v = torch.randn(3, heads, length, size, generator=generator, dtype=torch.float64).unbind()
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    direction = torch.randn(heads, length, size, generator=generator, dtype=torch.float64)

    def split(t):
        return t[:, :prefix], t[:, prefix:].split(list(suffixes), dim=1)

    def shared(q, k, v):
        (q_prefix, q_own), (k_prefix, k_own), (v_prefix, v_own) = split(q), split(k), split(v)
        own = [attend(*part, causal=True) for part in zip(q_own, k_own, v_own, strict=True)]
        own_out, own_lse = (torch.cat(parts, dim=1) for parts in zip(*own, strict=True))
        over_prefix = attend(torch.cat(q_own, dim=1), k_prefix, v_prefix, causal=False)
        merged, _ = merge_attention(own_out, own_lse, *over_prefix)
        return torch.cat([attend(q_prefix, k_prefix, v_prefix, causal=True)[0], merged], dim=1)

    def copied(q, k, v):
        (q_prefix, q_own), (k_prefix, k_own), (v_prefix, v_own) = split(q), split(k), split(v)
        whole = [attend(q_prefix, k_prefix, v_prefix, causal=True)[0]]
        for q_i, k_i, v_i in zip(q_own, k_own, v_own, strict=True):
            whole.append(attend(q_i, torch.cat([k_prefix, k_i], 1), torch.cat([v_prefix, v_i], 1), causal=True)[0])
        return torch.cat(whole, dim=1)

    ours, expected = shared(*leaves), copied(*leaves)
    torch.testing.assert_close(ours, expected, rtol=1e-13, atol=1e-13)
    for one, two in zip(
        torch.autograd.grad(ours, leaves, direction), torch.autograd.grad(expected, leaves, direction), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=1e-13, atol=1e-13)


def test_bad_inputs_are_named():
    out_a, lse_a, out_b, lse_b = partials(3, 4)
    with pytest.raises(ValueError, match=r"\(2, 4\)"):
        merge_attention(out_a, lse_a, out_b[:2], lse_b)
    with pytest.raises(ValueError, match=r"lse \(3, 1\)"):
        merge_attention(out_a, lse_a.unsqueeze(-1), out_b, lse_b)
    with pytest.raises(ValueError, match="float16"):
        merge_attention(out_a, lse_a, out_b.half(), lse_b)
    with pytest.raises(ValueError, match="lse must be torch.float32"):
        merge_attention(out_a.half(), lse_a.half(), out_b.half(), lse_b.half())
