"""DUMP: draw prompts from the sources whose completions have the largest advantages."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ..errors import MismatchError
from ..functional.data import as_labels, check_count, check_number
from ..functional.kept_arguments import keeps_arguments
from ..functional.rollouts import ShuffledPrompts, quantile_bins, source_weights, upper_bounds
from ._history import Column, HistorySelector, saved

if TYPE_CHECKING:
    from ..protocols import RolloutGroups

#: most sources, and most of them that have metrics of their own
MOST_SOURCES, MOST_LOGGED = 1024, 16


class DUMP(HistorySelector):
    """
    A bandit over the sources of the prompts: those that teach most, or were seen least, are drawn most often.

    Each source keeps the last `window` values of `|A|`, the advantages of its completions before any filter and
    pruner, and the count `n_j` of completions that were seen. With
    `score_j = mean|A|_j + bonus * sqrt(2 ln(n + 1) / (n_j + 1))` a prompt is drawn by choosing a source with
    probability `softmax(score / temperature)` and taking its next row, in a shuffled order that has each row once.

    Paper: [DUMP](https://huggingface.co/papers/2504.09710). With `bins` the column holds difficulties, and the sources
    are bins of them, as in [SEC](https://huggingface.co/papers/2505.14970), which has no bonus.

    Args:
        source (column): Which source each row is from: the name of a column of the training dataset, or one label per
            row. At most 1024 sources.
        size (`int`, *optional*): Rows of the training dataset. By default what the trainer says.
        window (`int`, *optional*, defaults to 300): Completions of a source that are averaged, in [1, 100000].
        temperature (`float`, *optional*, defaults to 0.1): `tau > 0`: near 0 the best source alone.
        bonus (`float`, *optional*, defaults to 1): Weight of the exploration term, >= 0.
        bins (`int`, *optional*): The column holds numbers, which are cut into that many bins of about equal size.
        explore (`float`, *optional*, defaults to 0.1): Share of the rows that is drawn uniformly.
        seed (`int`, *optional*, defaults to 0): Of all draws.

    Raises:
        ValueError: an argument out of range, or too many sources.

    Example:
    ```python
    >>> selector = DUMP(["easy", "hard", "easy", "hard"])
    >>> selector.sources, selector.weights().tolist()
    (['easy', 'hard'], [0.5, 0.5])
    ```
    """

    _columns = ("source",)

    @keeps_arguments
    def __init__(
        self,
        source: Column,
        size: int | None = None,
        *,
        window: int = 300,
        temperature: float = 0.1,
        bonus: float = 1.0,
        bins: int | None = None,
        explore: float = 0.1,
        seed: int = 0,
    ) -> None:
        self.source = source
        super().__init__(size, explore, seed)
        self.window = check_count("window", window)
        check_number("window", window, 1, 100_000)
        self.temperature = check_number("temperature", temperature, 0, open_low=True)
        self.bonus = check_number("bonus", bonus, 0)
        self.bins = None if bins is None else check_count("bins", bins)
        check_number("bins", bins or 1, 1, MOST_SOURCES)

    @property
    def sources(self) -> list[Any]:
        """The sources, in the order in which they appear in the dataset; numbers of the bins with `bins`."""
        self._ready()
        return list(self._sources)

    def means(self) -> Tensor:
        """Return the mean `|A|` of the window of each source, float64, shape `(num_sources,)`; 0 where it is empty."""
        self._ready()
        return torch.stack([window.mean() if len(window) else torch.zeros((), dtype=torch.float64)
                            for window in self._windows])  # fmt: skip

    def scores(self) -> Tensor:
        """Return the UCB of each source, float64, shape `(num_sources,)`."""
        return upper_bounds(self.means(), self._counts, self.bonus)

    def weights(self) -> Tensor:
        """Return the probability of each source, float64, shape `(num_sources,)`."""
        return source_weights(self.scores(), self.temperature)

    def _begin(self, size: int) -> None:
        if self.bins is not None:
            self._of_row = quantile_bins(self._numbers("source"), self.bins)
            self._sources: list[Any] = list(range(int(self._of_row.max()) + 1))
        else:
            labels = as_labels(self._values("source"))
            numbers: dict[Any, int] = {}
            try:
                self._of_row = torch.tensor([numbers.setdefault(label, len(numbers)) for label in labels])
            except TypeError:
                raise ValueError("source: a label is a list or a dict. Give one word or number per row.") from None
            self._sources = list(numbers)
        if len(self._sources) > MOST_SOURCES:
            raise ValueError(
                f"source has {len(self._sources)} different values, at most {MOST_SOURCES} are allowed. Name a column "
                "that says where a row is from, or cut numbers into bins, e.g. bins=8."
            )
        order = torch.sort(self._of_row, stable=True).indices
        self._rows = order.split(torch.bincount(self._of_row).tolist())
        # Each source has a shuffle of its own.
        self._streams = [
            ShuffledPrompts(len(rows), self.seed * MOST_SOURCES + number) for number, rows in enumerate(self._rows)
        ]
        self._windows = [torch.zeros(0, dtype=torch.float64) for _ in self._sources]
        self._counts = torch.zeros(len(self._sources), dtype=torch.int64)

    def _choose(self, count: int, free: Tensor, generator: torch.Generator) -> Tensor:
        free, weights = free.clone(), self.weights()
        left = torch.bincount(self._of_row[free], minlength=len(weights))
        chosen: list[int] = []
        while len(chosen) < count:
            open_weights = weights * (left > 0)
            if float(open_weights.sum()) == 0:  # what the softmax has rounded to 0
                open_weights = (left > 0).to(weights.dtype)
            drawn = torch.multinomial(open_weights, count - len(chosen), replacement=True, generator=generator)
            wanted = torch.minimum(torch.bincount(drawn, minlength=len(weights)), left)
            for source in wanted.nonzero().flatten().tolist():
                chosen += self._next_rows(source, int(wanted[source]), free)
            left -= wanted
        return torch.tensor(chosen, dtype=torch.int64)

    def _next_rows(self, source: int, count: int, free: Tensor) -> list[int]:
        """Take the next free rows of a source, of which there are enough."""
        found: list[int] = []
        while len(found) < count:
            for row in self._rows[source][self._streams[source].select(count - len(found))].tolist():
                if free[row]:
                    free[row] = False
                    found.append(row)
        return found

    def _learn(self, rows: Tensor, groups: RolloutGroups) -> None:
        sizes = groups.advantages.detach().abs().to("cpu", torch.float64)
        known = cast(Tensor, groups.present).cpu() & ~torch.isnan(groups.rewards).cpu() & ~torch.isnan(sizes)
        for number, source in enumerate(self._of_row[rows].tolist()):
            values = sizes[number][known[number]]
            self._windows[source] = torch.cat([self._windows[source], values])[-self.window :]
            self._counts[source] += len(values)
        weights, scores, means = self.weights(), self.scores(), self.means()
        self._metrics["heaviest"], self._metrics["lightest"] = float(weights.max()), float(weights.min())
        if len(weights) <= MOST_LOGGED:
            for number, name in enumerate(_names(self._sources)):
                self._metrics[f"weight_{name}"] = float(weights[number])
                self._metrics[f"ucb_{name}"] = float(scores[number])
                self._metrics[f"abs_advantage_{name}"] = float(means[number])

    def _own_state(self) -> dict[str, Any]:
        return {
            "sources": [str(source) for source in self._sources],
            "windows": [window.clone() for window in self._windows],
            "counts": self._counts.clone(),
            "cursors": [stream.cursor for stream in self._streams],
        }

    def _load_own(self, state: Mapping[str, Any]) -> None:
        if state["sources"] != [str(source) for source in self._sources]:
            raise MismatchError(
                f"the sources in the checkpoint are {state['sources'][:8]}, those of this dataset "
                f"{[str(source) for source in self._sources[:8]]}. Resume with the same column."
            )
        self._counts = saved(state, "counts", self._counts)
        self._windows = [torch.as_tensor(window, dtype=torch.float64)[-self.window :] for window in state["windows"]]
        for stream, cursor in zip(self._streams, state["cursors"], strict=True):
            stream.cursor = check_count("cursor", cursor, 0)


def _names(sources: list[Any]) -> list[str]:
    """Return names of metrics, all different."""
    names = [re.sub(r"[^A-Za-z0-9_.-]", "_", str(source))[:40] for source in sources]
    return names if len(set(names)) == len(names) else [f"{number}_{name}" for number, name in enumerate(names)]
