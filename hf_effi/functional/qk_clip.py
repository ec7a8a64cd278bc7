"""QK-Clip: how large the logits of each attention head are, and what its projections are multiplied by."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def max_logits(
    query: Tensor,
    key: Tensor,
    scaling: float,
    *,
    mask: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    documents: Tensor | None = None,
    rows: int = 128,
) -> Tensor:
    """
    Return the largest attention logit of each query head over a batch.

    Formula: `S_h = max (q_i . k_j) scaling` over rows of the batch and pairs `(i, j)` that may attend. Paper: Kimi K2
    (2507.20534), section 2.1. Computed in blocks of queries, so that no `length x length` matrix is kept.

    Args:
        query (`Tensor`): `(batch, heads, length, size)`, with positions in it.
        key (`Tensor`): `(batch, key_heads, key_length, size)`; `heads` is a multiple of `key_heads`.
        scaling (`float`): Usually `size ** -0.5`.
        mask (`Tensor`, *optional*): `(batch or 1, heads or 1, length, key_length)`, `True` or 0 where a pair attends,
            `False` or very negative where not; or `(batch, key_length)` with 0 at padding, beside the causal rule.
        causal (`bool`, *optional*, defaults to `True`): Whether key j is seen by queries from j on. Not read with a
            mask of four dimensions.
        window (`int`, *optional*): Keys that a query sees, itself included; with the causal rule only.
        documents (`Tensor`, *optional*): `(batch or 1, length)`, number of the document of each token in packed rows.
        rows (`int`, *optional*, defaults to 128): Queries of one block.

    Returns:
        `Tensor`: `(heads,)` in fp32; `-inf` for a head of which no pair attends.

    Example:
    ```python
    >>> query, key = torch.tensor([[[[1.0], [2.0]]]]), torch.tensor([[[[3.0], [4.0]]]])
    >>> max_logits(query, key, 1.0).item(), max_logits(query, -key, 1.0).item()  # the pair (1, 4) does not attend
    (8.0, -3.0)

    ```
    """
    batch, heads, length, size = query.shape
    shared = key.shape[1]
    grouped = query.detach().reshape(batch, shared, heads // shared, length, size)
    keys = key.detach().unsqueeze(2).transpose(-1, -2)
    best = query.new_full((shared, heads // shared), -math.inf, dtype=torch.float32)
    places = torch.arange(key.shape[2], device=query.device)
    for start in range(0, length, rows):
        block = grouped[:, :, :, start : start + rows]
        logits = (block @ keys).float() * scaling
        allowed = _allowed(places, slice(start, start + block.shape[3]), mask, causal, window, documents)
        if allowed is not None:
            if allowed.ndim == 4:
                spread = allowed.shape[1] > 1
                allowed = allowed.unflatten(1, (shared, -1)) if spread else allowed.unsqueeze(1)
            logits = logits.masked_fill(~allowed, -math.inf)
        if logits.numel():
            best = torch.maximum(best, logits.amax((0, 3, 4)))
    return best.flatten()


def _allowed(
    keys: Tensor, rows: slice, mask: Tensor | None, causal: bool, window: int | None, documents: Tensor | None
) -> Tensor | None:
    """Return which pairs attend, `(batch or 1, heads or 1, rows, keys)`, or `None` for all."""
    if mask is not None and mask.ndim == 4:
        part = mask[:, :, rows, : len(keys)]
        return part if part.dtype == torch.bool else part > torch.finfo(part.dtype).min / 2
    found = None
    queries = torch.arange(rows.start, rows.stop, device=keys.device)[:, None]
    if causal:
        found = (keys <= queries)[None, None]
        if window is not None:
            found = found & (keys > queries - window)
    if mask is not None:
        padding = mask[:, None, None, : len(keys)].bool()
        found = padding if found is None else found & padding
    if documents is not None:
        same = (documents[:, rows, None] == documents[:, None, :])[:, None]
        found = same if found is None else found & same
    return found


def clip_factors(largest: Tensor, threshold: float) -> Tensor:
    """
    Return `min(1, threshold / S)` for each head; 1 where `S` is not a finite number.

    Args:
        largest (`Tensor`): Largest logits, any shape.
        threshold (`float`): Above 0; `inf` clips nothing. Paper: 100.

    Raises:
        ValueError: a threshold out of range.

    Example:
    ```python
    >>> clip_factors(torch.tensor([400.0, 100.0, -3.0, float("nan")]), 100.0).tolist()
    [0.25, 1.0, 1.0, 1.0]

    ```
    """
    check_threshold(threshold)
    over = (largest > threshold) & largest.isfinite()
    return torch.where(over, threshold / torch.where(over, largest, 1.0), 1.0)


def projection_factors(gamma: Tensor, key_heads: int, alpha: float | None) -> tuple[Tensor, Tensor]:
    """
    Return what the rows of each query head and of each key head are multiplied by.

    With `alpha=None` the query alone is scaled, by `gamma`: the logits of the head are the same as with both, and no
    other head sees it. Else the smallest `gamma` of the query heads that share a key head is divided: `gamma^alpha`
    for their queries, `gamma^(1 - alpha)` for the key.

    Args:
        gamma (`Tensor`): `(heads,)`, of [`clip_factors`].
        key_heads (`int`): Divides `heads`.
        alpha (`float`, *optional*): In `[0, 1]`. Paper: 0.5.

    Returns:
        `tuple[Tensor, Tensor]`: `(heads,)` and `(key_heads,)`.

    Raises:
        ValueError: heads that are no multiple of the key heads, or alpha out of range.

    Example:
    ```python
    >>> [one.tolist() for one in projection_factors(torch.tensor([0.25, 1.0]), 1, alpha=0.5)]
    [[0.5, 0.5], [0.5]]
    >>> [one.tolist() for one in projection_factors(torch.tensor([0.25, 1.0]), 1, alpha=None)]
    [[0.25, 1.0], [1.0]]

    ```
    """
    if key_heads < 1 or len(gamma) % key_heads:
        raise ValueError(f"key_heads={key_heads} must divide the {len(gamma)} query heads.")
    if alpha is None:
        return gamma, torch.ones(key_heads, dtype=gamma.dtype, device=gamma.device)
    check_alpha(alpha)
    shared = gamma.view(key_heads, -1).amin(1)
    return (shared**alpha).repeat_interleave(len(gamma) // key_heads), shared ** (1 - alpha)


def check_threshold(threshold: Any) -> None:
    """
    Check a threshold of logits.

    Raises:
        ValueError: not a number above 0.
    """
    number = isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
    if not number or not threshold > 0:
        raise ValueError(f"threshold={threshold!r} must be a number above 0; inf clips nothing. Paper: 100.")


def check_alpha(alpha: Any) -> None:
    """
    Check the share of a factor that goes to the query.

    Raises:
        ValueError: not a number in `[0, 1]`.
    """
    number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
    if not number or not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha!r} must be a number in [0, 1]. Paper: 0.5.")
