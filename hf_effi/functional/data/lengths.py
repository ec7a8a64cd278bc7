"""Sequence length as a function of progress, and cutting a batch to it without losing a token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..options import refuse_idle
from ._checks import check_count, check_number


def staged_length(progress: float, lengths: Sequence[int], last_share: float = 0.5) -> int:
    """
    Return the length of GrowLength's stage: equal stages first, the last one for `last_share` of the run.

    Args:
        progress (`float`): Share of the run done, clamped to `[0, 1]`.
        lengths (`Sequence[int]`): Ascending, such as `(128, 256, 512)`.
        last_share (`float`, *optional*, defaults to 0.5): Share of the run at full length, in `(0, 1]`.

    Raises:
        ValueError: no length, lengths that do not ascend, or `last_share` out of range.

    Example:
    ```python
    >>> [staged_length(p, (128, 256, 512)) for p in (0, 0.24, 0.25, 0.49, 0.5, 1)]
    [128, 128, 256, 256, 512, 512]
    ```
    """
    if not lengths or any(b <= a for a, b in zip(lengths, lengths[1:], strict=False)):
        raise ValueError(f"lengths={list(lengths)} must be a non-empty ascending list, such as (128, 256, 512).")
    check_count("the first length", lengths[0])
    check_number("last_share", last_share, 0, 1, open_low=True)
    early = len(lengths) - 1
    done = min(max(check_number("progress", progress, -math.inf), 0.0), 1.0)
    if early == 0 or done >= 1 - last_share:
        return lengths[-1]
    return lengths[int(done / (1 - last_share) * early)]


def root_length(
    step: int, total_steps: int, max_length: int, *, min_length: int = 64, root: float = 1.0, multiple: int = 8
) -> int:
    """
    Return DeepSpeed's `fixed_root` length: `floor((t / T)^(1/r) (max - min) + min)`, down to a multiple.

    Args:
        step (`int`): Finished updates, at least 0.
        total_steps (`int`): Updates until the full length, `T`; 0 is full length at once.
        max_length (`int`): Full length; it is given from `T` on, also where it is no multiple.
        min_length (`int`, *optional*, defaults to 64): In `[multiple, max_length]`.
        root (`float`, *optional*, defaults to 1.0): `r`, positive; 1 is linear, 2 opens faster.
        multiple (`int`, *optional*, defaults to 8): What tensor cores like.

    Raises:
        ValueError: an argument out of range.

    Example:
    ```python
    >>> [root_length(t, 100, 2048, min_length=80) for t in (0, 1, 50, 99, 100, 500)]
    [80, 96, 1064, 2024, 2048, 2048]
    ```
    """
    check_count("step", step, 0)
    check_count("total_steps", total_steps, 0)
    check_count("multiple", multiple)
    check_count("min_length", min_length, multiple)
    check_number("root", root, 0, open_low=True)
    if check_count("max_length", max_length) < min_length:
        raise ValueError(f"min_length={min_length} exceeds max_length={max_length}.")
    if step >= total_steps:
        return max_length
    length = int((step / total_steps) ** (1 / root) * (max_length - min_length) + min_length)
    return length - length % multiple


@dataclass(frozen=True)
class Multigrid:
    """
    Batch shapes on two cycles: rows of `L / c` tokens, `c` times as many of them, so that a step keeps its tokens.

    The long cycle goes once through its divisors, in equal stages; the short cycle goes round within each stage, a
    divisor of the stage's length each few updates. The run ends at full length. Call it with `(step, total_steps)` for
    the length.

    Args:
        max_length (`int`): Full length, `L`; a multiple of each product of a long and a short divisor.
        long_cycle (`tuple[int, ...]`, *optional*, defaults to `(8, 4, 2, 1)`): Divisors of the stages.
        short_cycle (`tuple[int, ...]`, *optional*, defaults to `(4, 2, 1)`): Divisors within a stage; `(1,)` is none.
        short_steps (`int`, *optional*, defaults to 1): Updates for each divisor of the short cycle.
        final_share (`float`, *optional*, defaults to 0.2): Share of the run at full length, at its end, in `(0, 1]`.

    Raises:
        ValueError: an argument out of range, or a length that is no whole number of at least 2.

    Example:
    ```python
    >>> shapes = Multigrid(64, long_cycle=(4, 1), short_cycle=(2, 1), final_share=0.2)
    >>> [shapes(step, 10) for step in range(11)]
    [8, 16, 8, 16, 32, 64, 32, 64, 64, 64, 64]
    ```
    """

    max_length: int
    long_cycle: tuple[int, ...] = (8, 4, 2, 1)
    short_cycle: tuple[int, ...] = (4, 2, 1)
    short_steps: int = 1
    final_share: float = 0.2

    def __post_init__(self) -> None:
        check_count("max_length", self.max_length, 2)
        check_count("short_steps", self.short_steps)
        check_number("final_share", self.final_share, 0, 1, open_low=True)
        for name, cycle in (("long_cycle", self.long_cycle), ("short_cycle", self.short_cycle)):
            if not cycle:
                raise ValueError(f"{name} is empty. Use (1,) for none.")
            object.__setattr__(self, name, tuple(cycle))  # a list would not be equal, nor have a hash
            for divisor in cycle:
                check_count(f"a divisor of {name}", divisor)
        needs = "with a short_cycle of two or more divisors"
        refuse_idle("short_steps", self.short_steps, 1, len(self.short_cycle) > 1, needs)
        for divisor in (a * b for a in self.long_cycle for b in self.short_cycle):
            if self.max_length % divisor or self.max_length // divisor < 2:
                raise ValueError(
                    f"max_length={self.max_length} divided by {divisor} (a long and a short divisor) is no whole "
                    "number of at "
                    "least 2, so tokens would be padded. Use divisors whose products divide it, such as powers of 2."
                )

    def divisor(self, step: int, total_steps: int) -> int:
        """Return `c` of the update after `step` finished ones; 1 past the end."""
        check_count("step", step, 0)
        # The slack keeps 0.8 * 10 = 8.000000000000002 or 0.29 * 100 = 28.999999999999996 whole.
        varied = check_count("total_steps", total_steps, 0) - math.ceil(self.final_share * total_steps - 1e-9)
        if step >= varied:
            return 1
        stage = step * len(self.long_cycle) // varied
        begin = -(-stage * varied // len(self.long_cycle))
        place = (step - begin) // self.short_steps % len(self.short_cycle)
        return self.long_cycle[stage] * self.short_cycle[place]

    def __call__(self, step: int, total_steps: int) -> int:
        return self.max_length // self.divisor(step, total_steps)


def rechunk(batch: Tensor, length: int, fill: float) -> Tensor:
    """
    Cut every row into pieces of `length`; a shorter last piece is filled up. No entry is lost.

    Args:
        batch (`torch.Tensor`): Shape `(rows, tokens, ...)`.
        length (`int`): At least 1.
        fill (`float`): What fills up the last piece of each row.

    Returns:
        `torch.Tensor`: Shape `(rows * ceil(tokens / length), length, ...)`; the batch itself if `length >= tokens`.

    Raises:
        ValueError: `length` below 1.

    Example:
    ```python
    >>> rechunk(torch.tensor([[1, 2, 3, 4, 5]]), 2, fill=0).tolist()
    [[1, 2], [3, 4], [5, 0]]
    ```
    """
    tokens = batch.shape[1]
    if check_count("length", length) >= tokens:
        return batch
    pieces = -(-tokens // length)
    missing = pieces * length - tokens
    if missing:
        padding = torch.full_like(batch[:, :1], fill).expand(-1, missing, *batch.shape[2:])
        batch = torch.cat([batch, padding], dim=1)
    return batch.reshape(batch.shape[0] * pieces, length, *batch.shape[2:])
