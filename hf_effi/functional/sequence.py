"""Plans over a sequence of tokens: tiles, chunks, and which of them is alive when. Plain integers in, plain integers out."""

from __future__ import annotations


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
