"""GAIN-RL: prompts in the order of the angles between the model's own states, by a Gaussian that moves along it."""

from __future__ import annotations

import numbers
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ..errors import MismatchError
from ..functional.data import check_count, check_number, seeded
from ..functional.kept_arguments import keeps_arguments
from ..functional.options import refuse_idle
from ..functional.rollouts import (
    angle_score,
    check_success_at,
    draw_by_gaussian,
    mean_cosine,
    next_mean,
    shared_ends,
    successes_of,
)

if TYPE_CHECKING:
    from ..protocols import RolloutGroups, SelectionContext

#: of the paper, on the 7473 rows of GSM8K
_ROWS, _WIDTH, _STEP, _SUBSET = 7473, 1000, 500, 1024
#: rows whose prompts are held at once in the pass over the dataset
_CHUNK = 4096


class GainRL:
    """
    Order the dataset by how aligned the model's states of each prompt are, and draw prompts by a Gaussian over the
    ranks, whose mean moves on as the model gets better
    ([2506.02281](https://huggingface.co/papers/2506.02281)).

    The score of a prompt is `C_intra + inter_weight * C_inter`, see
    [`~hf_effi.functional.rollouts.angle_score`]; a high one comes first. It is computed in one pass over the prompts
    before the first generation, kept in each checkpoint as the order, or read from a column. Prompts are drawn in
    subsets without replacement, and before each subset the mean moves by
    [`~hf_effi.functional.rollouts.next_mean`] from the accuracy and the angles of what was generated since the last
    one.

    Args:
        size (`int`, *optional*): Rows of the training dataset. By default what the trainer says.
        scores_column (`str`, *optional*): Column of the dataset with the scores, in place of the pass.
            `selector.scores` holds those of a pass, to be stored in one.
        prefix_tokens, suffix_tokens (`int`, *optional*): Tokens before and after the question, such as a system
            prompt and the end of the chat template. By default what all prompts share.
        inter_weight (`float`, *optional*, defaults to 8): Weight of the angles with the prefix, at least 0. The
            released code: 8.
        subset (`int`, *optional*): Prompts between two moves; defaults to `1024 / 7473` of the dataset.
        width (`float`, *optional*, defaults to 1000 / 7473): Standard deviation of the Gaussian as a share of the
            dataset, positive. The paper: 1000 ranks of GSM8K's 7473.
        step (`float`, *optional*, defaults to 500 / 7473): Scale of a move as a share of the dataset, at least 0; no
            move is longer than two of it. The paper: 500 ranks.
        accuracy_gain, accuracy_target, angle_gain (`float`, *optional*, default to 2, 0.5 and 0.5): `alpha`, `beta`
            and `gamma` of the paper.
        success_at (`float`, *optional*): Lowest reward of a right answer. Without it the reward that decides must be 0
            or 1.
        seed (`int`, *optional*, defaults to 0): Seed of the draws, at least 0.

    Raises:
        ValueError: an argument out of range, or one that another one leaves without use.

    Example:
    ```python
    >>> selector = GainRL(7473)
    >>> selector.subset, round(selector.width * 7473), round(selector.step * 7473)
    (1024, 1000, 500)
    ```
    """

    @keeps_arguments
    def __init__(
        self,
        size: int | None = None,
        *,
        scores_column: str | None = None,
        prefix_tokens: int | None = None,
        suffix_tokens: int | None = None,
        inter_weight: float = 8.0,
        subset: int | None = None,
        width: float = _WIDTH / _ROWS,
        step: float = _STEP / _ROWS,
        accuracy_gain: float = 2.0,
        accuracy_target: float = 0.5,
        angle_gain: float = 0.5,
        success_at: float | None = None,
        seed: int = 0,
    ) -> None:
        self.size: int | None = None
        self._asked_size, self._asked_subset = size, subset
        if scores_column is not None and (not isinstance(scores_column, str) or not scores_column):
            raise ValueError(f"scores_column={scores_column!r} must be the name of a column.")
        for name, count in (("prefix_tokens", prefix_tokens), ("suffix_tokens", suffix_tokens)):
            refuse_idle(name, count, None, scores_column is None, "without scores_column=")
            if count is not None:
                check_count(name, count, 0)
        refuse_idle("inter_weight", inter_weight, 8.0, scores_column is None, "without scores_column=")
        self.scores_column, self.prefix_tokens, self.suffix_tokens = scores_column, prefix_tokens, suffix_tokens
        self.inter_weight = check_number("inter_weight", inter_weight, 0)
        self.subset = None if subset is None else check_count("subset", subset)
        self.width = check_number("width", width, 0, open_low=True)
        self.step = check_number("step", step, 0)
        self.accuracy_gain = check_number("accuracy_gain", accuracy_gain, 0)
        self.accuracy_target = check_number("accuracy_target", accuracy_target, 0, 1)
        self.angle_gain = check_number("angle_gain", angle_gain, 0)
        check_success_at(success_at)
        self.success_at, self.seed = success_at, check_count("seed", seed, 0)
        self._context: SelectionContext | None = None
        self._metrics: dict[str, float] = {}
        self._begin()
        if size is not None:
            self._set_size(check_count("size", size))

    def _begin(self) -> None:
        #: rank of the dataset that the Gaussian stands at
        self.mean = 0.0
        self.scores: Tensor | None = None
        self._order: Tensor | None = None
        self._queue: list[int] = []
        self._subsets = 0
        #: of what was generated since the last move: right and scorable completions, sum of angles, prompts
        self._seen = [0.0, 0.0, 0.0, 0.0]

    def _set_size(self, size: int) -> None:
        self.size = size
        self.subset = max(1, round(_SUBSET / _ROWS * size)) if self._asked_subset is None else self._asked_subset
        if self.subset > size:
            raise ValueError(f"subset={self.subset} exceeds the {size} rows of the dataset.")

    def attach(self, context: SelectionContext) -> None:
        """
        Take the model and the dataset of the run, and forget those of an earlier one.

        Raises:
            ValueError: the dataset has another size, or no numbers in `scores_column`.
        """
        if self._asked_size not in (None, context.size):
            raise ValueError(
                f"GainRL was made for {self._asked_size} rows, the training dataset has {context.size}. Leave out "
                "`size`."
            )
        self._begin()
        self._set_size(context.size)
        self._context = context
        if self.scores_column is not None:
            values = context.column(self.scores_column)
            if wrong := [row for row, value in enumerate(values) if not isinstance(value, numbers.Real)]:
                raise ValueError(
                    f"scores_column={self.scores_column!r} has {values[wrong[0]]!r} in row {wrong[0]}, where a number "
                    "is needed. Score all rows, or leave scores_column out for a pass over the dataset."
                )
            self._set_scores(torch.tensor(values, dtype=torch.float64))

    @property
    def _attached(self) -> SelectionContext:
        if self._context is None:
            raise ValueError(
                "GainRL has no model to read prompts with: pass it to EffiGRPOTrainer(prompt_selector=...), or call "
                "attach(context) first."
            )
        return self._context

    @property
    def _per_subset(self) -> int:
        return cast(int, self.subset)  # known with the size

    @property
    def _rows(self) -> int:
        return self._attached.size

    def _set_scores(self, scores: Tensor) -> None:
        if (wrong := torch.isnan(scores).nonzero().flatten()).numel():
            raise ValueError(f"the angle score of row {int(wrong[0])} is not a number.")
        self.scores = scores
        self._order = torch.sort(scores, descending=True, stable=True).indices

    def _ordered(self) -> Tensor:
        """Return the rows by descending score; the pass over the dataset is made when it is first needed."""
        if self._order is None:
            context = self._attached
            chunks = [range(start, min(self._rows, start + _CHUNK)) for start in range(0, self._rows, _CHUNK)]
            prefix, suffix = self._ends(chunks)

            def read(states: Tensor, ids: Tensor) -> Tensor:
                return angle_score(states, prefix, suffix, self.inter_weight).reshape(1)

            found = [context.read_prompts(chunk, read, layer="mlp").flatten() for chunk in chunks]
            self._set_scores(torch.cat(found))
        return cast(Tensor, self._order)

    def _ends(self, chunks: list[range]) -> tuple[int, int]:
        found: tuple[int, int] | None = None
        if self.prefix_tokens is None or self.suffix_tokens is None:
            first: list[int] = []
            for chunk in chunks:
                ids = self._attached.prompt_ids(chunk)
                first = first or ids[0]
                found = shared_ends([first, *ids], found)
        prefix, suffix = found or (0, 0)
        return (
            prefix if self.prefix_tokens is None else self.prefix_tokens,
            suffix if self.suffix_tokens is None else self.suffix_tokens,
        )

    def _next_subset(self) -> None:
        right, scored, angles, prompts = self._seen
        if scored and prompts:
            moved = next_mean(
                self.mean,
                right / scored,
                angles / prompts,
                self.step * self._rows,
                accuracy_gain=self.accuracy_gain,
                accuracy_target=self.accuracy_target,
                angle_gain=self.angle_gain,
            )
            self.mean = min(moved, float(self._rows - 1))
            self._seen = [0.0, 0.0, 0.0, 0.0]
        generator = seeded(self.seed, self._subsets)
        ranks = draw_by_gaussian(self._rows, self.mean, self.width * self._rows, self._per_subset, generator)
        self._queue = self._ordered()[ranks].tolist()
        self._subsets += 1

    def select(self, count: int, exclude: Collection[int] = frozenset()) -> list[int]:
        """Return `count` row numbers. Every rank must call it."""
        known, found = set(exclude), list[int]()
        for _ in range(2 * (count + self._per_subset)):
            if len(found) == count:
                return found
            if not self._queue:
                self._next_subset()
            row = self._queue.pop(0)
            if row not in known:
                found.append(row)
                known.add(row)
        # So narrow a Gaussian gives the same rows again: the nearest others of the order, and then repetitions.
        by_rank = sorted(range(self._rows), key=lambda rank: (abs(rank - self.mean), rank))
        order = self._ordered().tolist()
        others = [order[rank] for rank in by_rank if order[rank] not in known]
        found += others[: count - len(found)]
        again = found or [order[rank] for rank in by_rank]
        return found + [again[place % len(again)] for place in range(count - len(found))]

    def observe(self, rows: list[int], groups: RolloutGroups) -> None:
        """Take the accuracy of these rows, and the angles that the policy has for them now."""
        successes, counts = successes_of(groups, self.success_at)
        if not rows:
            return
        angles = self._attached.read_prompts(rows, lambda states, ids: mean_cosine(states).reshape(1), layer="mlp")
        new = [float(successes.sum()), float(counts.sum()), float(angles.double().sum()), float(len(rows))]
        self._seen = [a + b for a, b in zip(self._seen, new, strict=True)]
        self._metrics = {"mean_rank": self.mean, "angle": new[2] / new[3]}
        if new[1]:
            self._metrics["accuracy"] = new[0] / new[1]

    def metrics(self) -> dict[str, float]:
        """Return where the Gaussian stands, and accuracy and mean angle of the last generation."""
        return dict(self._metrics)

    def state_dict(self) -> dict[str, Any]:
        return {
            "size": self.size,
            "seed": self.seed,
            "order": self._order,
            "scores": self.scores,
            "mean": self.mean,
            "queue": list(self._queue),
            "subsets": self._subsets,
            "seen": list(self._seen),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Go on where `state` stopped, in the order that was found then.

        Raises:
            MismatchError: the state is of a dataset of another size.
        """
        if state.get("size") != self.size:
            raise MismatchError(
                f"the checkpoint's order is over {state.get('size')} rows, this dataset has {self.size}. Resume with "
                "the same dataset, or start a new run from the checkpoint's weights."
            )
        self.seed, self._order, self.mean = state["seed"], state["order"], state["mean"]
        self.scores = state["scores"]
        self._queue, self._subsets, self._seen = list(state["queue"]), state["subsets"], list(state["seen"])
