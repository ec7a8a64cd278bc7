"""GRPO that changes its number of ranks: when its updates stay the same, and how a generation is dealt anew."""

from __future__ import annotations

from collections.abc import Sequence

from .layout import GenerationLayout

#: `(rank, micro-batch, row)` of the layout that a row comes from
Place = tuple[int, int, int]


def first_difference(before: GenerationLayout, now: GenerationLayout) -> str | None:
    """
    Return what keeps two layouts from training on the same samples in the same update, or `None`.

    Two layouts do where these five are equal: rows per update (`W b A`: ranks, rows per rank, accumulation steps),
    rows per generation (`W b S`: micro-batches per generation), completions per prompt, iterations per generation and
    how many times more rows are generated than trained on.

    Args:
        before, now ([`GenerationLayout`]): Of the checkpoint, and of the run that goes on from it.

    Returns:
        `str`, *optional*: The first quantity that differs, with both values.

    Example:
    ```python
    >>> two = GenerationLayout(2, 4, steps_per_generation=4, accumulation_steps=4, world_size=2)
    >>> one = GenerationLayout(2, 4, steps_per_generation=8, accumulation_steps=8)
    >>> first_difference(two, one)
    >>> first_difference(two, GenerationLayout(2, 4, steps_per_generation=8, accumulation_steps=4))
    'rows per update: 16 before (2 ranks x 2 x 4 accumulation steps), 8 now (1 ranks x 2 x 4)'
    ```
    """
    ways = {
        "rows per update": (
            "rows_per_update",
            f" ({before.world_size} ranks x {before.rows_per_step} x {before.accumulation_steps} accumulation steps)",
            f" ({now.world_size} ranks x {now.rows_per_step} x {now.accumulation_steps})",
        ),
        "rows per generation": (
            "trained_rows",
            f" ({before.world_size} ranks x {before.rows_per_step} x {before.steps_per_generation} micro-batches)",
            f" ({now.world_size} ranks x {now.rows_per_step} x {now.steps_per_generation})",
        ),
        "num_generations": ("num_generations", "", ""),
        "num_iterations": ("num_iterations", "", ""),
        "prune_oversample": ("oversample", "", ""),
    }
    for name, (field, of_before, of_now) in ways.items():
        one, other = getattr(before, field), getattr(now, field)
        if one != other:
            return f"{name}: {one} before{of_before}, {other} now{of_now}"
    return None


def micro_step_in(before: GenerationLayout, now: GenerationLayout, step: int) -> int:
    """
    Return the micro-step of a layout at which as many rows have been trained on as at `step` of another one.

    Formula: `step' = step (W b) / (W' b')`.

    Args:
        before, now ([`GenerationLayout`]): Two layouts without a [`first_difference`].
        step (`int`): Micro-steps under `before` since the run began, at the end of an update.

    Raises:
        ValueError: the place is inside of a micro-batch of `now`, so that it is not the end of an update.

    Example:
    ```python
    >>> two = GenerationLayout(2, 4, steps_per_generation=4, accumulation_steps=4, world_size=2)
    >>> micro_step_in(two, GenerationLayout(2, 4, steps_per_generation=8, accumulation_steps=8), 12)
    24
    ```
    """
    rows, size = step * before.rows_per_step * before.world_size, now.rows_per_step * now.world_size
    if rows % size:
        raise ValueError(f"{rows} trained rows are no whole number of micro-batches of {size} rows.")
    return rows // size


def deal_again(
    counts: Sequence[Sequence[int]], before: GenerationLayout, now: GenerationLayout
) -> list[list[list[Place]]] | None:
    """
    Deal the rows of a generation to another number of ranks, such that each update trains on the rows that it would
    have had.

    The rows of the micro-batches of one update, of all ranks, are dealt evenly to the micro-batches that the update
    has now. Where updates are larger than a generation, all rows of it belong together.

    Args:
        counts (`Sequence[Sequence[int]]`): Rows of each micro-batch of each rank, shape `(W, S)`. Filters and pruning
            may have left fewer than `rows_per_step`.
        before, now ([`GenerationLayout`]): Two layouts without a [`first_difference`].

    Returns:
        `list`, *optional*: `[rank][micro-batch]`, each a list of `(rank, micro-batch, row)` under `before`. `None`
        where the rows cannot be dealt: an update takes no whole number of micro-batches of a generation, or the rows
        do not divide evenly, so that the mean over micro-batches would be another one.

    Example:
    ```python
    >>> two = GenerationLayout(1, 2, steps_per_generation=2, accumulation_steps=1, world_size=2)
    >>> one = GenerationLayout(1, 2, steps_per_generation=4, accumulation_steps=2)
    >>> deal_again([[1, 1], [1, 1]], two, one)
    [[[(0, 0, 0)], [(1, 0, 0)], [(0, 1, 0)], [(1, 1, 0)]]]
    ```
    """
    window, new_window = before.micro_batches_per_update, now.micro_batches_per_update
    if window is None or new_window is None:
        return None
    if len({count for of_rank in counts for count in of_rank}) != 1:
        return None
    hands: list[list[list[Place]]] = [[] for _ in range(now.world_size)]
    for start in range(0, before.steps_per_generation, window):
        rows = [
            (rank, chunk, row)
            for chunk in range(start, start + window)
            for rank in range(before.world_size)
            for row in range(counts[rank][chunk])
        ]
        size, rest = divmod(len(rows), new_window * now.world_size)
        if rest or not size:
            return None
        parts = [rows[first : first + size] for first in range(0, len(rows), size)]
        for rank, hand in enumerate(hands):
            hand.extend(parts[rank :: now.world_size])
    return hands
