"""A shuffle that is computed and not stored: a bijection of row numbers from a few rounds of a hash."""

from __future__ import annotations

from ._checks import check_count
from .replay import _BITS, _hash

#: more rounds than the four that make a Feistel network look random, for the sake of tiny ranges
_ROUNDS = 6


def shuffled_index(index: int, count: int, seed: int, epoch: int = 0) -> int:
    r"""
    Return the place `index` of a shuffle of `range(count)`, without making the shuffle.

    A Feistel network on `2h` bits, the smallest even number that holds `count - 1`, with the halves `(l, r)` of the
    number: `(l, r) <- (r, l XOR (hash(key_j XOR r) mod 2^h))`, six rounds. It is a bijection of `[0, 4^h)`; a value of
    `count` or more is sent through it again until it lies below, fewer than four times on average, which makes it a
    bijection of `[0, count)`. Time and memory do not grow with `count`.

    Source: Luby and Rackoff, How to Construct Pseudorandom Permutations from Pseudorandom Functions (1988); Black and
    Rogaway, Ciphers with Arbitrary Finite Domains (2002), for the repetition.

    Args:
        index (`int`): Place in the shuffle, in `[0, count)`.
        count (`int`): Rows, at least 1.
        seed (`int`): Of the shuffle, at least 0.
        epoch (`int`, *optional*, defaults to 0): Another shuffle for each, at least 0.

    Raises:
        ValueError: an argument out of range.

    Example:
    ```python
    >>> [shuffled_index(index, 8, seed=0) for index in range(8)]
    [3, 1, 6, 0, 5, 4, 7, 2]
    >>> sorted(shuffled_index(index, 1000, seed=7, epoch=3) for index in range(1000)) == list(range(1000))
    True
    ```
    """
    check_count("count", count)
    check_count("seed", seed, 0)
    check_count("epoch", epoch, 0)
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < count:
        raise ValueError(f"index={index!r} must be an integer in [0, {count}).")
    if count == 1:
        return 0
    half = ((count - 1).bit_length() + 1) // 2
    mask, key = (1 << half) - 1, _hash(_hash(seed & _BITS) ^ epoch)
    keys = [_hash(key ^ (number + 1) << 58) for number in range(_ROUNDS)]
    value = index
    while True:
        left, right = value >> half, value & mask
        for round_key in keys:
            left, right = right, left ^ (_hash(round_key ^ right) & mask)
        value = left << half | right
        if value < count:
            return value
