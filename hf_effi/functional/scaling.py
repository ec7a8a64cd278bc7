"""Scaling laws: loss as a function of parameters and tokens, fitted to finished runs, with an interval."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Point = tuple[float, float, float]
#: starts of a fit, as in the published code: log E, log A, log B, alpha, beta
_GRID = {
    "e": (-1.0, -0.5, 0.0, 0.5, 1.0),
    "a": (0.0, 5.0, 10.0, 15.0, 20.0, 25.0),
    "b": (0.0, 5.0, 10.0, 15.0, 20.0, 25.0),
    "alpha": (0.0, 0.5, 1.0, 1.5, 2.0),
    "beta": (0.0, 0.5, 1.0, 1.5, 2.0),
}
_DELTA = 1e-3
#: of the starts, so many of the best are followed to the end, in at most so many steps
_FOLLOWED, _ROUNDS = 24, 400
#: with fewer model sizes the exponent of the parameters is told by too little
FEWEST_SIZES = 5
#: beyond so many times the largest compute of the points a prediction is called an extrapolation
FARTHEST = 8.0


@dataclasses.dataclass(frozen=True)
class ScalingLaw:
    """
    `L(N, D) = E + A / N^alpha + B / D^beta`.

    Args:
        E, A, B, alpha, beta (`float`): Its constants.
        points (`tuple`): `(N, D, L)` that it was fitted to.
        samples (`tuple`): Constants of the fits to resampled points, for intervals.
        notes (`tuple[str, ...]`): What makes the fit doubtful.
    """

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    points: tuple[Point, ...] = ()
    samples: tuple[tuple[float, float, float, float, float], ...] = ()
    notes: tuple[str, ...] = ()

    def predict(self, parameters: float, tokens: float) -> float:
        """Return the loss of a model of `parameters` weights after `tokens` tokens."""
        return _loss((self.E, self.A, self.B, self.alpha, self.beta), parameters, tokens)

    def interval(self, parameters: float, tokens: float, level: float = 0.8) -> tuple[float, float]:
        """
        Return the central interval of the predictions of the resampled fits.

        Raises:
            ValueError: the law was fitted without resampling, or a level outside of (0, 1).
        """
        if not self.samples:
            raise ValueError("This law was fitted without resampling. Fit with bootstrap=200 for an interval.")
        if not 0 < level < 1:
            raise ValueError(f"level={level!r} must lie between 0 and 1.")
        values = sorted(_loss(sample, parameters, tokens) for sample in self.samples)
        return _quantile(values, (1 - level) / 2), _quantile(values, (1 + level) / 2)

    def optimal(self, compute: float) -> tuple[float, float, float]:
        """
        Return parameters, tokens and loss of the best model for `compute` FLOPs, `C = 6 N D`.

        Formula: `N = G (C / 6)^(beta / (alpha + beta))`, `G = (alpha A / beta B)^(1 / (alpha + beta))`, `D = C / 6N`.

        Raises:
            ValueError: a law with an exponent of 0, which has no optimum, or a compute that is not above 0.
        """
        if not compute > 0:
            raise ValueError(f"compute={compute!r} must be above 0 FLOPs.")
        if min(self.alpha, self.beta, self.A, self.B) <= 0:
            raise ValueError("A law without a term of parameters or of tokens has no best size. Fit more points.")
        total = self.alpha + self.beta
        growth = (self.alpha * self.A / (self.beta * self.B)) ** (1 / total)
        parameters = growth * (compute / 6) ** (self.beta / total)
        tokens = compute / (6 * parameters)
        return parameters, tokens, self.predict(parameters, tokens)

    def is_far(self, parameters: float, tokens: float) -> bool:
        """Return whether a model lies beyond [`FARTHEST`] times the largest compute of the points."""
        return bool(self.points) and parameters * tokens > FARTHEST * max(n * d for n, d, _ in self.points)


def _loss(constants: Sequence[float], parameters: float, tokens: float) -> float:
    e, a, b, alpha, beta = constants
    return e + a / parameters**alpha + b / tokens**beta


def _quantile(values: Sequence[float], share: float) -> float:
    place = share * (len(values) - 1)
    low = math.floor(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (place - low) * (values[high] - values[low])


def fit_scaling_law(points: Sequence[Point], bootstrap: int = 0, seed: int = 0) -> ScalingLaw:
    """
    Fit `L(N, D) = E + A / N^alpha + B / D^beta` to finished runs.

    The residual is `log L_hat - log L`; the sum of its Huber losses (delta 1e-3) is minimised from the best of a
    grid of starts, over the logarithms of E, A and B. Paper: Hoffmann et al., Training Compute-Optimal Large
    Language Models (2203.15556), method 3.

    Args:
        points (`Sequence[tuple[float, float, float]]`): Parameters (say whether embeddings count, and keep to it),
            tokens and loss of runs that were decayed to their end; at least 6.
        bootstrap (`int`, *optional*, defaults to 0): Fits to points that are drawn again, for
            [`ScalingLaw.interval`].
        seed (`int`, *optional*, defaults to 0): Of those draws.

    Raises:
        ValueError: fewer points than 6, a value that is not a number above 0, one model size or one number of tokens
            only.

    Example:
    ```python
    >>> law = ScalingLaw(1.69, 406.4, 410.7, 0.34, 0.28)
    >>> [float(f"{value:.5g}") for value in law.optimal(1e21)]
    [1824200000.0, 91363000000.0, 2.3289]
    ```
    """
    if isinstance(bootstrap, bool) or not isinstance(bootstrap, int) or bootstrap < 0:
        raise ValueError(f"bootstrap={bootstrap!r} must be a whole number of at least 0, e.g. 200.")
    kept = tuple((float(n), float(d), float(loss)) for n, d, loss in points)
    _check(kept)
    best = _fit(kept)
    samples = _resampled(kept, best, bootstrap, seed)
    constants = _plain(best)
    return ScalingLaw(*constants, points=kept, samples=samples, notes=tuple(_notes(kept, constants)))


def _resampled(points: Sequence[Point], best: Tensor, count: int, seed: int) -> tuple:
    if not count:
        return ()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, len(points), (count, len(points)), generator=generator)
    logs = torch.tensor(points, dtype=torch.float64).log()[drawn].mT
    varied = torch.tensor([len(set(row.tolist())) > 1 for row in (*logs[:, 0], *logs[:, 1])]).view(2, count).all(0)
    found = _descend(best.expand(count, 5).clone(), logs)
    return tuple(_plain(constants) for constants, told in zip(found, varied.tolist(), strict=True) if told)


def _plain(constants: Tensor) -> tuple[float, float, float, float, float]:
    e, a, b, alpha, beta = constants.tolist()
    return math.exp(e), math.exp(a), math.exp(b), alpha, beta


def _check(points: Sequence[Point]) -> None:
    if len(points) < 6:
        raise ValueError(f"{len(points)} points are fewer than the 6 that five constants need. Add runs.")
    if any(not math.isfinite(value) or value <= 0 for point in points for value in point):
        raise ValueError("Parameters, tokens and losses must be finite and above 0.")
    for name, values in (("model size", {n for n, _, _ in points}), ("number of tokens", {d for _, d, _ in points})):
        if len(values) < 2:
            raise ValueError(f"All points have one {name}, so that its exponent is not told. Add runs with another.")


def _notes(points: Sequence[Point], constants: Sequence[float]) -> list[str]:
    notes = []
    sizes = len({n for n, _, _ in points})
    if sizes < FEWEST_SIZES:
        notes.append(
            f"{sizes} model sizes are fewer than {FEWEST_SIZES}: the exponent of the parameters is uncertain."
        )
    if constants[0] < 0.05 * min(loss for _, _, loss in points):
        notes.append("E is near 0: the points do not tell the loss that no size and no data remove.")
    return notes


def _terms(constants: Tensor, logs: Tensor) -> tuple[Tensor, Tensor]:
    """
    Return `log L_hat` of shape `(fits, points)` and the shares of its three terms in `L_hat`, `(fits, points, 3)`.

    Args:
        constants (`Tensor`): log E, log A, log B, alpha, beta; `(fits, 5)`.
        logs (`Tensor`): log N, log D, log L; `(fits or 1, 3, points)`.
    """
    e, a, b, alpha, beta = (constants[:, i, None] for i in range(5))
    terms = torch.stack(torch.broadcast_tensors(e, a - alpha * logs[:, 0], b - beta * logs[:, 1]), dim=-1)
    whole = torch.logsumexp(terms, dim=-1)
    return whole, torch.exp(terms - whole[..., None])


def _objective(constants: Tensor, logs: Tensor) -> Tensor:
    gap = (_terms(constants, logs)[0] - logs[:, 2]).abs()
    return torch.where(gap <= _DELTA, 0.5 * gap**2, _DELTA * (gap - 0.5 * _DELTA)).sum(-1)


def _fit(points: Sequence[Point]) -> Tensor:
    """Return the constants of the best fit, from the best starts of the grid; `(5,)`."""
    logs = torch.tensor(points, dtype=torch.float64).log().T[None]
    grid = torch.tensor(list(itertools.product(*_GRID.values())), dtype=torch.float64)
    starts = grid[_objective(grid, logs).argsort()[:_FOLLOWED]]
    found = _descend(starts, logs)
    return found[_objective(found, logs).argmin()]


def _descend(constants: Tensor, logs: Tensor) -> Tensor:
    """
    Follow several fits at once to the end, by Levenberg and Marquardt's steps with Huber's weights.

    With five constants and an analytic Jacobian this takes some hundred small solutions, where L-BFGS needs thousands
    of passes along the valley of these laws.
    """
    value = _objective(constants, logs)
    damping = torch.full((len(constants),), 1e-2, dtype=torch.float64)
    eye = torch.eye(5, dtype=torch.float64)
    for _ in range(_ROUNDS):
        whole, shares = _terms(constants, logs)
        gap = whole - logs[:, 2]
        weight = torch.where(gap.abs() <= _DELTA, torch.ones_like(gap), _DELTA / gap.abs().clamp_min(1e-300))
        of_sizes, of_tokens = -logs[:, 0] * shares[..., 1], -logs[:, 1] * shares[..., 2]
        jacobian = torch.cat([shares, of_sizes[..., None], of_tokens[..., None]], dim=-1)
        normal = jacobian.mT @ (weight[..., None] * jacobian)
        slope = (jacobian.mT @ (weight * gap)[..., None]).squeeze(-1)
        scale = torch.diagonal(normal, dim1=-2, dim2=-1).clamp_min(1e-12)
        step = torch.linalg.solve(normal + damping[:, None, None] * scale[:, None] * eye, slope)
        tried = constants - step
        reached = _objective(tried, logs)
        better = reached < value
        constants = torch.where(better[:, None], tried, constants)
        still = better & (value - reached > 1e-15 * value)
        value = torch.where(better, reached, value)
        damping = torch.where(better, damping / 3, damping * 4).clamp(1e-15, 1e15)
        if not still.any() and bool((damping > 1e8).all()):
            break
    return constants


def held_out_error(points: Sequence[Point]) -> dict[str, Any]:
    """
    Fit to all but the points of the largest compute and return how far the law is from them.

    Args:
        points (`Sequence[tuple]`): As in [`fit_scaling_law`].

    Returns:
        `dict`: `point`, `predicted`, `relative_error` (`|predicted - loss| / loss`), and `leave_one_out`: the relative
        error of each model size when its points are left out, where enough others are there.

    Raises:
        ValueError: as in [`fit_scaling_law`], for the points that are left.
    """
    last = max(points, key=lambda point: point[0] * point[1])
    law = fit_scaling_law([point for point in points if point is not last])
    errors = {}
    for size in sorted({n for n, _, _ in points}):
        rest = [point for point in points if point[0] != size]
        try:
            other = fit_scaling_law(rest)
        except ValueError:
            continue  # too few are left to fit: no error can be told for this size
        own = [point for point in points if point[0] == size]
        errors[size] = max(abs(other.predict(n, d) - loss) / loss for n, d, loss in own)
    predicted = law.predict(last[0], last[1])
    return {
        "point": last,
        "predicted": predicted,
        "relative_error": abs(predicted - last[2]) / last[2],
        "leave_one_out": errors,
    }
