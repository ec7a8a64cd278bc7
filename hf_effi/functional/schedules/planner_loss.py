"""Predict the loss curve of a schedule that was never run, from one or two curves that were."""

from __future__ import annotations

import itertools
import json
import math
import random
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...errors import BrokenFileError
from ..probes import stored_plan, without_probes
from ._checks import check_steps
from .base import Schedule


@dataclass(frozen=True)
class LossCurve:
    """
    Losses at some updates of a run, with the LR of every update.

    Args:
        etas (`tuple[float, ...]`): Absolute LRs of updates 1..T.
        steps (`tuple[int, ...]`): Updates after which the loss was measured, in 1..T.
        losses (`tuple[float, ...]`): Losses; NaNs are dropped when fitting.
    """

    etas: tuple[float, ...]
    steps: tuple[int, ...]
    losses: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.steps) != len(self.losses):
            raise ValueError(f"{len(self.steps)} steps but {len(self.losses)} losses. Pass one loss for each step.")
        for step in self.steps:
            check_steps("steps", step, 1)
            if step > len(self.etas):
                raise ValueError(f"A loss at step {step} lies outside the {len(self.etas)} learning rates.")


def curve_from_trainer_state(path: str | Path, metric: str | None = None) -> LossCurve:
    """
    Read a loss curve from a `trainer_state.json`.

    Args:
        path (`str`): The file, or the checkpoint folder that holds it.
        metric (`str`, *optional*): `"eval_loss"` or `"loss"`; `None` takes `eval_loss` where there are at least 4.

    Raises:
        ValueError: fewer than four losses, or no learning rate.
        BrokenFileError: a loss is no number.
    """
    path = Path(path)
    state = json.loads((path / "trainer_state.json" if path.is_dir() else path).read_text())
    probes = stored_plan(state.get("stateful_callbacks") or {})
    # Updates of training count on; what was only tried has no part in the curve.
    history = [{**row, "step": probes.trained(row["step"])} for row in without_probes(state["log_history"])]
    if metric is None:
        metric = "eval_loss" if sum("eval_loss" in row for row in history) >= 4 else "loss"
    points = {row["step"]: row[metric] for row in history if metric in row and row["step"] > 0}
    for step, value in points.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise BrokenFileError(f"{path} is damaged: its {metric} at step {step} is {repr(value)[:60]}, no number.")
    if len(points) < 4:
        raise ValueError(f"{path} has {len(points)} values of {metric}; at least 4 are needed. Log more often.")
    total = max(points)
    stored = state.get("stateful_callbacks", {}).get("hf_effi.lr_schedule")
    logged = {row["step"]: row["learning_rate"] for row in history if "learning_rate" in row}
    etas = None
    if stored:
        schedule, lr = Schedule.from_spec(stored["current"]), stored.get("base_lrs", [stored["learning_rate"]])[0]
        etas = tuple(lr * schedule(t) for t in range(total))
        if "base_lrs" in stored and not _agree(etas, logged):
            etas = None  # the run was resumed with another schedule or LR on its way
    etas = _interpolate(logged, total) if etas is None else etas
    return LossCurve(etas, tuple(sorted(points)), tuple(float(points[s]) for s in sorted(points)))


def _agree(etas: Sequence[float], logged: dict[int, float]) -> bool:
    return all(math.isclose(etas[step - 1], lr, rel_tol=1e-6) for step, lr in logged.items() if 0 < step <= len(etas))


def _interpolate(known: dict[int, float], total: int) -> tuple[float, ...]:
    if not known:
        raise ValueError("The log has no learning_rate. Set logging_steps, or use LRScheduleCallback.")
    steps, etas = sorted(known), []
    for t in range(1, total + 1):
        after = bisect_left(steps, t)  # the first logged step at or behind t
        right = steps[min(after, len(steps) - 1)]
        left = right if right == t else steps[max(after - 1, 0)]
        share = (t - left) / (right - left) if right > left else 0.0
        etas.append(known[left] + (known[right] - known[left]) * share)
    return tuple(etas)


