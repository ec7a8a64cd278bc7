"""What the selectors that decide from history share: size, columns, exclusion, exploration, state."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import MismatchError
from ..functional.data import check_count, check_number, clean_scores, seeded
from ..functional.rollouts import draw_uniform, round_at_random

if TYPE_CHECKING:
    from ..protocols import RolloutGroups, SelectionContext

#: a column of the training dataset by its name, or one value per row
Column = str | Sequence[Any] | Tensor


class HistorySelector:
    """
    Chooses rows by what was seen of them; a subclass says how, this class does the rest.

    A subclass offers `_begin()` (makes its tables, once the number of rows is known), `_choose(count, free,
    generator)` (different free rows, at most `count`; what is missing is drawn uniformly), `_learn(rows, groups)`, and
    `_own_state()` and `_load_own(state)`. Its columns are attributes that [`_read`] replaces by values.

    Args:
        size (`int`, *optional*): Rows of the training dataset. By default what the trainer says.
        explore (`float`): Share of the rows of each call that is drawn uniformly, in [0, 1].
        seed (`int`): Of all draws, with the count of the calls.
    """

    #: attributes that hold a column
    _columns: tuple[str, ...] = ()

    def __init__(self, size: int | None, explore: float, seed: int) -> None:
        self.size = None if size is None else check_count("size", size)
        self.explore = check_number("explore", explore, 0, 1)
        self.seed = check_count("seed", seed, 0)
        #: calls of `select` so far
        self.draws = 0
        self._begun = False
        self._uniform_rows = self._all_rows = 0
        self._metrics: dict[str, float] = {}
        #: the attributes before the first run
        self._unused: dict[str, Any] | None = None
        for name in self._columns:
            self._size_from(name)

    # --- what a trainer calls ---------------------------------------------------------------------------------------

    def attach(self, context: SelectionContext) -> None:
        """
        Take the number of rows and the columns of the training dataset.

        Raises:
            ValueError: `size` or the values of a column are those of another dataset, or a column is not there.
        """
        # A second trainer gets the selector as it was made: with the names of its columns, and without a history.
        if self._unused is None:
            self._unused = {name: self._copy(name, value) for name, value in vars(self).items() if name != "_unused"}
        else:
            vars(self).update({name: self._copy(name, value) for name, value in self._unused.items()})
        for name in self._columns:
            if isinstance(getattr(self, name), str):
                setattr(self, name, context.column(getattr(self, name)))
        if self.size is not None and self.size != context.size:
            raise ValueError(
                f"{type(self).__name__} is for {self.size} rows, the training dataset has {context.size}. Leave out "
                "`size`, and give columns by their name."
            )
        self.size = context.size

    def select(self, count: int, *, exclude: frozenset[int] = frozenset()) -> list[int]:
        """
        Return `count` row numbers, none twice and none of `exclude` while there are others.

        Args:
            count (`int`): Rows wanted, at least 0. Of a dataset with fewer they repeat.
            exclude (`frozenset[int]`, *optional*): Rows that the step already has.
        """
        check_count("count", count, 0)
        size = self._ready()
        generator = seeded(self.seed, self.draws)
        self.draws += 1
        free = torch.ones(size, dtype=torch.bool)
        if taken := [row for row in exclude if 0 <= row < size]:
            free[taken] = False
        left = int(free.sum())
        if left == 0:
            free[:] = True
            left = size
        distinct = min(count, left)
        uniform = draw_uniform(free, round_at_random(self.explore * distinct, generator), generator)
        free[uniform] = False
        chosen = self._choose(distinct - len(uniform), free, generator)
        free[chosen] = False
        rest = draw_uniform(free, distinct - len(uniform) - len(chosen), generator)
        self._uniform_rows += len(uniform)
        self._all_rows += distinct
        # Anywhere among the others: what is surplus later is dropped from the end, explored or not.
        explored = torch.zeros(distinct, dtype=torch.bool)
        explored[torch.randperm(distinct, generator=generator)[: len(uniform)]] = True
        placed = torch.empty(distinct, dtype=torch.int64)
        placed[explored], placed[~explored] = uniform, torch.cat([chosen, rest])
        rows: list[int] = placed.tolist()
        return (rows * (count // max(1, distinct) + 1))[:count]

    def observe(self, rows: list[int], groups: RolloutGroups) -> None:
        """
        Take what was generated for these rows.

        Raises:
            ValueError: it cannot be told which completions are right, and the method has to know.
        """
        self._ready()
        self._metrics = {}
        if self._all_rows:
            self._metrics["explored"] = self._uniform_rows / self._all_rows
        self._uniform_rows = self._all_rows = 0
        self._learn(torch.as_tensor(rows, dtype=torch.int64), groups)

    def metrics(self) -> dict[str, float]:
        """Return the numbers of the last [`observe`], which are logged as `effi/select/<name>`."""
        return dict(self._metrics)

    def state_dict(self) -> dict[str, Any]:
        """Return the state: tensors, numbers and lists."""
        size = self._ready()
        return {"size": size, "seed": self.seed, "draws": self.draws, **self._own_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        Go on where `state` stopped.

        Raises:
            MismatchError: the state belongs to a dataset of another size, or to another selector.
        """
        if self.size is not None and state.get("size") != self.size:
            raise MismatchError(
                f"the state of {type(self).__name__} in the checkpoint is over {state.get('size')} rows, this dataset "
                f"has {self.size}. Resume with the same dataset, or start a new run from the checkpoint's weights."
            )
        try:
            self.size = check_count("size", state["size"])
            self.seed, self.draws = check_count("seed", state["seed"], 0), check_count("draws", state["draws"], 0)
            self._begun = False  # some tables hang on the seed
            self._ready()
            self._load_own(state)
        except KeyError as error:
            raise MismatchError(
                f"the state in the checkpoint has no {error}: it is that of another selector than "
                f"{type(self).__name__}. Resume with the selector that the run was begun with."
            ) from None

    # --- what a subclass offers -------------------------------------------------------------------------------------

    def _begin(self, size: int) -> None:
        """Make the tables of `size` rows."""

    def _choose(self, count: int, free: Tensor, generator: torch.Generator) -> Tensor:
        raise NotImplementedError

    def _learn(self, rows: Tensor, groups: RolloutGroups) -> None:
        """Take what was generated."""

    def _own_state(self) -> dict[str, Any]:
        return {}

    def _load_own(self, state: Mapping[str, Any]) -> None:
        """Take the state, which has the size of this dataset."""

    # --- helpers ----------------------------------------------------------------------------------------------------

    def _ready(self) -> int:
        """Return the number of rows, having made the tables."""
        if self.size is None:
            raise ValueError(
                f"{type(self).__name__} does not know how many rows the dataset has. EffiGRPOTrainer tells it; in a "
                "loop of your own pass size=len(dataset)."
            )
        if not self._begun:
            self._begin(self.size)
            self._begun = True
        return self.size

    def _copy(self, name: str, value: Any) -> Any:
        return value if name in self._columns else copy.deepcopy(value)

    def _size_from(self, name: str) -> None:
        """Take the number of rows from the values of a column."""
        values = getattr(self, name)
        if values is None or isinstance(values, str):
            return
        scalar = isinstance(values, Tensor) and values.ndim == 0
        if scalar or not isinstance(values, (Sequence, Tensor)) or isinstance(values, bytes) or len(values) == 0:
            raise ValueError(
                f"{name}={values!r} must be the name of a column of the training dataset, or one value per row."
            )
        if self.size is not None and self.size != len(values):
            raise ValueError(f"{name} has {len(values)} values for {self.size} rows. Pass one value per row.")
        self.size = len(values)

    def _numbers(self, name: str, low: float | None = None, high: float | None = None) -> Tensor:
        """Return the values of a column, float64, shape `(size,)`."""
        values = clean_scores(self._values(name), name)
        if low is not None and high is not None and bool(((values < low) | (values > high)).any()):
            wrong = int(((values < low) | (values > high)).nonzero()[0])
            raise ValueError(f"{name}: row {wrong} has {float(values[wrong])!r}, which is outside [{low}, {high}].")
        if bool(torch.isinf(values).any()):
            raise ValueError(f"{name}: row {int(torch.isinf(values).nonzero()[0])} is infinite. Give finite numbers.")
        return values

    def _values(self, name: str) -> Any:
        values = getattr(self, name)
        if isinstance(values, str):
            raise ValueError(
                f"{name}={values!r} is a column that {type(self).__name__} reads when EffiGRPOTrainer hands it the "
                f"training dataset. In a loop of your own pass the values: {name}=dataset[{values!r}]."
            )
        return values


