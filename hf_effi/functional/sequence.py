"""
Plans over a sequence of tokens (tiles, chunks), and the documents, shifted labels and shards of a batch of sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

#: The model argument that carries the layout to every attention layer. An argument, not a global: the recomputation of
#: a checkpointed layer runs later, and on a GPU in another thread, and still gets the layout of its own forward.
LAYOUT = "sequence_layout"


def tile_rows(num_tokens: int, hidden_size: int, num_shards: int | None = None) -> int:
    """
    Return how many tokens a tile has: `ceil(tokens / shards)`, by default with `shards = ceil(tokens / hidden_size)`.

    Args:
        num_tokens (`int`): Tokens of the call, 0 or more.
        hidden_size (`int`): Width of the model, at least 1.
        num_shards (`int`, *optional*): Number of tiles, at least 1.

    Example:
    ```python
    >>> tile_rows(10, 4), tile_rows(10, 4, num_shards=1), tile_rows(3, 4)
    (4, 10, 3)
    ```
    """
    shards = num_shards or -(-num_tokens // hidden_size)
    return max(1, -(-num_tokens // max(1, shards)))


def logit_rows(num_tokens: int, vocab_size: int, num_shards: int | None = None) -> int:
    """
    Return how many tokens a tile of the loss has: by default as many as have 1 GiB of fp32 logits.

    Args:
        num_tokens (`int`): Tokens with a label, 0 or more.
        vocab_size (`int`): At least 1.
        num_shards (`int`, *optional*): Number of tiles, at least 1.

    Example:
    ```python
    >>> logit_rows(8192, 151936), logit_rows(8192, 151936, num_shards=8), logit_rows(10, 5)
    (1639, 1024, 10)
    ```
    """
    shards = num_shards or -(-num_tokens * vocab_size * 4 // 2**30)
    return max(1, -(-num_tokens // max(1, shards)))


def chunk_bounds(length: int, num_chunks: int) -> tuple[tuple[int, int], ...]:
    """
    Cut `length` tokens into at most `num_chunks` runs `(start, end)`, all of `ceil(length / num_chunks)` but the last.

    Example:
    ```python
    >>> chunk_bounds(7, 3), chunk_bounds(2, 3)
    (((0, 3), (3, 6), (6, 7)), ((0, 1), (1, 2)))
    ```
    """
    size = max(1, -(-length // num_chunks))
    return tuple((start, min(start + size, length)) for start in range(0, length, size))


def chunk_segments(cu_seq_lens: Sequence[int], start: int, end: int) -> tuple[list[int], list[int], int]:
    """
    Cut the packed segments of a row to the chunk `[start, end)` of it.

    Args:
        cu_seq_lens (`Sequence[int]`): Where the segments begin, and the end: `[0, ..., length]`.
        start, end (`int`): The chunk, not empty.

    Returns:
        The boundaries of the chunk's queries; those of the keys they may see, which for the first segment reach back
        to its begin; and the token at which these keys begin. Queries are at the end of their segment's keys.

    Example:
    ```python
    >>> chunk_segments([0, 3, 8, 10], start=5, end=9)  # 3 tokens of the second segment, 1 of the third
    ([0, 3, 4], [0, 5, 6], 3)
    ```
    """
    cuts = [cut for cut in cu_seq_lens if start < cut < end]
    first_key = max(cut for cut in cu_seq_lens if cut <= start)
    queries = [cut - start for cut in (start, *cuts, end)]
    keys = [cut - first_key for cut in (first_key, *cuts, end)]
    return queries, keys, first_key


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

    A document starts where `position_ids` do not go on by one, at a boundary of `cu_seqlens`, and where real tokens
    and padding meet. Padding at the end of a row stays in the last document, where causality already hides it.

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


class ChunkPlan(NamedTuple):
    """
    What [`plan_chunks`] returns.

    Args:
        standalone (`tuple[tuple[int, ...], ...]`): Numbers of the short sequences that share a chunk, by chunk.
        dependent (`tuple[tuple[int, tuple[tuple[int, int], ...]], ...]`): Number of each long sequence and the bounds
            of its chunks, each of which needs the ones before it.
    """

    standalone: tuple[tuple[int, ...], ...]
    dependent: tuple[tuple[int, tuple[tuple[int, int], ...]], ...]


def plan_chunks(lengths: Sequence[int], chunk_size: int) -> ChunkPlan:
    """
    Sort sequences into chunks of at most `chunk_size` tokens (ChunkFlow, https://arxiv.org/abs/2503.02356).

    Longer ones are cut into `ceil(length / chunk_size)` chunks; the others are packed, the longest first, each into
    the first chunk that has room.

    Args:
        lengths (`Sequence[int]`): Tokens of each sequence, at least 1.
        chunk_size (`int`): At least 1.

    Example:
    ```python
    >>> plan_chunks([3, 9, 1, 4, 2], chunk_size=4)
    ChunkPlan(standalone=((3,), (0, 2), (4,)), dependent=((1, ((0, 4), (4, 8), (8, 9))),))
    ```
    """
    bins: list[tuple[int, list[int]]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        if length > chunk_size:
            continue
        for place, (used, members) in enumerate(bins):
            if used + length <= chunk_size:
                bins[place] = (used + length, [*members, index])
                break
        else:
            bins.append((length, [index]))
    cuts = [range(0, length, chunk_size) for length in lengths]
    dependent = tuple(
        (i, tuple((start, min(start + chunk_size, length)) for start in cuts[i]))
        for i, length in enumerate(lengths)
        if length > chunk_size
    )
    return ChunkPlan(tuple(tuple(members) for _, members in bins), dependent)


#: what to do with a chunk, and which one
ChunkWork = tuple[Literal["prefix", "keep", "backward"], int]


def chunk_schedule(num_chunks: int, max_live: int) -> list[ChunkWork]:
    """
    Order the work on dependent chunks so that the activations of at most `max_live` exist at once.

    `"prefix"` runs a chunk for its keys and values only; `"keep"` runs it and keeps its activations; `"backward"` runs
    it, unless it was kept, and goes backward. `max(0, num_chunks - max_live)` chunks are run twice.

    Args:
        num_chunks (`int`): At least 1.
        max_live (`int`): `K`, at least 1.

    Example:
    ```python
    >>> chunk_schedule(3, max_live=2)
    [('prefix', 0), ('keep', 1), ('backward', 2), ('backward', 1), ('backward', 0)]
    ```
    """
    first_kept = max(0, num_chunks - max_live)
    forward: list[ChunkWork] = [("prefix" if i < first_kept else "keep", i) for i in range(num_chunks - 1)]
    return [*forward, *(("backward", i) for i in reversed(range(num_chunks)))]
