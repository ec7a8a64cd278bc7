"""A fixed set of prompts to measure on, which nothing that chooses prompts can choose."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..functional.data import check_count, check_number, seeded
from ..functional.rollouts import prompt_key

if TYPE_CHECKING:
    from datasets import Dataset


def split_probe(
    dataset: Dataset,
    *,
    rows: int | None = None,
    fraction: float | None = None,
    seed: int = 0,
    column_for_duplicates: str = "prompt",
) -> tuple[Dataset, Dataset]:
    """
    Split a dataset into a training part and a probe, of which no prompt is left in the training part.

    While prompts are selected, the logged reward is that of the selected ones: it stays near the target whatever the
    model learns. The reward on prompts that were drawn once, uniformly, and are never trained on, is a measure. Pass
    the probe as `eval_dataset=` with `eval_strategy="steps"`; its rewards are logged as `eval_reward`.

    Args:
        dataset (`datasets.Dataset`): With a length, not a stream.
        rows (`int`, *optional*): Prompts of the probe, at least 1. Give `rows` or `fraction`.
        fraction (`float`, *optional*): Share of the distinct prompts, in (0, 1); at least one prompt.
        seed (`int`, *optional*, defaults to 0): Seed of the draw, at least 0.
        column_for_duplicates (`str`, *optional*, defaults to `"prompt"`): Rows with the same content in this column
            are the same prompt: one of them is in the probe and the others are in neither part.

    Returns:
        `tuple[Dataset, Dataset]`: The training part and the probe, each in the order of the dataset.

    Raises:
        ValueError: a stream or no dataset, no such column, neither or both of `rows` and `fraction`, or a part without
            rows.

    Example:
    ```python
    >>> from datasets import Dataset
    >>> train, probe = split_probe(Dataset.from_dict({"prompt": ["a", "b", "c", "b", "d"]}), rows=2)
    >>> len(probe), set(train["prompt"]) & set(probe["prompt"])
    (2, set())
    ```
    """
    if not hasattr(dataset, "__len__") and hasattr(dataset, "take"):
        raise ValueError(
            "a probe cannot be drawn from a stream, whose end nobody knows. Take its first rows, "
            "probe = Dataset.from_list(list(stream.take(256))), and train on stream.skip(256)."
        )
    if not isinstance(getattr(dataset, "column_names", None), list):
        raise ValueError(
            f"dataset is {type(dataset).__name__}, and a probe is drawn from one datasets.Dataset. Make one by "
            "Dataset.from_list(rows), or take a part of a DatasetDict, e.g. dataset['train']."
        )
    if column_for_duplicates not in dataset.column_names:
        raise ValueError(
            f"column_for_duplicates={column_for_duplicates!r} is no column of the dataset, which has "
            f"{', '.join(dataset.column_names)}."
        )
    if (rows is None) == (fraction is None):
        raise ValueError(f"rows={rows!r} and fraction={fraction!r}: give exactly one of them.")
    keys = [prompt_key(value) for value in dataset[column_for_duplicates]]
    first: dict[int, int] = {}
    for row, key in enumerate(keys):
        first.setdefault(key, row)
    if fraction is not None:
        check_number("fraction", fraction, 0, 1, open_low=True, open_high=True)
        rows = max(1, round(fraction * len(first)))
    count = check_count("rows", rows)
    if count >= len(first):
        raise ValueError(
            f"a probe of {count} prompts leaves none of {len(first)} distinct ones to train on. Lower rows or "
            "fraction."
        )
    distinct = list(first)
    drawn = torch.randperm(len(distinct), generator=seeded(check_count("seed", seed, 0)))[:count].tolist()
    probe = {distinct[place] for place in drawn}
    training = dataset.select([row for row, key in enumerate(keys) if key not in probe])
    return training, dataset.select(sorted(first[key] for key in probe))