def annealing_areas(
    etas: Sequence[float], memory: float = 0.999, eta_0: float | None = None
) -> tuple[list[float], list[float]]:
    """
    Forward area S1 and annealing area S2 after each update.

    Formula: `S1(s) = sum eta_i`; `m_i = memory m_{i-1} + (eta_{i-1} - eta_i)`, `S2(s) = sum m_i`. The ramp up to the
    first maximum does not count as negative annealing.
    Paper: Tissue et al., Scaling Law with Learning Rate Annealing (2408.11029).

    Example:
    ```python
    >>> forward, annealing = annealing_areas([1, 1, 1, 0.5, 0], memory=0.9, eta_0=1)
    >>> forward, [round(area, 6) for area in annealing]
    ([1.0, 2.0, 3.0, 3.5, 3.5], [0.0, 0.0, 0.0, 0.5, 1.45])
    ```
    """
    peak = max(range(len(etas)), key=lambda i: etas[i]) if eta_0 is None else 0
    forward, annealing = [], []
    s1 = s2 = momentum = 0.0
    before = etas[0] if eta_0 is None else eta_0
    for i, eta in enumerate(etas):
        s1 += eta
        momentum = memory * momentum + (0.0 if i <= peak and eta_0 is None else before - eta)
        s2 += momentum
        before = eta
        forward.append(s1)
        annealing.append(s2)
    return forward, annealing


def _nonnegative_fit(gram: list[list[float]], xty: list[float]) -> list[float]:
    """Least squares with coefficients >= 0 by trying every active set: exact for the three columns used here."""
    best, best_value = [0.0] * len(xty), 0.0
    for size in range(1, len(xty) + 1):
        for active in itertools.combinations(range(len(xty)), size):
            a = torch.tensor([[gram[i][j] for j in active] for i in active], dtype=torch.float64)
            b = torch.tensor([xty[i] for i in active], dtype=torch.float64)
            solution = torch.linalg.lstsq(a, b[:, None]).solution[:, 0].tolist()
            if min(solution) < 0 or not all(map(math.isfinite, solution)):
                continue
            # Value of the quadratic, up to the constant y'y.
            value = -sum(s * xty[i] for s, i in zip(solution, active, strict=True))
            if value < best_value:
                best_value = value
                best = [0.0] * len(xty)
                for s, i in zip(solution, active, strict=True):
                    best[i] = s
    return best


@dataclass(frozen=True)
class Prediction:
    """Predicted losses at some steps, with the interval that the bootstrap gives."""

    steps: tuple[int, ...]
    losses: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True)
class AnnealingLaw:
    """
    A fitted law `L(s) = floor + scale S1(s)^-power - gain S2(s)`; `samples` are bootstrap refits.

    Fit it with [`fit_annealing_law`].
    """

    floor: float
    scale: float
    gain: float
    power: float
    memory: float
    residual: float
    samples: tuple[tuple[float, float, float, float], ...] = ()

    def losses(self, etas: Sequence[float], steps: Sequence[int]) -> list[float]:
        """Return the predicted losses after `steps` updates."""
        s1, s2 = annealing_areas(etas, self.memory)
        return [self.floor + self.scale * s1[s - 1] ** -self.power - self.gain * s2[s - 1] for s in steps]

    def predict(self, etas: Sequence[float], steps: Sequence[int] | None = None, level: float = 0.9) -> Prediction:
        """
        Predict a schedule, with an interval from the bootstrap refits.

        Args:
            etas (`Sequence[float]`): Absolute LRs of every update, `[peak * m for m in schedule.trace()]`.
            steps (`Sequence[int]`, *optional*): Where; 50 points of the run if `None`, from its 20th part on.
            level (`float`, *optional*, defaults to 0.9): Coverage of the interval.
        """
        total = len(etas)
        steps = steps or sorted({max(1, round(total * i / 50)) for i in range(3, 51)})
        s1, s2 = annealing_areas(etas, self.memory)
        columns: list[list[float]] = []
        for floor, scale, gain, power in self.samples:
            columns.append([floor + scale * s1[s - 1] ** -power - gain * s2[s - 1] for s in steps])
        centre = self.losses(etas, steps)
        if not columns:
            return Prediction(tuple(steps), tuple(centre), tuple(centre), tuple(centre))
        low, high = [], []
        for i in range(len(steps)):
            values = sorted(column[i] for column in columns)
            cut = int((1 - level) / 2 * len(values))
            low.append(min(values[cut], centre[i]) - self.residual)
            high.append(max(values[len(values) - 1 - cut], centre[i]) + self.residual)
        return Prediction(tuple(steps), tuple(centre), tuple(low), tuple(high))


def _usable(curve: LossCurve, skip: int) -> list[tuple[int, float]]:
    return [(s, y) for s, y in zip(curve.steps, curve.losses, strict=True) if s > skip and math.isfinite(y)]


