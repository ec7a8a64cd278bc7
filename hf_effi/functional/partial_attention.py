"""Attention that also returns the log-sum-exp of its scores, and its backward from any `(out, lse)`, in plain torch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor


def partial_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds_q: Sequence[int],
    bounds_k: Sequence[int],
    *,
    scale: float | None = None,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """
    Attend within each segment, and return `lse = log sum_j e^(scale q . k_j)` with the output.

    Args:
        query (`Tensor`): `(tokens_q, heads, head_dim)`.
        key, value (`Tensor`): `(tokens_k, kv_heads, head_dim)`; `kv_heads` divides `heads`.
        bounds_q, bounds_k (`Sequence[int]`): Where each segment begins, and the end.
        scale (`float`, *optional*): Factor of the scores; `head_dim ** -0.5` by default.
        causal (`bool`, *optional*, defaults to `True`): Whether queries see no later keys. A segment's queries are the
            last of its tokens.

    Returns:
        `tuple[Tensor, Tensor]`: `(tokens_q, heads, head_dim)` in the dtype of `query`, 0 without keys; and
        `(tokens_q, heads)` in fp32, or fp64 with fp64 queries, `-inf` without keys.

    Example:
    ```python
    >>> q = k = torch.zeros(2, 1, 2)
    >>> v = torch.tensor([1.0, 3.0]).view(2, 1, 1).expand(2, 1, 2)
    >>> out, lse = partial_attention(q, k, v, [0, 2], [0, 2])
    >>> out[:, 0, 0].tolist(), lse.exp().flatten().tolist()
    ([1.0, 2.0], [1.0, 2.0])

    ```
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    wide = torch.promote_types(query.dtype, torch.float32)
    out = query.new_zeros(*query.shape[:2], value.shape[-1])
    lse = query.new_full(query.shape[:2], -torch.inf, dtype=wide)
    for at_q, at_k in _segments(bounds_q, bounds_k):
        scores = _scores(query[at_q], key[at_k], scale, causal)
        statistic = scores.logsumexp(-1, keepdim=True)
        weights = (scores - statistic).exp()
        out[at_q] = _flat(weights @ _by_head(value[at_k], key.shape[1]))
        lse[at_q] = _flat(statistic).squeeze(-1)
    return out, lse


def partial_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    bounds_q: Sequence[int],
    bounds_k: Sequence[int],
    *,
    scale: float | None = None,
    causal: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """
    Return what these keys give to the gradients of query, key and value.

    `p_j = e^(s_j - lse)`, `dv_j = p_j grad`, `ds_j = p_j (grad . v_j - grad . out)`.
    With `(out, lse)` of an attention over more keys than these, the results of its parts add up to its gradients. This is
    the backward of FlashAttention, https://arxiv.org/abs/2205.14135, algorithm 4, which never asks where `out` is from.

    Args:
        grad, out (`Tensor`): `(tokens_q, heads, head_dim)`.
        lse (`Tensor`): `(tokens_q, heads)`.
        query, key, value, bounds_q, bounds_k, scale, causal: As in [`partial_attention`].
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    grad_q, grad_k, grad_v = (torch.zeros_like(t) for t in (query, key, value))
    heads = key.shape[1]
    for at_q, at_k in _segments(bounds_q, bounds_k):
        weights = (_scores(query[at_q], key[at_k], scale, causal) - _by_head(lse[at_q].unsqueeze(-1), heads)).exp()
        up = _by_head(grad[at_q], heads)
        along = (up * _by_head(out[at_q], heads)).sum(-1, keepdim=True)
        grad_scores = weights * (up @ _by_head(value[at_k], heads).mT - along) * scale
        grad_q[at_q] = _flat(grad_scores @ _by_head(key[at_k], heads))
        grad_k[at_k] = _flat((grad_scores.mT @ _by_head(query[at_q], heads)).sum(1, keepdim=True))
        grad_v[at_k] = _flat((weights.mT @ up).sum(1, keepdim=True))
    return grad_q, grad_k, grad_v


def _segments(bounds_q: Sequence[int], bounds_k: Sequence[int]) -> list[tuple[slice, slice]]:
    pairs = zip(itertools.pairwise(bounds_q), itertools.pairwise(bounds_k), strict=True)
    return [(slice(*of_q), slice(*of_k)) for of_q, of_k in pairs if of_q[0] < of_q[1] and of_k[0] < of_k[1]]


def _by_head(tensor: Tensor, kv_heads: int) -> Tensor:
    """Return `(tokens, heads, d)` as `(kv_heads, heads / kv_heads, tokens, d)`, in fp32 or wider."""
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    return wide.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.permute(2, 0, 1, 3).flatten(1, 2)


def _scores(query: Tensor, key: Tensor, scale: float, causal: bool) -> Tensor:
    kv_heads = key.shape[1]
    scores = _by_head(query, kv_heads) @ _by_head(key, kv_heads).mT * scale
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        scores = scores.masked_fill(later.triu(1 + key.shape[0] - query.shape[0]), -torch.inf)
    return scores
