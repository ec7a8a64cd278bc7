"""Documents, shifted labels and shards of a batch of token sequences."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def document_ids(
    shape: tuple[int, int],
    *,
    position_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """
    Number the documents of each row from 0; a token may attend only to earlier tokens of its own document.

    A document starts where `position_ids` do not go on by one, at a boundary of `cu_seqlens`, and where real tokens and
    padding meet. Padding at the end of a row stays in the last document, where causality already hides it.

    Args:
        shape (`tuple[int, int]`): `(rows, length)` of the batch.
        position_ids (`Tensor`, *optional*): `(rows, length)` or `(1, length)`; each reset starts a document.
        attention_mask (`Tensor`, *optional*): `(rows, length)`, 0 for padding.
        cu_seqlens (`Tensor`, *optional*): Boundaries in the flattened batch, from 0 to `rows * length`.
        device (`torch.device`, *optional*): Where to build the result.

    Returns:
        `Tensor`: `(rows, length)`, int64.

    Example:
    ```python
    >>> document_ids((1, 5), position_ids=torch.tensor([[0, 1, 0, 1, 2]])).tolist()
    [[0, 0, 1, 1, 1]]
    >>> document_ids((2, 4), attention_mask=torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]])).tolist()
    [[0, 1, 1, 1], [0, 0, 0, 0]]

    ```
    """
    starts = torch.zeros(shape, dtype=torch.bool, device=device)
    if position_ids is not None:
        starts[:, 1:] |= (position_ids.diff(dim=-1) != 1).to(device)
    if cu_seqlens is not None:
        inner = cu_seqlens[(cu_seqlens > 0) & (cu_seqlens < starts.numel())]
        starts.view(-1)[inner.long().to(device)] = True
        starts[:, 0] = False
    if attention_mask is not None:
        real = attention_mask.to(device) != 0
        starts[:, 1:] |= real[:, 1:] != real[:, :-1]
        trailing = real.flip(-1).cumsum(-1).flip(-1) == 0
        starts &= ~trailing
    return starts.cumsum(-1)


def document_boundaries(documents: Tensor) -> Tensor:
    """
    Return `cu_seqlens` of the flattened batch: where each document of each row starts, then the number of tokens.

    Args:
        documents (`Tensor`): `(rows, length)` from [`document_ids`].

    Returns:
        `Tensor`: `(number of documents + 1,)`, int32.

    Example:
    ```python
    >>> document_boundaries(torch.tensor([[0, 0, 1], [0, 0, 0]])).tolist()
    [0, 2, 3, 6]

    ```
    """
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents.diff(dim=-1) != 0
    first = starts.view(-1).nonzero().view(-1)
    return F.pad(first, (0, 1), value=documents.numel()).to(torch.int32)


def causal_document_mask(documents: Tensor, window: int | None = None) -> Tensor:
    """
    Return which keys a query may attend to: same document, not later, and fewer than `window` tokens back.

    Args:
        documents (`Tensor`): `(rows, length)` from [`document_ids`].
        window (`int`, *optional*): Sliding window in tokens, the query included.

    Returns:
        `Tensor`: `(rows, 1, length, length)`, bool.

    Example:
    ```python
    >>> causal_document_mask(torch.tensor([[0, 0, 1]]))[0, 0].int().tolist()
    [[1, 0, 0], [1, 1, 0], [0, 0, 1]]

    ```
    """
    index = torch.arange(documents.size(1), device=documents.device)
    back = index[:, None] - index[None, :]
    allowed = back >= 0 if window is None else (back >= 0) & (back < window)
    return (documents[:, None, :, None] == documents[:, None, None, :]) & allowed


def shift_labels(labels: Tensor) -> Tensor:
    """
    Return for each token the label of the next one; the last of a row has none (-100).

    A shard of unshifted labels would lose the label behind its last token.

    Example:
    ```python
    >>> shift_labels(torch.tensor([[5, 6, 7]])).tolist()
    [[6, 7, -100]]

    ```
    """
    return F.pad(labels, (0, 1), value=-100)[:, 1:]


def shard_sequence(values: Tensor, size: int, rank: int, fill: int = 0) -> Tensor:
    """
    Pad dimension 1 to a multiple of `size` with `fill` and return the contiguous part of `rank`.

    Args:
        values (`Tensor`): `(rows, length, ...)`.
        size (`int`): Number of parts.
        rank (`int`): Which part, `0 <= rank < size`.
        fill (`int`, *optional*, defaults to 0): Value of the padding.

    Example:
    ```python
    >>> shard_sequence(torch.tensor([[1, 2, 3]]), 2, 1, fill=-100).tolist()
    [[3, -100]]

    ```
    """
    missing = -values.size(1) % size
    padded = F.pad(values, (0, 0) * (values.ndim - 2) + (0, missing), value=fill) if missing else values
    part = padded.size(1) // size
    return padded[:, rank * part : (rank + 1) * part].contiguous()
