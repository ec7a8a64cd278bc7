"""Where the prompts of a refill round come from."""

from __future__ import annotations

from typing import Any

import torch


class ShuffledPrompts:
    """
    Endless stream of dataset rows: one seeded permutation after another, no row twice within a pass.

    A pure function of `(seed, cursor)`, so every rank draws the same rows and a resumed run goes on where it stopped.

    Args:
        size (`int`): Rows of the dataset, >= 1.
        seed (`int`, *optional*, defaults to `0`): Seed of the permutations.

    Example:
    ```python
    >>> prompts = ShuffledPrompts(size=3, seed=0)
    >>> first, second = prompts.select(3), prompts.select(3)
    >>> sorted(first), sorted(second), prompts.passes
    ([0, 1, 2], [0, 1, 2], 2.0)
    ```
    """

    def __init__(self, size: int, seed: int = 0):
        if size < 1:
            raise ValueError(f"the dataset must have at least one row, got {size}.")
        self.size = size
        self.seed = seed
        self.cursor = 0
        self._pass = -1
        self._order: list[int] = []

    @property
    def passes(self) -> float:
        """How often the dataset has been served."""
        return self.cursor / self.size

    def select(self, count: int) -> list[int]:
        """Return the next `count` row numbers."""
        rows = []
        for position in range(self.cursor, self.cursor + count):
            self._load_pass(position // self.size)
            rows.append(self._order[position % self.size])
        self.cursor += count
        return rows

    def observe(self, rows: list[int], pass_rates: list[float]) -> None:
        """Take no notice: a shuffled stream does not depend on rewards."""

    def state_dict(self) -> dict[str, Any]:
        return {"size": self.size, "seed": self.seed, "cursor": self.cursor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Go on where `state` stopped.

        Raises:
            ValueError: the state belongs to a dataset of another size.
        """
        if state["size"] != self.size:
            raise ValueError(
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
