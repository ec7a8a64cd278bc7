"""The base of rotary position embeddings for a longer context."""

from __future__ import annotations


def extended_rope_base(base: float, factor: float, rotary_dim: int) -> float:
    """
    Return the base at which the slowest rotation of a context `factor` times as long ends where it ended before.

    `base * factor ** (d / (d - 2))` with `d = rotary_dim`, the NTK-aware rule.

    Args:
        base (`float`): Base that the model was trained with, such as 10000.
        factor (`float`): New length over old length, at least 1.
        rotary_dim (`int`): Rotated dimensions of a head, an even number above 2.

    Raises:
        ValueError: an argument out of range.

    Example:
    ```python
    >>> round(extended_rope_base(10_000, 8, rotary_dim=128))
    82685
    >>> extended_rope_base(10_000, 1, rotary_dim=128)
    10000.0

    ```
    """
    if not base > 1:
        raise ValueError(f"base={base!r} must be above 1.")
    if not factor >= 1:
        raise ValueError(f"factor={factor!r} must be at least 1: a shorter context needs no new base.")
    if rotary_dim <= 2 or rotary_dim % 2:
        raise ValueError(f"rotary_dim={rotary_dim!r} must be an even number above 2.")
    return float(base * factor ** (rotary_dim / (rotary_dim - 2)))
