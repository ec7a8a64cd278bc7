"""Plans over a sequence of tokens: tiles, chunks, and which of them is alive when. Plain integers in, plain integers out."""

from __future__ import annotations

from collections.abc import Sequence


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
        The boundaries of the chunk's queries; those of the keys they may see, which for the first segment reach back to
        its begin; and the token at which these keys begin. Queries are at the end of their segment's keys.

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