def saved(state: Mapping[str, Any], name: str, like: Tensor) -> Tensor:
    """
    Return a tensor of a state, a copy with the kind and shape of `like`.

    Raises:
        MismatchError: it has another shape.
    """
    value = torch.as_tensor(state[name])
    if value.shape != like.shape:
        raise MismatchError(
            f"{name} in the checkpoint has shape {tuple(value.shape)} where this run has {tuple(like.shape)}. Resume "
            "with the dataset and the arguments that the run was begun with."
        )
    return value.to(like.dtype).clone()


class StepTotals:
    """
    Adds up numbers over the rounds of generation of one optimizer step.

    A rule that moves something once a step is applied after each round to what there was before the step, so that it
    acts at once and counts once.

    Args:
        count (`int`): Numbers that are added up.

    Example:
    ```python
    >>> totals = StepTotals(1)
    >>> totals.add(0, [2.0], now=[0.5]), totals.add(0, [3.0], now=[0.6]), totals.add(1, [1.0], now=[0.6])
    (([0.5], [2.0]), ([0.5], [5.0]), ([0.6], [1.0]))
    ```
    """

    def __init__(self, count: int) -> None:
        self._step, self._before, self._totals = -1, list[float](), [0.0] * count

    def add(self, step: int, values: Iterable[float], now: Sequence[float]) -> tuple[list[float], list[float]]:
        """Return what `now` was before the step, and the totals of the step with `values`."""
        if step != self._step:
            self._step, self._before, self._totals = step, list(now), [0.0] * len(self._totals)
        self._totals = [total + value for total, value in zip(self._totals, values, strict=True)]
        return list(self._before), list(self._totals)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step, "before": list(self._before), "totals": list(self._totals)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._step, self._before, self._totals = state["step"], list(state["before"]), list(state["totals"])
