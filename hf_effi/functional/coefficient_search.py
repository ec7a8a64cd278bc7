"""A search for the coefficients with which to combine checkpoints: plain evolution, helped by a quadratic model."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from .averaging import averaging_weights, trend_weights

Score = Callable[[list[float]], float]
#: (1 + lambda): children of a generation
_CHILDREN = 4
#: how far a child may go from its parent in the quadratic model, in units of the largest distance seen so far
_TRUST = 2.0


@dataclass(frozen=True)
class CoefficientSearch:
    """
    What a search has found.

    Args:
        weights (`list[float]`): The coefficients to use, oldest checkpoint first; they sum to 1.
        name (`str`): `"searched"`, or the name of the plain combination that is used instead.
        score (`float`): Of `weights` on the search set.
        plain (`dict[str, float]`): Score of each plain combination on the search set.
        searched (`list[float]`): The best coefficients on the search set, accepted or not.
        searched_score (`float`): Their score on the search set.
        confirmed (`bool`, *optional*): Whether they were better than the best plain combination on the second set too;
            `None` where there is no second set.
        confirm_scores (`dict[str, float]`): Scores on the second set: of the best plain combination and of
            `"searched"`.
        evaluations (`int`): Combinations that were scored on the search set.
        history (`list[float]`): Best score after each evaluation.
    """

    weights: list[float]
    name: str
    score: float
    plain: dict[str, float]
    searched: list[float]
    searched_score: float
    confirmed: bool | None
    confirm_scores: dict[str, float]
    evaluations: int
    history: list[float] = field(repr=False)

    def __str__(self) -> str:
        best = min(self.plain, key=lambda name: self.plain[name])
        on_search = f"searched {self.searched_score:.5g}, best plain ({best}) {self.plain[best]:.5g} on the search set"
        if self.confirmed is None and self.name == "searched":
            return f"{on_search}; used without a second set."
        if self.name == "searched":
            return f"{on_search}; better on the second set too ({self._second(best)}): used."
        if not self.confirm_scores:
            return f"{on_search}; nothing better than {self.name} was found, which is used."
        return f"{on_search}; not better on the second set ({self._second(best)}): {self.name} is used."

    def _second(self, best: str) -> str:
        return f"{self.confirm_scores['searched']:.5g} against {self.confirm_scores[best]:.5g}"


def plain_combinations(count: int) -> dict[str, list[float]]:
    """
    Return the combinations that a search has to beat, by name: last, uniform, EMA, linear, trend.

    Example:
    ```python
    >>> plain_combinations(2)["uniform"]
    [0.5, 0.5]
    ```
    """
    found = {"last": [0.0] * (count - 1) + [1.0], "uniform": averaging_weights(count, "uniform")}
    if count >= 2:
        found |= {"ema": averaging_weights(count, "ema", 0.2), "ema_0.5": averaging_weights(count, "ema", 0.5)}
        found["linear"] = averaging_weights(count, "linear")
    if count >= 3:
        found["trend"] = trend_weights(count)
    return found


def search_weights(
    count: int,
    score: Score,
    *,
    confirm: Score | None,
    budget: int = 64,
    seed: int = 0,
) -> CoefficientSearch:
    """
    Search the coefficients of a linear combination of checkpoints (LCSC, 2404.02241).

    They sum to 1 and may be negative. The search begins with the plain combinations, so what it finds is never worse
    than the best of them on the search set. Then generations of `(1 + 4)` evolution: children are the parent plus
    Gaussian steps inside the plane of equal sum, or lie on the line through the two best; the step grows after a
    success and shrinks after a failure. Once there are enough scores, one child of each generation is the minimum of
    the quadratic that least squares fits through them, since a loss is nearly quadratic along the span of the
    checkpoints of one run. The source searches by evolution too; its settings are not known to us, these are ours.

    A coefficient set with many members overfits the set on which it was chosen, so the found one is used only where it
    beats the best plain combination on a second set as well.

    Args:
        count (`int`): Checkpoints, at least 2.
        score (`Callable[[list[float]], float]`): Loss of a combination on the search set; less is better. NaN and
            infinity count as worst.
        confirm (`Callable`, *optional*): The same on a second set, called twice at the end. `None`: the best on the
            search set is used as it is.
        budget (`int`, *optional*, defaults to 64): Combinations that are scored, more than the plain ones (6).
        seed (`int`, *optional*, defaults to 0): Of the evolution. Equal seeds give equal results.

    Returns:
        [`CoefficientSearch`]

    Raises:
        ValueError: fewer than 2 checkpoints, a budget that the plain combinations use up, or no plain combination with
            a finite score.

    Example:
    ```python
    >>> wanted = [-0.3, 0.1, 1.2]
    >>> def distance(weights):
    ...     return sum((w - v) ** 2 for w, v in zip(weights, wanted))
    >>> [round(w, 3) for w in search_weights(3, distance, confirm=distance).weights]
    [-0.3, 0.1, 1.2]
    ```
    """
    if not isinstance(count, int) or isinstance(count, bool) or count < 2:
        raise ValueError(f"count={count!r} must be an integer of at least 2: there is nothing to combine.")
    starts = plain_combinations(count)
    if not isinstance(budget, int) or isinstance(budget, bool) or budget <= len(starts):
        raise ValueError(f"budget={budget!r} must be an integer above {len(starts)}, the plain combinations alone.")
    seen: list[tuple[float, list[float]]] = []
    history: list[float] = []

    def tried(weights: list[float]) -> float:
        value = float(score(weights))
        value = value if math.isfinite(value) else math.inf
        seen.append((value, weights))
        history.append(min(value, history[-1] if history else math.inf))
        return value

    plain = {name: tried(weights) for name, weights in starts.items()}
    best_plain = min(plain, key=lambda name: plain[name])
    if plain[best_plain] == math.inf:
        raise ValueError(f"No plain combination has a finite score ({plain}). Check the function that scores.")
    _evolve(tried, seen, budget, random.Random(seed))
    searched_score, searched = min(seen, key=lambda pair: pair[0])
    confirmed, second = None, dict[str, float]()
    better = searched_score < plain[best_plain]
    if better and confirm is not None:
        second = {best_plain: float(confirm(starts[best_plain])), "searched": float(confirm(searched))}
        confirmed = second["searched"] < second[best_plain]
    use = better and confirmed is not False
    return CoefficientSearch(
        weights=searched if use else starts[best_plain],
        name="searched" if use else best_plain,
        score=searched_score if use else plain[best_plain],
        plain=plain,
        searched=searched,
        searched_score=searched_score,
        confirmed=confirmed,
        confirm_scores=second,
        evaluations=len(seen),
        history=history,
    )


def _evolve(tried: Score, seen: list[tuple[float, list[float]]], budget: int, draw: random.Random) -> None:
    """Score generations of children until the budget is used up."""
    count = len(seen[0][1])
    step = 0.5 / math.sqrt(count)
    while len(seen) < budget:
        parents = sorted(seen, key=lambda pair: pair[0])[:2]
        best, parent = parents[0]
        children = [_quadratic_minimum(seen)]
        children.append(_between(parent, parents[1][1], draw))
        children += [_mutated(parent, step, draw) for _ in range(_CHILDREN - 1)]
        chosen = [child for child in children if child is not None][: min(_CHILDREN, budget - len(seen))]
        improved = min(map(tried, chosen)) < best
        step *= 1.5 if improved else 0.6
        step = max(step, 1e-4)


def _mutated(parent: Sequence[float], step: float, draw: random.Random) -> list[float]:
    noise = [draw.gauss(0.0, step) for _ in parent]
    mean = math.fsum(noise) / len(noise)
    return [weight + value - mean for weight, value in zip(parent, noise, strict=True)]


def _between(one: Sequence[float], other: Sequence[float], draw: random.Random) -> list[float]:
    """Return a point on the line through the two best, up to half of their distance outside of them."""
    share = draw.uniform(-0.5, 1.5)
    return [(1 - share) * a + share * b for a, b in zip(one, other, strict=True)]


def _quadratic_minimum(seen: Sequence[tuple[float, list[float]]]) -> list[float] | None:
    """
    Return the minimum of the quadratic through the best scores, `None` where there are too few or it has none.

    The coordinates are those of the plane of equal sum, so that the result sums to 1 again.
    """
    finite = sorted((pair for pair in seen if pair[0] < math.inf), key=lambda pair: pair[0])
    count = len(seen[0][1])
    size = count - 1
    unknowns = (size + 1) * (size + 2) // 2
    if len(finite) < unknowns:
        return None
    points = torch.tensor([weights for _, weights in finite[: 2 * unknowns]], dtype=torch.float64)
    scores = torch.tensor([value for value, _ in finite[: 2 * unknowns]], dtype=torch.float64)
    center, basis = points[0], _plane(count)
    coordinates = (points - center) @ basis
    reach = coordinates.norm(dim=1).max().clamp_min(1e-12)
    z = coordinates / reach
    upper = torch.triu_indices(size, size)
    columns = [torch.ones(len(z), 1, dtype=torch.float64), z, z[:, upper[0]] * z[:, upper[1]]]
    found = torch.linalg.lstsq(torch.cat(columns, 1), scores[:, None], driver="gelsd").solution[:, 0]
    gradient, flat = found[1 : 1 + size], found[1 + size :]
    hessian = torch.zeros(size, size, dtype=torch.float64)
    hessian[upper[0], upper[1]] = flat
    hessian = hessian + hessian.T
    values, vectors = torch.linalg.eigh(hessian)
    if not torch.isfinite(values).all() or values[0] <= 1e-9 * values[-1].abs():
        return None  # no bowl
    move = -vectors @ ((vectors.T @ gradient) / values)
    move = move * min(1.0, _TRUST / max(move.norm().item(), 1e-12))
    made = (center + (basis @ move) * reach).tolist()
    rest = (1 - math.fsum(made)) / count
    return [weight + rest for weight in made]


def _plane(count: int) -> torch.Tensor:
    """Return an orthonormal basis of the vectors that sum to 0, shape `(count, count - 1)`."""
    columns = []
    for place in range(1, count):
        column = torch.zeros(count, dtype=torch.float64)
        column[:place], column[place] = 1.0, -float(place)
        columns.append(column / column.norm())
    return torch.stack(columns, 1)
