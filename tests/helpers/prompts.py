"""Prompts with several answers, and the padded batch that holds one row an answer."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch

#: length of a prompt -> lengths of its answers
_SHAPES = ((6, (3, 5, 1, 5)), (1, (3, 2)), (4, (3,)), (3, (3, 0, 2)), (9, (7, 7)))


def answers(count: int = len(_SHAPES), *, seed: int = 0) -> list[dict[str, Any]]:
    """Return prompts of several lengths, with one, several, equal and empty completions, in turn."""
    rng = random.Random(seed)
    rows = []
    for index in range(count):
        size, lengths = _SHAPES[index % len(_SHAPES)]
        completions = [[rng.randrange(4, 40) for _ in range(length)] for length in lengths]
        if size == 9:
            completions[1] = list(completions[0])
        rows.append({"prompt_ids": [rng.randrange(4, 40) for _ in range(size)], "completion_ids": completions})
    return rows


def pad_answers(rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Collate them as a stock Trainer has them: the prompt again in front of each completion, padded on the right."""
    pairs = [(row["prompt_ids"], completion) for row in rows for completion in row["completion_ids"]]
    width = max(len(prompt) + len(completion) for prompt, completion in pairs)

    def padded(cells: list[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([cell + [fill] * (width - len(cell)) for cell in cells])

    return {
        "input_ids": padded([prompt + completion for prompt, completion in pairs], 0),
        "attention_mask": padded([[1] * (len(prompt) + len(completion)) for prompt, completion in pairs], 0),
        "labels": padded([[-100] * len(prompt) + completion for prompt, completion in pairs], -100),
    }


#: a prompt that several rows have
EQUAL = [4, 5, 6]

#: rows of a data set, some of which share their prompt
ROWS = [
    {"prompt_ids": [1, 2], "completion_ids": [3], "reward": 0.5},
    {"prompt_ids": [9], "completion_ids": [], "reward": 0.1},
    {"prompt_ids": [1, 2], "completion_ids": [4, 5], "reward": 0.2},
    {"prompt_ids": [1, 2], "completion_ids": [3], "reward": 0.5},
]
