"""
Merge of two partial attentions over disjoint keys, such as a shared prefix and a suffix of its own.

Each partial brings its output and the log-sum-exp of its scores; the merge is what one softmax over all keys gives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..patching.triton_or_torch import triton_ops


def merge_attention_reference(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Return merged `(out, lse)` by autograd: what [`merge_attention`] is compared with."""
    lse = torch.logaddexp(lse_a, lse_b)
    shares = torch.stack([lse_a, lse_b]).softmax(0).unsqueeze(-1)
    wide = shares.dtype
    return (shares[0] * out_a.to(wide) + shares[1] * out_b.to(wide)).to(out_a.dtype), lse


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """
    Merge attention over keys `A` with attention over keys `B` into attention over both, exactly.

    `lse = log(e^lse_a + e^lse_b)`, `out = e^(lse_a - lse) out_a + e^(lse_b - lse) out_b`. Backward, with
    `w_a = e^(lse_a - lse)`: `dout_a = w_a dout`, `dlse_a = w_a (w_b dout . (out_a - out_b) + dlse)`, and the same for
    `B`: the rounded `out` does not enter.
    Partial softmax of FlashAttention, https://arxiv.org/abs/2205.14135; shared prefix: https://arxiv.org/abs/2506.05433.

    A query without keys in one part has `lse = -inf` there; its `out` is not read. Without keys in both, `out` is 0.

    Args:
        out_a, out_b (`Tensor`): `(..., D)`.
        lse_a, lse_b (`Tensor`): `(...)`, natural logarithm, in fp32, or fp64 with fp64 outputs.

    Returns:
        `tuple[Tensor, Tensor]`: `out (..., D)` in the dtype of `out_a`, and `lse (...)`.

    Raises:
        ValueError: shapes or dtypes do not fit.

    Example:
    ```python
    >>> import torch
    >>> one, three = torch.ones(1, 2), 3 * torch.ones(1, 2)
    >>> merge_attention(one, torch.zeros(1), three, torch.zeros(1))[0]
    tensor([[2., 2.]])
    ```
    """
    if out_a.shape != out_b.shape or not lse_a.shape == lse_b.shape == out_a.shape[:-1]:
        raise ValueError(
            f"out {tuple(out_a.shape)} and {tuple(out_b.shape)} must both be (..., D), lse {tuple(lse_a.shape)} and "
            f"{tuple(lse_b.shape)} both (...)."
        )
    needed = torch.promote_types(out_a.dtype, torch.float32)
    if out_a.dtype != out_b.dtype or not lse_a.dtype == lse_b.dtype == needed:
        raise ValueError(
            f"out is {out_a.dtype} and {out_b.dtype}, lse {lse_a.dtype} and {lse_b.dtype}: both outputs must have one "
            f"dtype, and both lse must be {needed}."
        )
    return _MergeAttention.apply(out_a, lse_a, out_b, lse_b)


def merge_rows(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Merge rows `(n, D)` with `lse (n,)`."""
    lse = torch.logaddexp(lse_a, lse_b)
    out = sum(_share(part, lse) * _present(part, value) for part, value in ((lse_a, out_a), (lse_b, out_b)))
    return out.to(out_a.dtype), lse


def merge_rows_backward(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, *, grad: Tensor, grad_lse: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of `out_a, lse_a, out_b, lse_b`."""
    share_a, share_b = _share(lse_a, lse), _share(lse_b, lse)
    wide = grad.to(lse.dtype)
    along = (wide * (_present(lse_a, out_a) - _present(lse_b, out_b))).sum(-1, keepdim=True)
    up = grad_lse.unsqueeze(-1)
    return (
        (share_a * wide).to(out_a.dtype),
        (share_a * (up + share_b * along)).squeeze(-1),
        (share_b * wide).to(out_b.dtype),
        (share_b * (up - share_a * along)).squeeze(-1),
    )


def _share(part: Tensor, lse: Tensor) -> Tensor:
    return torch.exp(part - lse).masked_fill(part == -torch.inf, 0.0).unsqueeze(-1)


def _present(part: Tensor, value: Tensor) -> Tensor:
    """Return `value` in the dtype of `part`, and 0 where there were no keys: attention may leave anything there."""
    return value.to(part.dtype).masked_fill((part == -torch.inf).unsqueeze(-1), 0.0)


class _MergeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
        size = out_a.shape[-1]
        rows = [t.reshape(-1, size) if t.dim() > lse_a.dim() else t.reshape(-1) for t in (out_a, lse_a, out_b, lse_b)]
        ops = triton_ops("hf_effi.attention._merge_triton", out_a)
        out, lse = (ops.merge_rows if ops else merge_rows)(*rows)
        ctx.save_for_backward(lse, *rows)
        ctx.out_shape = out_a.shape
        return out.view(out_a.shape), lse.view(lse_a.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor, ...]:
        lse, *rows = ctx.saved_tensors
        ops = triton_ops("hf_effi.attention._merge_triton", rows[0])
        found = (ops.merge_rows_backward if ops else merge_rows_backward)(
            *rows, grad=grad.reshape(rows[0].shape), grad_lse=grad_lse.reshape(lse.shape), lse=lse
        )
        shape = ctx.out_shape
        return tuple(g.view(shape if g.dim() == 2 else shape[:-1]) for g in found)