def fit_annealing_law(
    curves: Sequence[LossCurve],
    memories: Sequence[float] | None = None,
    skip_fraction: float = 0.05,
    bootstrap: int = 40,
    seed: int = 0,
) -> AnnealingLaw:
    """
    Fit the annealing law to one or more loss curves.

    For each exponent and memory the law is linear in its other three parameters, which are found exactly under the
    constraint that none is negative; exponent and memory are searched.

    Args:
        curves (`Sequence[LossCurve]`): At least one whose LR falls: on a constant LR the gain cannot be told.
        memories (`Sequence[float]`, *optional*): Values tried; 1 - {1, 2, 5, 10, 20, 50, 100}/T and 0.999 if `None`.
        skip_fraction (`float`, *optional*, defaults to 0.05): Part of each run that is left out at its start, on top
            of the warm-up.
        bootstrap (`int`, *optional*, defaults to 40): Refits with resampled residuals, for the uncertainty.
        seed (`int`, *optional*, defaults to 0): Seed of the resampling.

    Raises:
        ValueError: fewer than five usable losses, or no curve with a falling LR.

    Example:
    ```python
    >>> from hf_effi.functional.schedules import cosine
    >>> etas = [1e-3 * m for m in cosine(400).trace()]
    >>> truth = AnnealingLaw(2.0, 0.3, 40.0, 0.5, 0.99, 0.0)
    >>> steps = range(40, 401, 10)
    >>> curve = LossCurve(tuple(etas), tuple(steps), tuple(truth.losses(etas, steps)))
    >>> law = fit_annealing_law([curve], memories=(0.99,), bootstrap=0)
    >>> round(law.floor, 2), round(law.power, 2)
    (2.0, 0.5)
    ```
    """
    points: list[tuple[int, int, float]] = []
    for i, curve in enumerate(curves):
        peak = max(range(len(curve.etas)), key=lambda j: curve.etas[j])
        rising = peak if curve.etas[peak] > curve.etas[0] else 0
        points += [(i, s, y) for s, y in _usable(curve, max(rising, int(skip_fraction * len(curve.etas))))]
    if len(points) < 5:
        raise ValueError(f"{len(points)} usable losses are too few to fit. Log or evaluate more often.")
    if all(min(c.etas[max(range(len(c.etas)), key=lambda j: c.etas[j]) :]) == max(c.etas) for c in curves):
        raise ValueError("No curve has a falling LR, so the gain of annealing cannot be told. Add a decayed run.")
    longest = max(len(curve.etas) for curve in curves)
    if memories is None:
        memories = sorted({max(0.0, 1 - m / longest) for m in (1, 2, 5, 10, 20, 50, 100)} | {0.999})
    y = torch.tensor([p[2] for p in points], dtype=torch.float64)
    designs = {}
    for memory in memories:
        areas = [annealing_areas(curve.etas, memory) for curve in curves]
        designs[memory] = [(areas[i][0][s - 1], areas[i][1][s - 1]) for i, s, _ in points]

    def solve(target: torch.Tensor, memory: float, power: float) -> tuple[float, list[float]]:
        s1 = torch.tensor([row[0] for row in designs[memory]], dtype=torch.float64)
        s2 = torch.tensor([row[1] for row in designs[memory]], dtype=torch.float64)
        x = torch.stack([torch.ones_like(s1), s1**-power, -s2], dim=1)
        # Columns of unit length keep the normal equations well conditioned.
        size = x.norm(dim=0).clamp_min(1e-300)
        scaled = x / size
        fit = _nonnegative_fit((scaled.T @ scaled).tolist(), (scaled.T @ target).tolist())
        error = float((scaled @ torch.tensor(fit, dtype=torch.float64) - target).square().mean())
        return error, [f / float(z) for f, z in zip(fit, size, strict=True)]

    def search(target: torch.Tensor, choices: Sequence[float], powers: Sequence[float]) -> tuple:
        return min(((*solve(target, m, a), a, m) for m in choices for a in powers), key=lambda candidate: candidate[0])

    coarse = [0.05 * i for i in range(1, 31)]
    _, _, power, memory = search(y, memories, coarse)
    error, (floor, scale, gain), power, memory = search(y, (memory,), [power + 0.005 * i for i in range(-9, 10)])
    law = AnnealingLaw(floor, scale, gain, power, memory, math.sqrt(error))
    if not bootstrap:
        return law
    fitted = torch.tensor([law.losses(curves[i].etas, [s])[0] for i, s, _ in points], dtype=torch.float64)
    residuals, rng, samples = (y - fitted).tolist(), random.Random(seed), []
    near = [max(0.01, power + 0.05 * i) for i in range(-3, 4)]
    for _ in range(bootstrap):
        noise = torch.tensor([rng.choice(residuals) for _ in points], dtype=torch.float64)
        _, (f, s, g), a, _ = search(fitted + noise, (memory,), near)
        samples.append((f, s, g, a))
    return AnnealingLaw(floor, scale, gain, power, memory, law.residual, tuple(samples))


