"""Which places of a stream hold an old row: by a hash of the place, so that nothing has to be stored."""

from __future__ import annotations

from ._checks import check_count, check_number

_BITS = (1 << 64) - 1


def _hash(value: int) -> int:
    """Return 64 mixed bits of an integer (the finaliser of SplitMix64)."""
    value = (value + 0x9E3779B97F4A7C15) & _BITS
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _BITS
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _BITS
    return value ^ (value >> 31)


def replayed(index: int, fraction: float, seed: int = 0, block: int | None = None) -> bool:
    """
    Return whether a place of a stream holds an old row.

    It is a function of the arguments alone: every process, and a run that goes on from a checkpoint, get the same.
    Without `block` each place is drawn by itself, `hash(seed, index) < fraction`. With `block` the places of a block
    whose hashes are smallest hold the old rows, as many as bring the share of all blocks so far to the row closest
    below `fraction`.

    Args:
        index (`int`): The place, from 0.
        fraction (`float`): Share of old rows, in `[0, 1]`.
        seed (`int`, *optional*, defaults to 0): Of the draw.
        block (`int`, *optional*): Places over which the share is exact, such as the global batch size.

    Raises:
        ValueError: an argument out of range.

    Example:
    ```python
    >>> [replayed(index, 0.25, block=4) for index in range(8)].count(True)
    2
    >>> sum(replayed(index, 0.05) for index in range(10_000))
    510
    ```
    """
    check_number("fraction", fraction, 0, 1)
    if isinstance(index, bool) or not isinstance(index, int) or index < 0:
        raise ValueError(f"index={index!r} must be an integer of at least 0.")
    start = _hash(seed)
    if block is None:
        return _hash(start ^ index) < fraction * 2**64
    number = index // check_count("block", block)
    old = int((number + 1) * block * fraction) - int(number * block * fraction)
    mine = _hash(start ^ index), index
    smaller = sum((_hash(start ^ place), place) < mine for place in range(number * block, (number + 1) * block))
    return smaller < old
