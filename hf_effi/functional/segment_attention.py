"""Attention over documents laid end to end, in plain torch: full causal, or sink + window + strided columns."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from .options import refuse_idle

_MIN_BLOCK, _MAX_BLOCK = 64, 1024


@dataclass(frozen=True)
class AttentionPattern:
    """
    Which keys a causal layer looks at. Query `i` sees key `j <= i` of its document where one of these holds:

    `j < sink`, or `i - j < window`, or `(j // stride_block) % stride == 0`.

    Positions count from the start of the document. A pattern without a window is full attention.

    Args:
        window (`int`, *optional*): The latest keys, the query's own included.
        sink (`int`, *optional*, defaults to `0`): The first keys of the document.
        stride (`int`, *optional*, defaults to `0`): Every `stride`-th block of earlier keys; 0 for none.
        stride_block (`int`, *optional*, defaults to `1`): Keys in such a block.

    Raises:
        ValueError: an argument out of range, or sinks or a stride without a window.

    Example:
    ```python
    >>> AttentionPattern(window=2, sink=1).mask(4).int().tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 1, 1]]

    ```
    """

    window: int | None = None
    sink: int = 0
    stride: int = 0
    stride_block: int = 1

    def __post_init__(self) -> None:
        for name, least in (("window", 1), ("sink", 0), ("stride", 0), ("stride_block", 1)):
            value = getattr(self, name)
            if name == "window" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r} must be an integer of at least {least}.")
        if self.window is None and (self.sink or self.stride):
            raise ValueError(
                "sink and stride add keys to a window: give window=, or neither of them for full attention."
            )
        refuse_idle("stride_block", self.stride_block, 1, self.stride > 0, "with a stride above 0")

    def keeps(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Return whether each query position sees each key position; the two broadcast."""
        causal = keys <= queries
        if self.window is None:
            return causal
        kept = (keys < self.sink) | (queries - keys < self.window)
        if self.stride:
            kept = kept | (keys // self.stride_block % self.stride == 0)
        return kept & causal

    def mask(self, length: int) -> torch.Tensor:
        """Return the dense mask of a document, `(length, length)`, queries by keys: for tests and pictures."""
        positions = torch.arange(length)
        return self.keeps(positions[:, None], positions[None, :])

    def as_dict(self) -> dict[str, Any]:
        """Return the arguments, for a config."""
        return asdict(self)


def segment_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds_q: Sequence[int],
    bounds_k: Sequence[int],
    *,
    scale: float | None = None,
    causal: bool = True,
    pattern: AttentionPattern | None = None,
) -> torch.Tensor:
    """
    Attend within each document only. Exact, on any device and in any dtype; one SDPA call a document, or a block of
    it.

    Where a document has fewer queries than keys, as in decoding, its queries are the last ones. A pattern with a
    window reads a block of queries against the keys that it can see, so that its cost grows with the length and not
    with its square.

    Args:
        query (`torch.Tensor`): `(tokens, heads, head_dim)`.
        key, value (`torch.Tensor`): `(tokens, kv_heads, head_dim)`; `kv_heads` divides `heads`.
        bounds_q, bounds_k (`Sequence[int]`): Where each document begins, and the end: `num_documents + 1` numbers.
        scale (`float`, *optional*): Factor of the scores; `head_dim ** -0.5` by default.
        causal (`bool`, *optional*, defaults to `True`): Whether queries see no later keys.
        pattern (`AttentionPattern`, *optional*): Which of the earlier keys they see; all by default.

    Returns:
        `torch.Tensor`: `(tokens, heads, head_dim of value)`.

    Raises:
        ValueError: a pattern without `causal`.

    Example:
    ```python
    >>> q = k = torch.zeros(3, 1, 2)
    >>> v = torch.tensor([1.0, 3.0, 8.0]).view(3, 1, 1).expand(3, 1, 2)
    >>> segment_attention(q, k, v, [0, 2, 3], [0, 2, 3])[:, 0, 0].tolist()
    [1.0, 2.0, 8.0]

    ```
    """
    if pattern is not None and not causal:
        raise ValueError("an attention pattern is causal; give causal=True.")
    outputs = []
    for (q0, q1), (k0, k1) in zip(itertools.pairwise(bounds_q), itertools.pairwise(bounds_k), strict=True):
        if q1 == q0:
            continue
        q, k, v = (t.transpose(0, 1) for t in (query[q0:q1], key[k0:k1], value[k0:k1]))
        if pattern is not None and pattern.window is not None and pattern.window < k1 - k0:
            out = _windowed(q, k, v, scale=scale, pattern=pattern, window=pattern.window)
        else:
            out = _dense(q, k, v, scale, causal)
        outputs.append(out.transpose(0, 1))
    return torch.cat(outputs) if outputs else query.new_empty(0, query.shape[1], value.shape[-1])


def _dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, causal: bool) -> torch.Tensor:
    if not causal or q.shape[1] == k.shape[1]:
        return _sdpa(q, k, v, scale, is_causal=causal)
    positions = torch.arange(k.shape[1], device=q.device)
    mask = positions[None, :] <= positions[-q.shape[1] :, None]
    return _sdpa(q, k, v, scale, attn_mask=mask)


def _windowed(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None, pattern: AttentionPattern, window: int
) -> torch.Tensor:
    """Blocks of queries against sinks, strided columns before the window, and the window, all of one document."""
    block = min(max(window, _MIN_BLOCK), _MAX_BLOCK)
    offset = k.shape[1] - q.shape[1]
    positions = torch.arange(k.shape[1], device=q.device)
    outputs = []
    for begin in range(0, q.shape[1], block):
        end = min(begin + block, q.shape[1])
        seen = _keys_of_block(pattern, window, begin + offset, end + offset).to(q.device)
        mask = pattern.keeps(positions[begin + offset : end + offset, None], seen[None, :])
        keys, values = k.index_select(1, seen), v.index_select(1, seen)
        outputs.append(_sdpa(q[:, begin:end], keys, values, scale, attn_mask=mask))
    return torch.cat(outputs, dim=1)


def _keys_of_block(pattern: AttentionPattern, window: int, begin: int, end: int) -> torch.Tensor:
    """Return the positions that any of the queries `begin` to `end` sees, in order."""
    low = max(0, begin - window + 1)
    parts = [torch.arange(min(pattern.sink, low)), torch.arange(low, end)]
    if pattern.stride:
        starts = torch.arange(0, low, pattern.stride * pattern.stride_block)
        columns = (starts[:, None] + torch.arange(pattern.stride_block)).flatten()
        parts.insert(1, columns[(columns >= pattern.sink) & (columns < low)])
    return torch.cat(parts)


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, **masking: Any) -> torch.Tensor:
    gqa = q.shape[0] != k.shape[0]
    return scaled_dot_product_attention(q[None], k[None], v[None], scale=scale, enable_gqa=gqa, **masking)[0]
