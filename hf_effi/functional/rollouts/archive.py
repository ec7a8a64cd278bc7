"""An archive of attempts at one problem, and the choice of which one to improve next."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...errors import MismatchError
from ..data import check_count, check_number


def puct_scores(
    values: Tensor | Sequence[float],
    visits: Tensor | Sequence[int],
    best_children: Tensor | Sequence[float],
    total: int,
    c: float = 1.0,
    initial: Tensor | Sequence[bool] | None = None,
) -> Tensor:
    """
    Score the states of an archive: what came of a state, and a bonus for good states that were seldom tried.

    `score_i = Q_i + c * scale * P_i * sqrt(1 + T) / (1 + n_i)`. `Q_i` is the best value of a child, the state's own
    value while `n_i = 0`. `P` is proportional to the rank of the value: the best of `N` states has weight `N`, the
    worst 1, of equal ones the earlier is the better. `scale` is the range of the values of states that are not
    initial, at least 1e-6; of all states where there are no others. TTT-Discover, Sec. 3,
    [2601.16175](https://huggingface.co/papers/2601.16175).

    Args:
        values (`torch.Tensor` or `Sequence[float]`): Of the states, greater is better, shape `(num_states,)`.
        visits (`torch.Tensor` or `Sequence[int]`): Expansions of each state and its descendants, `n`.
        best_children (`torch.Tensor` or `Sequence[float]`): Best value of a child; read where `n > 0`. NaN where no
            child was valid: the own value counts.
        total (`int`): Expansions in all, `T`.
        c (`float`, *optional*, defaults to 1): Weight of the bonus, at least 0.
        initial (`torch.Tensor` or `Sequence[bool]`, *optional*): Which states the run began with. None without.

    Returns:
        `torch.Tensor`: float64, shape `(num_states,)`.

    Raises:
        ValueError: numbers of other shapes or out of range.

    Example:
    ```python
    >>> [round(s, 3) for s in puct_scores([0, 1, 3], [0, 2, 1], [0, 2, 3], total=3).tolist()]
    [1.0, 2.667, 4.5]
    ```
    """
    own = torch.as_tensor(values, dtype=torch.float64)
    tried = torch.as_tensor(visits, dtype=torch.float64)
    below = torch.as_tensor(best_children, dtype=torch.float64)
    first = torch.zeros(len(own), dtype=torch.bool) if initial is None else torch.as_tensor(initial, dtype=torch.bool)
    if own.ndim != 1 or not own.shape == tried.shape == below.shape == first.shape:
        raise ValueError(
            "values, visits, best_children and initial must have one number per state, got shapes "
            f"{tuple(own.shape)}, {tuple(tried.shape)}, {tuple(below.shape)} and {tuple(first.shape)}."
        )
    if not bool(torch.isfinite(own).all()) or bool((tried < 0).any()):
        raise ValueError("values must be finite, and visits at least 0.")
    check_count("total", total, 0)
    check_number("c", c, 0)
    if not len(own):
        return own
    ranged = own[~first] if bool((~first).any()) else own
    scale = max(float(ranged.max() - ranged.min()), 1e-6)
    order = torch.sort(own, descending=True, stable=True).indices
    prior = torch.empty_like(own)
    prior[order] = torch.arange(len(own), 0, -1, dtype=torch.float64)
    prior /= prior.sum()
    reached = torch.where((tried > 0) & ~below.isnan(), below, own)
    return reached + c * scale * prior * math.sqrt(1 + total) / (1 + tried)


@dataclass
class _Node:
    state: str
    value: float
    ancestors: list[int] = field(default_factory=list)  # nearest first
    visits: int = 0
    best_child: float = math.nan


class PUCTArchive:
    """
    States of one problem, with their values and where they came from.

    [`pick`] returns the states to improve, [`record`] takes what came of them. A state that was picked blocks its
    ancestors and descendants in the same batch. Of the children of a state only the best ones stay, and of all states
    the best `capacity`; those that the run began with always stay.

    Args:
        initial (`Mapping[str, float]`): States to begin with and their values, at least one.
        c (`float`, *optional*, defaults to 1): See [`puct_scores`].
        children (`int`, *optional*, defaults to 2): Most children of one state, at least 1.
        capacity (`int`, *optional*, defaults to 1000): Most states, at least as many as `initial`.

    Raises:
        ValueError: an argument out of range.

    Example:
    ```python
    >>> archive = PUCTArchive({"start": 0.0})
    >>> archive.pick(2)
    [0]
    >>> archive.record({0: [("a", 1.0), ("b", 3.0), ("c", 2.0)]})
    [2, 3]
    >>> archive.pick(2), archive.best
    ([2, 3], ('b', 3.0))
    ```
    """

    def __init__(self, initial: Mapping[str, float], c: float = 1.0, children: int = 2, capacity: int = 1000) -> None:
        if not isinstance(initial, Mapping) or not initial:
            raise ValueError(f"initial must be at least one state and its value, {{state: value}}, got {initial!r}.")
        self.c = check_number("c", c, 0)
        self.children, self.capacity = check_count("children", children), check_count("capacity", capacity)
        if capacity < len(initial):
            raise ValueError(f"capacity={capacity} is below the {len(initial)} initial states, which always stay.")
        self.nodes: dict[int, _Node] = {}
        for state, value in initial.items():
            self.nodes[len(self.nodes)] = _Node(*_checked(state, value))
        #: states that the run began with: numbers below this
        self.initial = len(self.nodes)
        #: number of the next state, expansions in all
        self.next_id, self.total = self.initial, 0
        self._best = max(((n.state, n.value) for n in self.nodes.values()), key=lambda pair: pair[1])

    def __len__(self) -> int:
        return len(self.nodes)

    @property
    def best(self) -> tuple[str, float]:
        """The best state so far and its value, whether it is still in the archive or not."""
        return self._best

    def scores(self) -> dict[int, float]:
        """Return the score of each state by its number."""
        nodes = list(self.nodes.values())
        found = puct_scores(
            [node.value for node in nodes],
            [node.visits for node in nodes],
            [node.best_child for node in nodes],
            self.total,
            self.c,
            [number < self.initial for number in self.nodes],
        )
        return dict(zip(self.nodes, found.tolist(), strict=True))

    def pick(self, count: int, taken: Collection[int] = ()) -> list[int]:
        """
        Return the numbers of at most `count` states, the best score first, of which none descends from another.

        Args:
            count (`int`): States wanted, at least 0.
            taken (`Collection[int]`, *optional*): Numbers that the batch already has; they block their lines, too.
        """
        check_count("count", count, 0)
        blocked: set[int] = set()
        for number in taken:
            blocked |= self._line(number)
        picked: list[int] = []
        for number in self.ranking():
            if len(picked) < count and number not in blocked:
                picked.append(number)
                blocked |= self._line(number)
        return picked

    def ranking(self) -> list[int]:
        """Return all numbers by score, of equal scores the better value first, then the earlier state."""
        scores = self.scores()
        return sorted(self.nodes, key=lambda number: (-scores[number], -self.nodes[number].value, number))

    def _line(self, number: int) -> set[int]:
        """Return a state with its ancestors and descendants."""
        below = {other for other, node in self.nodes.items() if number in node.ancestors}
        above = self.nodes[number].ancestors if number in self.nodes else ()
        return {number, *above, *below}

    def record(self, expansions: Mapping[int, Sequence[tuple[str, float]]]) -> list[int]:
        """
        Take the children of the states that were tried in one batch, and return the numbers of those that stay.

        Each state that was tried counts once, for itself and its ancestors, however many children it has; one without
        a valid child counts too. A state that the archive has already is not added again.

        Args:
            expansions (`Mapping[int, Sequence[tuple[str, float]]]`): Number of the parent -> states and values.

        Raises:
            ValueError: a value that is not finite, or a state that is no text.
        """
        known = {node.state for node in self.nodes.values()}
        fresh: list[int] = []
        for parent, children in expansions.items():
            found = [_checked(state, value) for state, value in children]
            node = self.nodes.get(parent)
            if node is None:
                continue  # it left the archive since it was picked, and its children have no place to count
            self.total += 1
            for number in (parent, *node.ancestors):
                if number in self.nodes:
                    self.nodes[number].visits += 1
            for state, value in found:
                if not node.best_child >= value:  # also NaN
                    node.best_child = value
                if value > self._best[1]:
                    self._best = (state, value)
                if state not in known:
                    known.add(state)
                    self.nodes[self.next_id] = _Node(state, value, [parent, *node.ancestors])
                    fresh.append(self.next_id)
                    self.next_id += 1
            self._keep_best_children(parent)
        self._keep_best_states()
        return [number for number in fresh if number in self.nodes]

    def _keep_best_children(self, parent: int) -> None:
        children = [number for number, node in self.nodes.items() if node.ancestors[:1] == [parent]]
        children.sort(key=lambda number: (-self.nodes[number].value, number))
        for number in children[self.children :]:
            del self.nodes[number]

    def _keep_best_states(self) -> None:
        others = [number for number in self.nodes if number >= self.initial]
        others.sort(key=lambda number: (-self.nodes[number].value, number))
        for number in others[self.capacity - self.initial :]:
            del self.nodes[number]

    def state_dict(self) -> dict[str, Any]:
        """Return the archive as numbers, texts and lists."""
        rows = [
            [number, node.state, node.value, list(node.ancestors), node.visits, node.best_child]
            for number, node in self.nodes.items()
        ]
        return {
            "initial": self.initial, "next_id": self.next_id, "total": self.total, "best": list(self._best),
            "nodes": rows,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        Go on where `state` stopped.

        Raises:
            MismatchError: it began with another number of states, or is no archive.
        """
        try:
            rows = {int(row[0]): _Node(str(row[1]), float(row[2]), list(row[3]), int(row[4]), float(row[5]))
                    for row in state["nodes"]}  # fmt: skip
            initial, next_id, total = int(state["initial"]), int(state["next_id"]), int(state["total"])
            best = (str(state["best"][0]), float(state["best"][1]))
        except (IndexError, KeyError, TypeError, ValueError) as error:
            raise MismatchError(
                f"the state in the checkpoint is no archive of states ({type(error).__name__}: {error}). Resume with "
                "what the run was begun with."
            ) from None
        if initial != self.initial:
            raise MismatchError(
                f"the archive in the checkpoint began with {initial} states, this one with {self.initial}. Resume "
                "with the same ones, or start a new run from the checkpoint's weights."
            )
        self.nodes, self.next_id, self.total, self._best = rows, next_id, total, best


def _checked(state: Any, value: Any) -> tuple[str, float]:
    if not isinstance(state, str):
        raise ValueError(f"a state must be a text, got {state!r}. Write it as one, e.g. with json.dumps.")
    return state, float(check_number("value", value, -math.inf))
