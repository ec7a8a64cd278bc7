"""Training on one example, or on a few: a dataset of nothing but these rows."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from ..functional.data import check_count


def repeat_rows(dataset: Any, rows: Sequence[int], count: int) -> Any:
    """
    Return a dataset of `count` rows that repeats some rows of another one in turn, each equally often.

    One-shot RLVR repeats one example until it fills the batch, 128 prompts:
    [2504.20571](https://huggingface.co/papers/2504.20571). Each copy is a group of its own with its own completions.

    Args:
        dataset (`datasets.Dataset` or `Sequence`): Map-style.
        rows (`Sequence[int]`): Row numbers, all different, such as
            [`~hf_effi.functional.rollouts.high_variance_rows`] returns.
        count (`int`): Rows of the result, a multiple of `len(rows)`; at least the prompts of one generation
            (`generation_batch_size / num_generations`).

    Returns:
        `datasets.Dataset` or `list`: Of the kind that was given; a list for another sequence.

    Raises:
        TypeError: a stream, whose rows have no numbers.
        ValueError: no row, one twice or that is not there, or a `count` that gives some rows more copies than others.

    Example:
    ```python
    >>> repeat_rows(["a", "b", "c"], [2, 0], count=4)
    ['c', 'a', 'c', 'a']
    ```
    """
    if not hasattr(dataset, "__len__"):
        raise TypeError(
            f"repeat_rows picks rows by number, which a stream ({type(dataset).__name__}) has not. Use a map-style "
            "dataset."
        )
    chosen = [operator.index(row) for row in rows]
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"rows={chosen} must be at least one row number, none of them twice.")
    if wrong := [row for row in chosen if not 0 <= row < len(dataset)]:
        raise ValueError(f"row {wrong[0]} is none of the dataset, which has rows 0 to {len(dataset) - 1}.")
    if check_count("count", count) % len(chosen):
        raise ValueError(
            f"count={count} is no multiple of {len(chosen)} rows, so that some would come more often than others. "
            f"Use {max(1, count // len(chosen)) * len(chosen)}."
        )
    repeated = chosen * (count // len(chosen))
    return dataset.select(repeated) if hasattr(dataset, "select") else [dataset[row] for row in repeated]
