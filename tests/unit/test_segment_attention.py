"""Segment attention and its patterns against a dense masked softmax."""

from __future__ import annotations

import itertools

import pytest
import torch

from hf_effi.functional.segment_attention import AttentionPattern, segment_attention


def dense(query, key, value, bounds_q, bounds_k, causal=True, pattern=None, scale=None):
    """The definition: one softmax over all keys, with a mask of documents and pattern."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * (scale or query.shape[-1] ** -0.5)
    keep = torch.zeros(query.shape[0], key.shape[0], dtype=torch.bool)
    for (q0, q1), (k0, k1) in zip(itertools.pairwise(bounds_q), itertools.pairwise(bounds_k), strict=True):
        positions = torch.arange(k1 - k0)
        queries = positions[k1 - k0 - (q1 - q0) :]
        inside = (pattern or AttentionPattern()).keeps(queries[:, None], positions[None]) if causal else True
        keep[q0:q1, k0:k1] = inside
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~keep, -torch.inf).softmax(-1), value)


def inputs(tokens_q, tokens_k, heads=4, kv_heads=2, seed=0):
    torch.manual_seed(seed)
    shapes = (tokens_q, heads, 8), (tokens_k, kv_heads, 8), (tokens_k, kv_heads, 8)
    return [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


PATTERNS = [
    None,
    AttentionPattern(),
    AttentionPattern(window=1),
    AttentionPattern(window=7),
    AttentionPattern(window=64, sink=4),
    AttentionPattern(window=5, sink=9, stride=6),
    AttentionPattern(window=3, stride=2),
    AttentionPattern(window=6, sink=5, stride=3, stride_block=4),
    AttentionPattern(window=1000, sink=3),
    AttentionPattern(window=2, sink=1000),
]


def test_patterns_by_hand():
    assert AttentionPattern(window=2).mask(4).int().tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 1, 1, 0],
        [0, 0, 1, 1],
    ]
    assert AttentionPattern(window=1, sink=1).mask(3).int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 0, 1]]
    assert AttentionPattern(window=1, stride=2).mask(4).int().tolist()[3] == [1, 0, 1, 1]
    assert torch.equal(AttentionPattern().mask(5), torch.ones(5, 5).tril().bool())
    assert AttentionPattern(window=2, sink=1).as_dict() == {"window": 2, "sink": 1, "stride": 0, "stride_block": 1}


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_documents_are_isolated_and_exact(pattern, kv_heads):
    bounds = [0, 1, 6, 6, 161, 164]  # one token, a few, none, more than two blocks, a few
    q, k, v = inputs(164, 164, kv_heads=kv_heads)
    expected = dense(q, k, v, bounds, bounds, pattern=pattern)
    upstream = torch.randn_like(expected)
    grads = torch.autograd.grad(expected, (q, k, v), upstream)
    found = segment_attention(q, k, v, bounds, bounds, pattern=pattern)
    assert torch.allclose(found, expected, atol=1e-12)
    for left, right in zip(torch.autograd.grad(found, (q, k, v), upstream), grads, strict=True):
        assert torch.allclose(left, right, atol=1e-12)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_decoding_reads_the_end_of_each_document(pattern):
    bounds_q, bounds_k = [0, 1, 4], [0, 30, 170]
    q, k, v = inputs(4, 170)
    expected = dense(q, k, v, bounds_q, bounds_k, pattern=pattern)
    assert torch.allclose(segment_attention(q, k, v, bounds_q, bounds_k, pattern=pattern), expected, atol=1e-12)


def test_bidirectional_and_scale():
    q, k, v = inputs(10, 10)
    found = segment_attention(q, k, v, [0, 4, 10], [0, 4, 10], causal=False, scale=0.3)
    assert torch.allclose(found, dense(q, k, v, [0, 4, 10], [0, 4, 10], causal=False, scale=0.3), atol=1e-12)
    with pytest.raises(ValueError, match="causal"):
        segment_attention(q, k, v, [0, 10], [0, 10], causal=False, pattern=AttentionPattern(window=2))


def test_another_document_changes_nothing_to_the_bit():
    q, k, v = inputs(50, 50)
    other_k, other_v = k.detach().clone(), v.detach().clone()
    other_k[:20], other_v[:20] = 7.0, torch.nan
    for pattern in PATTERNS:
        found = segment_attention(q, k, v, [0, 20, 50], [0, 20, 50], pattern=pattern)
        changed = segment_attention(q, other_k, other_v, [0, 20, 50], [0, 20, 50], pattern=pattern)
        assert torch.equal(found[20:], changed[20:])


def test_no_document_at_all():
    q, k, v = inputs(0, 0)
    assert segment_attention(q, k, v, [0], [0]).shape == (0, 4, 8)
    assert segment_attention(q, k, v, [0, 0], [0, 0]).shape == (0, 4, 8)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"window": 0}, "window=0"),
        ({"window": 2.0}, "window=2.0"),
        ({"window": 2, "sink": -1}, "sink=-1"),
        ({"window": 2, "stride": True}, "stride=True"),
        ({"sink": 2}, "give window="),
    ],
)
def test_bad_patterns(arguments, word):
    with pytest.raises(ValueError, match=word):
        AttentionPattern(**arguments)


def test_cost_grows_with_the_length_not_its_square(monkeypatch):
    """Scores that are computed, masked ones included."""
    from hf_effi.functional import segment_attention as module

    original, scores = module._sdpa, []
    monkeypatch.setattr(
        module, "_sdpa", lambda q, k, *a, **b: scores.append(q.shape[1] * k.shape[1]) or original(q, k, *a, **b)
    )

    def count(length, pattern):
        scores.clear()
        segment_attention(*(torch.randn(length, 1, 8) for _ in range(3)), [0, length], [0, length], pattern=pattern)
        return sum(scores)

    sparse = AttentionPattern(window=64, sink=4)
    assert count(4096, sparse) < 4096 * (64 + 64 + 4)
    assert count(4096, sparse) / count(1024, sparse) == pytest.approx(4, rel=0.05)
    assert count(4096, None) == 4096**2
