"""Attention that also returns the log-sum-exp of its scores, and its backward from any `(out, lse)`."""

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
        causal (`bool`, *optional*, defaults to `True`): Whether query `i` of a segment sees its keys up to `i` only.

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
    out = query.new_zeros(*query.shape[:2], value.shape[-1])
    lse = query.new_full(query.shape[:2], -torch.inf, dtype=torch.promote_types(query.dtype, torch.float32))
    attend = _flash if query.device.type == "cpu" else _attend
    for at_q, at_k in _segments(bounds_q, bounds_k):
        out[at_q], lse[at_q] = attend(query[at_q], key[at_k], value[at_k], scale, causal)
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
    With `(out, lse)` of an attention over more keys than these, the results of its parts add up to its gradients. This
    is the backward of FlashAttention, https://arxiv.org/abs/2205.14135, algorithm 4, which never asks where `out` is
    from.

    Args:
        grad, out (`Tensor`): `(tokens_q, heads, head_dim)`.
        lse (`Tensor`): `(tokens_q, heads)`.
        query, key, value, bounds_q, bounds_k, scale, causal: As in [`partial_attention`].
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    grads = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    attend = _flash_backward if query.device.type == "cpu" else _attend_backward
    for at_q, at_k in _segments(bounds_q, bounds_k):
        tensors = grad[at_q], query[at_q], key[at_k], value[at_k], out[at_q], lse[at_q]
        found = attend(*tensors, scale=scale, causal=causal)
        for total, part, where in zip(grads, found, (at_q, at_k, at_k), strict=True):
            total[where] = part
    return grads


def _segments(bounds_q: Sequence[int], bounds_k: Sequence[int]) -> list[tuple[slice, slice]]:
    pairs = zip(itertools.pairwise(bounds_q), itertools.pairwise(bounds_k), strict=True)
    return [(slice(*of_q), slice(*of_k)) for of_q, of_k in pairs if of_q[0] < of_q[1] and of_k[0] < of_k[1]]


# --- one segment, on the CPU: torch's own kernel ---------------------------------------------------------------------


def _flash(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    tensors = _heads_first(query.shape[1], query, key, value)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*tensors, 0.0, causal, scale=scale)
    return out[0].transpose(0, 1), lse[0].T


def _flash_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *, scale: float, causal: bool
) -> tuple[Tensor, ...]:
    tensors = _heads_first(query.shape[1], grad, query, key, value, out)
    found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *tensors, lse.T[None], 0.0, causal, scale=scale
    )
    grad_q, *grads = (t[0].transpose(0, 1) for t in found)
    return grad_q, *(t.unflatten(1, (key.shape[1], -1)).sum(2) for t in grads)


def _heads_first(heads: int, *tensors: Tensor) -> list[Tensor]:
    """
    Return `(1, heads, tokens, d)` of each; grouped heads are repeated, since not every torch's kernel knows them.
    """
    whole = (t if t.shape[1] == heads else t.repeat_interleave(heads // t.shape[1], dim=1) for t in tensors)
    return [t.transpose(0, 1)[None] for t in whole]


# --- one segment, anywhere -------------------------------------------------------------------------------------------


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    scores = _scores(query, key, scale, causal)
    lse = scores.logsumexp(-1, keepdim=True)
    out = (scores - lse).exp() @ _by_head(value, key.shape[1])
    return _flat(out).to(query.dtype), _flat(lse).squeeze(-1)


def _attend_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, up, result, statistic = (
        _by_head(t, key.shape[1]) for t in (query, key, value, grad, out, lse[..., None])
    )
    weights = (_scores(query, key, scale, causal) - statistic).exp()
    grad_scores = weights * (up @ v.mT - (up * result).sum(-1, keepdim=True)) * scale
    grad_k, grad_v = (part.sum(1, keepdim=True) for part in (grad_scores.mT @ q, weights.mT @ up))
    grad_q, grad_k, grad_v = (_flat(t).to(query.dtype) for t in (grad_scores @ k, grad_k, grad_v))
    return grad_q, grad_k, grad_v


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
        scores = scores.masked_fill(later.triu(1), -torch.inf)
    return scores
