"""Where each row of a GRPO run belongs: generations, micro-batches, iterations, ranks and passes over the prompts."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class GenerationLayout:
    """
    The arithmetic of a GRPO run, for everybody who asks: loader, sampler, rollouts, resume, savings, records.

    One generation makes `generated_rows` completions of `prompts` prompts on all ranks together. It is split into
    `steps_per_generation` micro-batches per rank, which are gone through `num_iterations` times: a *block* of
    `block` micro-steps. A micro-step is one call of `training_step` on every rank; the loader gives a batch at each of
    them, and only the one that starts a block is used. Counts are of micro-steps since the run began, from 0.

    Args:
        rows_per_step (`int`): Rows of one micro-batch of one rank, `per_device_train_batch_size`.
        num_generations (`int`): Completions of one prompt.
        steps_per_generation (`int`, *optional*, defaults to 1): Micro-batches that a generation is split into.
        num_iterations (`int`, *optional*, defaults to 1): How often each of them is trained on.
        accumulation_steps (`int`, *optional*, defaults to 1): Micro-steps of one update.
        world_size (`int`, *optional*, defaults to 1): Ranks.
        oversample (`int`, *optional*, defaults to 1): `R`: generate this many times more rows than are trained on.

    Raises:
        ValueError: a count below 1, or trained rows that are not whole groups.

    Example:
    ```python
    >>> layout = GenerationLayout(8, 4, steps_per_generation=2, num_iterations=2, accumulation_steps=2, oversample=2)
    >>> layout.trained_rows, layout.generated_rows, layout.prompts, layout.block
    (16, 32, 8, 4)
    >>> [layout.starts_generation(step) for step in range(5)], [layout.micro_batch(step) for step in range(5)]
    ([True, False, False, False, True], [0, 1, 0, 1, 0])
    >>> layout.steps_per_pass(num_prompts=20), layout.updates_per_pass(num_prompts=20)
    (8, 4)
    ```
    """

    rows_per_step: int
    num_generations: int
    steps_per_generation: int = 1
    num_iterations: int = 1
    accumulation_steps: int = 1
    world_size: int = 1
    oversample: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{field.name} must be a whole number of at least 1, got {value!r}.")
        if self.trained_rows % self.num_generations:
            raise ValueError(
                f"a generation of {self.trained_rows} rows ({self.rows_per_step} rows x {self.steps_per_generation} "
                f"micro-batches x {self.world_size} ranks) cannot be split into groups of num_generations="
                f"{self.num_generations}. Choose a divisor of {self.trained_rows}."
            )

    @classmethod
    def of(cls, args: Any) -> GenerationLayout:
        """Return the layout of a `GRPOConfig` or `RLOOConfig`; its `prune_oversample`, where it has one, is `R`."""
        return cls(
            rows_per_step=args.per_device_train_batch_size,
            num_generations=args.num_generations,
            steps_per_generation=args.steps_per_generation,
            num_iterations=args.num_iterations,
            accumulation_steps=args.gradient_accumulation_steps,
            world_size=args.world_size,
            oversample=getattr(args, "prune_oversample", 1),
        )

    # ---- sizes of one generation ----

    @property
    def trained_rows(self) -> int:
        """Rows of all ranks that one generation trains on: TRL's `generation_batch_size`."""
        return self.rows_per_step * self.steps_per_generation * self.world_size

    @property
    def rows_per_update(self) -> int:
        """Rows of all ranks that one update trains on."""
        return self.rows_per_step * self.accumulation_steps * self.world_size

    @property
    def generated_rows(self) -> int:
        """Rows of all ranks that one generation makes: `R` times the trained ones."""
        return self.trained_rows * self.oversample

    @property
    def loader_rows(self) -> int:
        """Rows that the loader of one rank gives at each micro-step: its share of a generation."""
        return self.generated_rows // self.world_size

    @property
    def prompts(self) -> int:
        """Distinct prompts of one generation, on all ranks together."""
        return self.generated_rows // self.num_generations

    @property
    def micro_batches(self) -> int:
        """Micro-batches of all ranks that the rows of one generation are dealt to, evenly."""
        return self.steps_per_generation * self.world_size

    def rows_of(self, rank: int, rows: int | None = None) -> range:
        """
        Return which of the gathered rows a rank holds: a contiguous slice.

        Args:
            rank (`int`): In `[0, world_size)`.
            rows (`int`, *optional*): Gathered rows, for a round that is no whole generation.
        """
        share = (self.generated_rows if rows is None else rows) // self.world_size
        return range(rank * share, (rank + 1) * share)

    def even_groups(self, groups: int) -> int:
        """Return the least number of groups, at least `groups`, whose rows can be dealt to the ranks evenly."""
        unit = self.world_size // math.gcd(self.world_size, self.num_generations)
        return -(-groups // unit) * unit

    # ---- the place of a micro-step ----

    @property
    def block(self) -> int:
        """Micro-steps from one generation to the next."""
        return self.steps_per_generation * self.num_iterations

    def starts_generation(self, step: int) -> bool:
        """Whether this micro-step generates."""
        return step % self.block == 0

    def micro_batch(self, step: int) -> int:
        """Which micro-batch of its generation this micro-step trains on, in `[0, steps_per_generation)`."""
        return step % self.steps_per_generation

    def iteration(self, step: int) -> int:
        """How often the micro-batch of this micro-step was trained on before, in `[0, num_iterations)`."""
        return step % self.block // self.steps_per_generation

    def generations(self, steps: int) -> int:
        """How many generations the first `steps` micro-steps make."""
        return -(-steps // self.block)

    def steps_of(self, updates: int, steps_per_pass: int | None = None) -> int:
        """
        Return how many micro-steps the first `updates` updates take.

        Args:
            updates (`int`): Since the run began.
            steps_per_pass (`int`, *optional*): Batches of the loader: the last update of a pass accumulates what is
                left. Without it (a stream) each update accumulates `accumulation_steps`.
        """
        if not steps_per_pass:
            return updates * self.accumulation_steps
        passes, rest = divmod(updates, -(-steps_per_pass // self.accumulation_steps))
        return passes * steps_per_pass + min(rest * self.accumulation_steps, steps_per_pass)

    def generations_of(self, first: int, last: int, steps_per_pass: int | None = None) -> list[int]:
        """Return how many generations each of the updates `first` to `last - 1` makes, counted from 0."""
        done = [self.generations(self.steps_of(update, steps_per_pass)) for update in range(first, last + 1)]
        return [after - before for before, after in zip(done[:-1], done[1:], strict=True)]

    # ---- generations and updates ----

    @property
    def updates_per_generation(self) -> Fraction:
        """Updates that one generation is used for; below 1 where an update accumulates over several generations."""
        return Fraction(self.block, self.accumulation_steps)

    @property
    def micro_batches_per_update(self) -> int | None:
        """Micro-batches of one generation that belong to one update, or `None` where that shifts between updates."""
        chunks, window = self.steps_per_generation, self.accumulation_steps
        if chunks % window == 0:
            return window
        return chunks if window % chunks == 0 else None

    # ---- passes over the prompts ----

    def generations_per_pass(self, num_prompts: int) -> int:
        """Generations of one pass over so many prompts; what does not fill a generation is left out."""
        return num_prompts // self.prompts

    def steps_per_pass(self, num_prompts: int) -> int:
        """Micro-steps, and batches of the loader, of one pass."""
        return self.generations_per_pass(num_prompts) * self.block

    def updates_per_pass(self, num_prompts: int) -> int:
        """Updates of one pass; the last one may accumulate fewer micro-steps."""
        return -(-self.steps_per_pass(num_prompts) // self.accumulation_steps)

    def rows_per_pass(self, num_prompts: int) -> int:
        """Rows that the sampler or the repeated stream gives in one pass: each generation once for each micro-step."""
        return self.steps_per_pass(num_prompts) * self.generated_rows

    def order(self, prompts: Tensor) -> Tensor:
        """
        Lay out an order of prompts as TRL's `RepeatSampler` does.

        Args:
            prompts (`torch.Tensor`): Row numbers, shape `(num_prompts,)`.

        Returns:
            `torch.Tensor`: Shape `(rows_per_pass(num_prompts),)`.

        Example:
        ```python
        >>> import torch
        >>> layout = GenerationLayout(rows_per_step=4, num_generations=2, num_iterations=2)
        >>> layout.order(torch.tensor([4, 3, 0])).tolist()
        [4, 4, 3, 3, 4, 4, 3, 3]
        ```
        """
        count = self.generations_per_pass(prompts.numel())
        chunks = prompts[: count * self.prompts].view(count, 1, self.prompts, 1)
        return chunks.expand(count, self.block, self.prompts, self.num_generations).reshape(-1)
