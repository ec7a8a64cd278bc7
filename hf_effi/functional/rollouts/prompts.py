"""Where the prompts of a refill round come from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import torch

from ...errors import MismatchError
from ..data import check_count
from ..kept_arguments import keeps_arguments


def prompt_key(prompt: Any) -> int:
    """
    64 bits of a hash of a prompt's content: a string, or a conversation.

    The same on every rank and in every run, and the same for two rows of a dataset that hold the same prompt.

    Example:
    ```python
    >>> prompt_key("1+1=") == prompt_key("1+1="), prompt_key("1+1=") == prompt_key("1+2=")
    (True, False)
    >>> prompt_key([{"role": "user", "content": "hi"}]) == prompt_key([{"content": "hi", "role": "user"}])
    True
    ```
    """
    text = json.dumps(prompt, sort_keys=True, default=_content)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _content(value: Any) -> str:
    """Return what an object holds, as an image does: its `repr` can have an address in it."""
    if callable(getattr(value, "tobytes", None)):
        kind = [getattr(value, name, None) for name in ("mode", "size", "shape", "dtype")]
        return f"{type(value).__name__} {kind} {hashlib.blake2b(value.tobytes(), digest_size=16).hexdigest()}"
    return repr(value)


def draw_fresh(
    select: Callable[[int], list[int]], count: int, is_fresh: Callable[[int], bool], most: int
) -> list[int]:
    """
    Draw rows and pass over those that are not fresh, while there are others.

    Args:
        select (`Callable[[int], list[int]]`): Gives that many row numbers.
        count (`int`): Rows wanted.
        is_fresh (`Callable[[int], bool]`): Asked once for each row that was drawn, in order. It must say `False` for a
            row that it has accepted before.
        most (`int`): Rows drawn before the search is given up; what is missing is then taken from those passed over,
            in the order in which they were first drawn.

    Returns:
        `list[int]`: `count` row numbers.

    Example:
    ```python
    >>> stream = iter([3, 1, 3, 4, 5])
    >>> seen = {1}
    >>> def is_fresh(row):
    ...     fresh = row not in seen
    ...     seen.add(row)
    ...     return fresh
    >>> draw_fresh(lambda count: [next(stream) for _ in range(count)], 3, is_fresh, most=5)
    [3, 4, 5]
    ```
    """
    fresh: list[int] = []
    passed: list[int] = []
    draws: list[list[int]] = []
    # Who gives the same rows three times has no others. (A shuffled stream can give a row twice, between two passes.)
    while len(fresh) < count and len(fresh) + len(passed) < max(most, count) and not _repeats(draws):
        draws.append(select(count - len(fresh)))
        for row in draws[-1]:
            (fresh if is_fresh(row) else passed).append(row)
    spare = list(dict.fromkeys(passed))  # each of them once before any of them twice
    return (fresh + spare * count)[:count]


def _repeats(draws: list[list[int]]) -> bool:
    return len(draws) >= 3 and draws[-1] == draws[-2] == draws[-3]


class ShuffledPrompts:
    """
    Endless stream of dataset rows: one seeded permutation after another, no row twice within a pass.

    A pure function of `(seed, cursor)`, so every rank draws the same rows and a resumed run goes on where it stopped.

    Args:
        size (`int`): Rows of the dataset, >= 1.
        seed (`int`, *optional*, defaults to `0`): Seed of the permutations, at least 0.

    Example:
    ```python
    >>> prompts = ShuffledPrompts(size=3, seed=0)
    >>> first, second = prompts.select(3), prompts.select(3)
    >>> sorted(first), sorted(second), prompts.passes
    ([0, 1, 2], [0, 1, 2], 2.0)
    ```
    """

    @keeps_arguments
    def __init__(self, size: int, seed: int = 0) -> None:
        self.size = check_count("size", size)
        self.seed = check_count("seed", seed, 0)
        self.cursor = 0
        self._pass = -1
        self._order: list[int] = []

    @property
    def passes(self) -> float:
        """How often the stream has gone through the dataset, with the rows that a refill passed over."""
        return self.cursor / self.size

    def select(self, count: int) -> list[int]:
        """Return the next `count` row numbers."""
        rows = []
        for position in range(self.cursor, self.cursor + count):
            self._load_pass(position // self.size)
            rows.append(self._order[position % self.size])
        self.cursor += count
        return rows

    def observe(self, rows: list[int], groups: Any) -> None:
        """Take no notice: a shuffled stream does not depend on rewards."""

    def state_dict(self) -> dict[str, Any]:
        return {"size": self.size, "seed": self.seed, "cursor": self.cursor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Go on where `state` stopped.

        Raises:
            MismatchError: the state belongs to a dataset of another size.
        """
        if state["size"] != self.size:
            raise MismatchError(
                f"the checkpoint's prompt stream is over {state['size']} rows, this dataset has {self.size}. Resume "
                "with the same dataset, or start a new run from the checkpoint's weights."
            )
        self.seed, self.cursor, self._pass = state["seed"], state["cursor"], -1

    def _load_pass(self, number: int) -> None:
        if number != self._pass:
            # Mixing the pass into the seed gives each pass its own order without replaying the earlier ones.
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + number) % 2**63)
            self._order = torch.randperm(self.size, generator=generator).tolist()
            self._pass = number
