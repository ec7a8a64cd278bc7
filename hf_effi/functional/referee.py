"""Which run was faster: cost to a target, performance profiles over workloads, compute-equivalent gain."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

#: AlgoPerf's: a submission that takes this many times the fastest counts as not having arrived
R_MAX = 4.0
Point = tuple[float, float]


def time_to_target(
    points: Sequence[Point],
    target: float,
    direction: Literal["lower", "higher"],
    patience: int = 1,
    interpolate: bool = False,
) -> float | None:
    """
    Return the cost at which a measured curve first meets a target, or `None` where it never does.

    Args:
        points (`Sequence[tuple[float, float]]`): Cost so far (seconds, updates, tokens; evaluation left out) and
            value at each evaluation, by rising cost. A value that is not finite meets no target.
        target (`float`): Set before the runs.
        direction (`str`): `"lower"` where smaller values are better, `"higher"` otherwise.
        patience (`int`, *optional*, defaults to 1): Evaluations in a row that must meet it; the cost is that of the
            first of them.
        interpolate (`bool`, *optional*, defaults to `False`): Go back along a straight line to where the value of
            the evaluation before would have met it. Off, the cost is one that was really paid.

    Raises:
        ValueError: costs that fall, or an argument out of range.

    Example:
    ```python
    >>> curve = [(10, 3.0), (20, 2.0), (30, 1.0)]
    >>> time_to_target(curve, 1.5, "lower"), time_to_target(curve, 1.5, "lower", interpolate=True)
    (30, 25.0)
    ```
    """
    if direction not in ("lower", "higher"):
        raise ValueError(f"direction={direction!r} must be 'lower' or 'higher'.")
    if isinstance(patience, bool) or not isinstance(patience, int) or patience < 1:
        raise ValueError(f"patience={patience!r} must be a whole number of at least 1.")
    if not math.isfinite(target):
        raise ValueError(f"target={target!r} must be a finite number.")
    if any(later[0] < earlier[0] for earlier, later in zip(points, points[1:], strict=False)):
        raise ValueError("The costs of a curve must not fall. Sort its points, and add up the parts of a resumed run.")
    sign = 1.0 if direction == "lower" else -1.0
    met = [math.isfinite(value) and sign * value <= sign * target for _, value in points]
    for i in range(len(points) - patience + 1):
        if not all(met[i : i + patience]):
            continue
        cost, value = points[i]
        if interpolate and i and math.isfinite(points[i - 1][1]) and points[i - 1][1] != value:
            before, previous = points[i - 1]
            return before + (cost - before) * (previous - target) / (previous - value)
        return cost
    return None


@dataclass(frozen=True)
class Profile:
    """
    Performance profiles of several submissions.

    Args:
        ratios (`dict[str, tuple[float, ...]]`): Submission -> for each workload its cost over the smallest one, `inf`
            where it did not arrive.
        scores (`dict[str, float]`): Submission -> `B = 1 / (r_max - 1) * integral from 1 to r_max of rho`, in [0, 1].
        r_max (`float`): Ratio up to which a submission counts.
    """

    ratios: dict[str, tuple[float, ...]]
    scores: dict[str, float]
    r_max: float

    def share_within(self, submission: str, ratio: float) -> float:
        """Return `rho`: the share of the workloads that a submission solves within `ratio` times the fastest."""
        values = self.ratios[submission]
        return sum(value <= ratio for value in values) / len(values)

    def curve(self, submission: str) -> list[Point]:
        """Return the steps of `rho` between 1 and `r_max` as (ratio, share), for a picture."""
        places = sorted({1.0, self.r_max, *(r for r in self.ratios[submission] if 1 <= r <= self.r_max)})
        return [(place, self.share_within(submission, place)) for place in places]


def performance_profile(costs: Mapping[str, Sequence[float | None]], r_max: float = R_MAX) -> Profile:
    """
    Compare submissions over several workloads, as AlgoPerf does.

    Formula: `r_(s,w) = t_(s,w) / min_s' t_(s',w)`; `rho_s(tau)` is the share of workloads with `r_(s,w) <= tau`; the
    score is its mean over tau from 1 to `r_max`. Paper: Dahl et al., Benchmarking Neural Network Training Algorithms
    (2306.07179). There a cost is the median over studies of the best of several trials.

    Args:
        costs (`Mapping[str, Sequence[float | None]]`): Submission -> cost to the target on each workload, in one
            order; `None` or `inf` where it was not reached.
        r_max (`float`, *optional*, defaults to 4.0): Above 1.

    Raises:
        ValueError: no submission, unequal numbers of workloads, a cost that is not above 0, or a workload that nobody
            solves, which says nothing.

    Example:
    ```python
    >>> profile = performance_profile({"A": (1, 2, 10), "B": (2, 1, 4), "C": (4, 8, None)})
    >>> {name: round(score, 4) for name, score in profile.scores.items()}
    {'A': 0.7222, 'B': 0.8889, 'C': 0.0}
    ```
    """
    if not r_max > 1 or not math.isfinite(r_max):
        raise ValueError(f"r_max={r_max!r} must be a number above 1, as 4.")
    table = {name: [math.inf if cost is None else float(cost) for cost in row] for name, row in costs.items()}
    sizes = {len(row) for row in table.values()}
    if not table or sizes == {0} or len(sizes) != 1:
        raise ValueError("Each submission needs one cost for each workload, in the same order; None where it failed.")
    if any(not cost > 0 for row in table.values() for cost in row):
        raise ValueError("A cost must be above 0; None stands for a target that was not reached.")
    count = sizes.pop()
    best = [min(row[w] for row in table.values()) for w in range(count)]
    if dead := [w for w in range(count) if math.isinf(best[w])]:
        raise ValueError(f"No submission reaches the target of workload {dead[0]} (from 0). Leave it out, and say so.")
    ratios = {name: tuple(row[w] / best[w] for w in range(count)) for name, row in table.items()}
    # The integral of a step function: each workload adds the stretch from its ratio to the end.
    scores = {
        name: sum(max(0.0, r_max - ratio) for ratio in row if math.isfinite(ratio)) / (count * (r_max - 1))
        for name, row in ratios.items()
    }
    return Profile(ratios, scores, r_max)


def compute_equivalent_gain(base: Sequence[Point], compute: float, loss: float) -> float | None:
    """
    Return by which factor the baseline's compute would have to grow for the loss that a method has, or `None` where
    that lies beyond the baseline's curve: a number there would be an extrapolation.

    Formula: `CEG = C_base(L) / C`, with `C_base` on straight lines between the baseline's points, both axes
    logarithmic. Paper: Davidson et al., AI capabilities can be significantly improved without expensive retraining
    (2312.07413).

    Args:
        base (`Sequence[tuple[float, float]]`): Compute and loss of the baseline, at the end of runs of several sizes
            or budgets; at least 2, both above 0. Of points that are worse than a cheaper one only the cheaper counts.
        compute, loss (`float`): Of the method; above 0.

    Raises:
        ValueError: fewer than 2 points, or a value that is not above 0.

    Example:
    ```python
    >>> base = [(1.0, 4.0), (4.0, 2.0), (16.0, 1.0)]
    >>> compute_equivalent_gain(base, 2.0, 2.0), compute_equivalent_gain(base, 16.0, 0.5)
    (2.0, None)
    ```
    """
    values = [value for point in (*base, (compute, loss)) for value in point]
    if len(base) < 2 or any(not math.isfinite(value) or value <= 0 for value in values):
        raise ValueError("compute_equivalent_gain needs at least 2 points of the baseline, and numbers above 0.")
    front: list[Point] = []
    for point in sorted(base):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    if not front[-1][1] <= loss <= front[0][1]:
        return None
    for (c0, l0), (c1, l1) in zip(front, front[1:], strict=False):
        if l1 <= loss <= l0:
            share = (math.log(l0) - math.log(loss)) / (math.log(l0) - math.log(l1))
            return math.exp(math.log(c0) + share * (math.log(c1) - math.log(c0))) / compute
    return front[0][0] / compute


def median_cost(costs: Sequence[float | None]) -> float | None:
    """
    Return the median cost over seeds, of which those that did not arrive are the most expensive; `None` where the
    median one did not arrive.

    Raises:
        ValueError: no cost.

    Example:
    ```python
    >>> median_cost([3.0, None, 1.0]), median_cost([3.0, None, None])
    (3.0, None)
    ```
    """
    if not costs:
        raise ValueError("median_cost needs at least one seed.")
    middle = statistics.median(math.inf if cost is None else cost for cost in costs)
    return None if math.isinf(middle) else middle
