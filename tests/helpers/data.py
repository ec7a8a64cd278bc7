"""Tiny deterministic data sets and reward functions."""

from __future__ import annotations

import random
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset

from .tokenizer import SPECIAL_TOKENS, VOCAB_SIZE

Completion = str | list[dict[str, str]]


def text_of(message: Completion) -> str:
    """Return the plain text of a prompt or completion in either format (the last message of a conversation)."""
    return message if isinstance(message, str) else message[-1]["content"]


def prompt_dataset(size: int = 16, *, conversational: bool = False, seed: int = 0) -> Dataset:
    """
    Return `size` distinct additions of ragged length for GRPO.

    Returns:
        `Dataset`: columns `prompt` (a string, or a list of messages when `conversational`), `answer` (`str`) and
        `level` (`int`, 0-3, the length of the operands: something for a curriculum to read).
    """
    rng = random.Random(seed)
    rows: dict[str, list[Any]] = {"prompt": [], "answer": [], "level": []}
    for index in range(size):
        level = index % 4
        left, right = rng.randrange(10**level, 10 ** (level + 1)), rng.randrange(10)
        text = f"{index}: {left}+{right}="
        rows["prompt"].append([{"role": "user", "content": text}] if conversational else text)
        rows["answer"].append(str(left + right))
        rows["level"].append(level)
    return Dataset.from_dict(rows)


def sft_dataset(size: int = 16, *, seed: int = 0) -> Dataset:
    """Return `size` lines of ragged length in a `text` column for `SFTTrainer`."""
    problems = prompt_dataset(size, seed=seed)
    return Dataset.from_dict({"text": [row["prompt"] + row["answer"] for row in problems]})


def lm_dataset(size: int = 32, *, length: int = 12, seed: int = 0) -> Dataset:
    """Return `size` rows of `length` random tokens for a plain `Trainer`: columns `input_ids` and `labels`."""
    rng = random.Random(seed)
    rows = [[rng.randrange(len(SPECIAL_TOKENS), VOCAB_SIZE) for _ in range(length)] for _ in range(size)]
    return Dataset.from_dict({"input_ids": rows, "labels": [list(row) for row in rows]})


def length_reward(completions: Sequence[Completion], **kwargs: Any) -> list[float]:
    """Number of characters over 10: differs within most groups, and can be learned."""
    return [len(text_of(completion)) / 10 for completion in completions]


def parity_reward(completions: Sequence[Completion], **kwargs: Any) -> list[float]:
    """1 when the sum of the character codes is even, else 0."""
    return [float(sum(map(ord, text_of(completion))) % 2 == 0) for completion in completions]


def binary_hash_reward(completions: Sequence[Completion], **kwargs: Any) -> list[float]:
    """0 or 1 as a pure function of the completion's text: groups mix, and equal texts always score equal."""
    return [float(zlib.crc32(text_of(completion).encode()) >> 7 & 1) for completion in completions]


class TableReward:
    """
    Serve rewards from a fixed table, by prompt and by how often that prompt was scored before.

    The k-th completion scored for a prompt gets entry k of its row, whatever the completion says. Completions are
    counted in global order (rank 0's rows first), so that the table means the same at any number of ranks. Calls are
    therefore collective when a process group is up; every rank must call equally often, as `GRPOTrainer` does.

    Args:
        table (`Mapping[str, Sequence[float]]` or `Sequence[Sequence[float]]`):
            Rewards by prompt text; or rows, handed to the prompts in the order in which they are first seen, again
            from the first row when there are more prompts. A row that is used up starts again. `None` and `nan` are
            allowed as entries.
    """

    def __init__(self, table: Mapping[str, Sequence[float | None]] | Sequence[Sequence[float | None]]) -> None:
        self.rows = dict(table) if isinstance(table, Mapping) else {}
        self.spare = [] if isinstance(table, Mapping) else [list(row) for row in table]
        self.seen: Counter[str] = Counter()
        self.calls = 0
        self.__name__ = "table_reward"

    def _row(self, prompt: str) -> Sequence[float | None]:
        if prompt not in self.rows:
            if not self.spare:
                raise KeyError(f"TableReward has no row for the prompt {prompt!r}. Known: {sorted(self.rows)}.")
            self.rows[prompt] = self.spare[len(self.rows) % len(self.spare)]
        return self.rows[prompt]

    def _next(self, prompt: str) -> float | None:
        row = self._row(prompt)
        self.seen[prompt] += 1
        return row[(self.seen[prompt] - 1) % len(row)]

    def __call__(
        self, prompts: Sequence[Completion], completions: Sequence[Completion], **kwargs: Any
    ) -> list[float | None]:
        self.calls += 1
        mine = [text_of(prompt) for prompt in prompts]
        if not torch.distributed.is_initialized():
            return [self._next(prompt) for prompt in mine]
        every: list[list[str]] = [[] for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(every, mine)
        served = [[self._next(prompt) for prompt in prompts_of_rank] for prompts_of_rank in every]
        return served[torch.distributed.get_rank()]