@dataclass(frozen=True)
class MultiPowerLaw:
    """
    `L = floor + scale (S1 + warmup_area)^-power - B sum_k d_k (1 - (C eta_k^-gamma S_k + 1)^-beta)`, `d_k` the fall of
    the LR at update k and `S_k` the area since. Fit it with [`fit_multi_power_law`].

    Paper: Luo et al., A Multi-Power Law for Loss Curve Prediction (2503.12811).
    """

    floor: float
    scale: float
    power: float
    gain: float
    rate: float
    beta: float
    gamma: float

    def losses(self, etas: Sequence[float], steps: Sequence[int]) -> list[float]:
        """Return the predicted losses after `steps` updates."""
        values = (self.floor, self.scale, self.power, self.gain, self.rate, self.beta, self.gamma)
        logs = torch.tensor([math.log(max(v, 1e-30)) for v in values], dtype=torch.float64)
        return _multi_power(logs, [_multi_power_inputs(etas, steps)])[0].tolist()


def _multi_power_inputs(etas: Sequence[float], steps: Sequence[int]) -> tuple[torch.Tensor, ...]:
    eta = torch.tensor(list(etas), dtype=torch.float64)
    peak = int(eta.argmax())
    area = eta.cumsum(0)
    fall = torch.zeros_like(eta)
    fall[peak + 1 :] = eta[peak:-1] - eta[peak + 1 :]
    index = torch.tensor([s - 1 for s in steps])
    moved = (fall != 0).nonzero().flatten()
    # Only updates that changed the LR count; S_k(t) is the area from update k on, 0 before it.
    since = (area[index][:, None] - (area - eta)[moved][None, :]).clamp_min(0)
    return area[index], fall[moved], eta[moved].clamp_min(1e-12), since


def _multi_power(logs: torch.Tensor, inputs: Sequence[tuple[torch.Tensor, ...]]) -> list[torch.Tensor]:
    floor, scale, power, gain, rate, beta, gamma = logs.exp()
    out = []
    for area, fall, eta, since in inputs:
        inner = rate * eta**-gamma * since + 1
        out.append(floor + scale * area**-power - gain * (fall * (1 - inner**-beta)).sum(dim=1))
    return out


def fit_multi_power_law(curves: Sequence[LossCurve], skip_fraction: float = 0.05, steps: int = 200) -> MultiPowerLaw:
    """
    Fit the multi-power law by L-BFGS on the Huber loss (delta 1e-3) of the log residual.

    Args:
        curves (`Sequence[LossCurve]`): As for [`fit_annealing_law`], whose result is the starting point.
        skip_fraction (`float`, *optional*, defaults to 0.05): Start of each run that is left out.
        steps (`int`, *optional*, defaults to 200): Iterations of L-BFGS from each of three starts.
    """
    start = fit_annealing_law(curves, skip_fraction=skip_fraction, bootstrap=0)
    data, targets = [], []
    for curve in curves:
        rising = int(torch.tensor(curve.etas).argmax())
        points = _usable(curve, max(rising, int(skip_fraction * len(curve.etas))))
        data.append(_multi_power_inputs(curve.etas, [s for s, _ in points]))
        targets.append(torch.tensor([y for _, y in points], dtype=torch.float64).log())
    target = torch.cat(targets)
    best: tuple[float, torch.Tensor] | None = None
    peak = max(max(curve.etas) for curve in curves)
    # Published fits have beta and gamma near 0.6 and C near 2, at LRs of 3e-4; B is scaled to the LR of this run.
    for gain in (0.05, 0.3, 1.0):
        values = (start.floor or 0.1, start.scale or 0.1, start.power, gain / peak, 2.0, 0.58, 0.64)
        logs = torch.tensor([math.log(v) for v in values], dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([logs], max_iter=steps, line_search_fn="strong_wolfe")

        def closure(optimizer: Any = optimizer, logs: torch.Tensor = logs) -> torch.Tensor:
            optimizer.zero_grad()
            predicted = torch.cat(_multi_power(logs, data)).clamp_min(1e-6).log()
            loss = torch.nn.functional.huber_loss(predicted, target, delta=1e-3, reduction="sum") * 1e3
            loss.backward()
            return loss

        optimizer.step(closure)
        value = closure().item()
        if math.isfinite(value) and (best is None or value < best[0]):
            best = (value, logs.detach().clone())
    if best is None:
        raise ValueError("The multi-power law could not be fitted. Use fit_annealing_law.")
    return MultiPowerLaw(*best[1].exp().tolist())
