"""Cores of the adaptive schedules: what multiplier a run earns from its own updates, accuracies and gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ...errors import RefusedError
from ._checks import check_number, check_steps
from .range_curve import smooth_losses


class Hypergradient:
    """
    LR multiplier that grows while consecutive updates agree and falls while they oppose each other.

    Formula: `m <- clip(m min(step_limit, 1 + kappa c), 1/limit, limit)`, `c` the cosine (or the raw inner product) of
    the last two parameter updates.
    Paper: Wang et al., FedHyper (2310.03156), its client-side rule mapped to one process; the limits are ours.

    Args:
        kappa (`float`, *optional*, defaults to 0.1): Gain, above 0 (the paper's raw form: 1).
        limit (`float`, *optional*, defaults to 10.0): Bound on the multiplier and its inverse, above 1.
        step_limit (`float`, *optional*, defaults to 1.1): Largest growth in one update, above 1.

    Example:
    ```python
    >>> rule = Hypergradient(kappa=0.5)
    >>> [round(rule.push(c), 3) for c in (1.0, 1.0, -1.0, float("nan"))]
    [1.1, 1.21, 0.605, 1.0]
    ```
    """

    def __init__(self, kappa: float = 0.1, limit: float = 10.0, step_limit: float = 1.1) -> None:
        check_number("kappa", kappa, 0.0, math.inf, low_open=True)
        check_number("limit", limit, 1.0, math.inf, low_open=True)
        check_number("step_limit", step_limit, 1.0, math.inf, low_open=True)
        self.kappa, self.limit, self.step_limit = kappa, limit, step_limit
        self.multiplier = 1.0

    def push(self, agreement: float) -> float:
        """Take one agreement of two updates; return the new multiplier. NaN resets it to 1."""
        if not math.isfinite(agreement):
            self.multiplier = 1.0
        else:
            grown = self.multiplier * max(0.0, min(self.step_limit, 1 + self.kappa * agreement))
            self.multiplier = min(self.limit, max(1 / self.limit, grown))
        return self.multiplier

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON."""
        return {"multiplier": self.multiplier}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state."""
        self.multiplier = state["multiplier"]


class AccuracyGradient:
    """
    LR multiplier that is cut when a metric has stopped rising.

    Formula: at each evaluation `mu` = mean of the last `window` values; when more than `window` means are known, more
    than `quiet` evaluations have passed since the last cut, and `mu - last mean < threshold`, `m <- m factor`.
    Paper: AccelAT (2210.06888); window, quiet, threshold and factor as in its code.

    Args:
        factor (`float`, *optional*, defaults to 0.8): In (0, 1).
        window, quiet (`int`, *optional*, default to 5): Evaluations.
        threshold (`float`, *optional*, defaults to 0.005): Rise of the mean that counts as progress.
        greater_is_better (`bool`, *optional*, defaults to `True`): `False` for a loss.

    Example:
    ```python
    >>> rule = AccuracyGradient()
    >>> values = [rule.push(0.5) for _ in range(17)]
    >>> [i for i in range(1, 17) if values[i] < values[i - 1]]
    [6, 11, 16]
    ```
    """

    def __init__(
        self,
        factor: float = 0.8,
        window: int = 5,
        quiet: int = 5,
        threshold: float = 0.005,
        greater_is_better: bool = True,
    ) -> None:
        check_number("factor", factor, 0.0, 1.0, low_open=True, high_open=True)
        check_steps("window", window, 1)
        check_steps("quiet", quiet, 0)
        check_number("threshold", threshold, -math.inf, math.inf)
        self.factor, self.window, self.quiet, self.threshold = factor, window, quiet, threshold
        self.sign = 1.0 if greater_is_better else -1.0
        self.multiplier = 1.0
        self.values: list[float] = []
        self.means = 0
        self.last_mean: float | None = None
        self.since = quiet

    def push(self, value: float) -> float:
        """Take one metric; return the new multiplier. A NaN is skipped."""
        if not math.isfinite(value):
            return self.multiplier
        self.values = [*self.values, self.sign * value][-self.window :]
        mean = sum(self.values) / len(self.values)
        self.since += 1
        stalled = self.last_mean is not None and mean - self.last_mean < self.threshold
        if self.means > self.window and self.since > self.quiet and stalled:
            self.multiplier *= self.factor
            self.since = 1
        self.means += 1
        self.last_mean = mean
        return self.multiplier

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON."""
        names = ("multiplier", "values", "means", "last_mean", "since")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state."""
        for name, value in state.items():
            setattr(self, name, value)


class GradientSNR:
    """
    LR multiplier from the signal-to-noise ratio of the gradient.

    Formula: `m = a/(a+v)`, a and v the running means of `<g1, g2>` (signal, unbiased from two halves of a batch) and
    of the variance of the mean gradient; clipped to [`lowest`, 1].
    Paper: OBLR-PO (2511.23310) states an SNR-governed LR; this estimator is derived here for an L-smooth objective,
    where the best LR is `SNR/(1+SNR)/L`.

    Args:
        memory (`float`, *optional*, defaults to 0.95): Decay of both running means, in [0, 1).
        lowest (`float`, *optional*, defaults to 0.1): In [0, 1].

    Example:
    ```python
    >>> rule = GradientSNR()
    >>> rule.push(signal=3.0, noise=1.0), rule.push(signal=-1.0, noise=1.0) < 0.75
    (0.75, True)
    ```
    """

    def __init__(self, memory: float = 0.95, lowest: float = 0.1) -> None:
        check_number("memory", memory, 0.0, 1.0, high_open=True)
        check_number("lowest", lowest, 0.0, 1.0)
        self.memory, self.lowest = memory, lowest
        self.signal = self.noise = 0.0
        self.count = 0

    def push(self, signal: float, noise: float) -> float:
        """Take one measurement; return the new multiplier. A NaN is skipped."""
        if math.isfinite(signal) and math.isfinite(noise):
            self.signal = self.memory * self.signal + (1 - self.memory) * signal
            self.noise = self.memory * self.noise + (1 - self.memory) * noise
            self.count += 1
        return self.multiplier

    @property
    def multiplier(self) -> float:
        """Current multiplier; 1 before the first measurement. The bias of the two means cancels in the ratio."""
        a, v = max(0.0, self.signal), max(0.0, self.noise)
        return 1.0 if self.count == 0 or a + v == 0 else max(self.lowest, a / (a + v))

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON."""
        return {"signal": self.signal, "noise": self.noise, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state."""
        self.signal, self.noise, self.count = state["signal"], state["noise"], state["count"]


def fit_exponential(losses: Sequence[float], steps: Sequence[float] | None = None) -> tuple[float, float, float]:
    """
    Fit `a exp(b t) + c`, `b < 0`, to a series of losses: b is searched, a and c follow by least squares.

    Paper: Jin et al., AutoLRS (2105.10762).

    Args:
        losses (`Sequence[float]`): At least two finite losses.
        steps (`Sequence[float]`, *optional*): When each was measured, rising; `0, 1, 2, ...` if `None`.

    Returns:
        `tuple[float, float, float]`: (a, b, c).

    Raises:
        ValueError: fewer than two losses, one that is not finite, or another number of steps.

    Example:
    ```python
    >>> a, b, c = fit_exponential([2 * math.exp(-0.05 * t) + 1 for t in range(100)])
    >>> round(a, 3), round(b, 4), round(c, 3)
    (2.0, -0.05, 1.0)
    ```
    """
    times: list[float] = list(range(len(losses))) if steps is None else list(steps)
    if len(losses) < 2 or len(times) != len(losses) or not all(math.isfinite(loss) for loss in losses):
        raise ValueError(
            f"{len(losses)} losses at {len(times)} steps cannot be fitted. Pass at least two finite losses and one "
            "step for each."
        )
    # Steps that start at 0 keep the search of the rate in range; a is carried back to t = 0 afterwards.
    rate, a, c = _fit_rate([(t - times[0], y) for t, y in zip(times, losses, strict=True)])
    return a * math.exp(rate * times[0]), -rate, c


def extrapolate_exponential(losses: Sequence[float], horizon: int, steps: Sequence[float] | None = None) -> float:
    """
    Predict the loss after `horizon` updates from the losses of the first few: [`fit_exponential`] at t = horizon.

    Fewer than four losses are not fitted: their mean is returned.
    Paper: Jin et al., AutoLRS (2105.10762). Its denoising by splines needs scipy and is part of `AutoLRSCallback`.

    Args:
        losses (`Sequence[float]`): Losses in the order of updates.
        horizon (`int`): Update to predict, at least 1.
        steps (`Sequence[float]`, *optional*): Update of each loss; `0, 1, 2, ...` if `None`.

    Returns:
        `float`: The prediction; 1e6 when there is no loss or one is not finite.

    Example:
    ```python
    >>> losses = [2 * math.exp(-0.05 * t) + 1 for t in range(100)]
    >>> round(extrapolate_exponential(losses, 1000), 3)
    1.0
    ```
    """
    check_steps("horizon", horizon, 1)
    if not losses or not all(math.isfinite(loss) for loss in losses):
        return 1e6
    if len(losses) < 4:
        return sum(losses) / len(losses)
    a, b, c = fit_exponential(losses, steps)
    return a * math.exp(b * horizon) + c


def _fit_rate(points: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    n, span = len(points), max(1, points[-1][0])
    best = (math.inf, 1.0, 0.0, points[-1][1])

    def attempt(rate: float) -> tuple[float, float, float, float]:
        xs = [math.exp(-rate * t) for t, _ in points]
        mean_x, mean_y = sum(xs) / n, sum(y for _, y in points) / n
        sxx = sum((x - mean_x) ** 2 for x in xs)
        sxy = sum((x - mean_x) * (y - mean_y) for x, (_, y) in zip(xs, points, strict=True))
        a = sxy / sxx if sxx > 0 else 0.0
        c = mean_y - a * mean_x
        error = sum((a * x + c - y) ** 2 for x, (_, y) in zip(xs, points, strict=True))
        return error, rate, a, c

    logs = [math.log(0.3 / span) + i * (math.log(50.0) / 40) * 1.6 for i in range(41)]
    for log in logs:
        best = min(best, attempt(math.exp(log)))
    width = logs[1] - logs[0]
    for _ in range(20):
        width /= 1.5
        centre = math.log(best[1])
        best = min(best, attempt(math.exp(centre - width)), attempt(math.exp(centre + width)))
    return best[1], best[2], best[3]


def suggest_from_range_test(
    lrs: Sequence[float], losses: Sequence[float], smoothing: float = 0.9
) -> dict[str, float] | None:
    """
    Read a learning-rate range test: the LR of the steepest fall, the LR of the lowest loss over 10, and their range.

    Formula: losses are smoothed by a bias-corrected running mean; the steepest fall is per log LR.
    Paper: Smith (1506.01186); thresholds are common practice.

    Args:
        lrs, losses (`Sequence[float]`): One each for every update, learning rates rising.
        smoothing (`float`, *optional*, defaults to 0.9): Decay of the running mean, in `[0, 1)`.

    Returns:
        `dict` with `steepest`, `lowest_over_10`, `low` and `high`, or `None` where the loss never fell.

    Example:
    ```python
    >>> lrs = [10 ** (-5 + 0.05 * i) for i in range(100)]
    >>> losses = [3 - 2 / (1 + 1e-3 / lr) + max(0, lr - 0.1) * 50 for lr in lrs]
    >>> suggestion = suggest_from_range_test(lrs, losses)
    >>> 1e-4 < suggestion["low"] <= suggestion["high"] < 1e-1
    True
    ```
    """
    if len(lrs) != len(losses):
        raise ValueError(f"{len(lrs)} learning rates for {len(losses)} losses. Pass one loss for each.")
    smooth = smooth_losses(losses, smoothing)
    if len(smooth) < 3:
        return None
    lowest = min(range(len(smooth)), key=smooth.__getitem__)
    falls = [
        (smooth[i] - smooth[i - 1]) / (math.log(lrs[i]) - math.log(lrs[i - 1])) for i in range(1, max(lowest, 1) + 1)
    ]
    # A running mean of equal losses moves by its rounding.
    if lowest == 0 or smooth[0] - smooth[lowest] <= 1e-9 * abs(smooth[0]):
        return None
    steepest = lrs[1 + falls.index(min(falls))]
    safe = lrs[lowest] / 10
    return {"steepest": steepest, "lowest_over_10": safe, "low": min(steepest, safe), "high": max(steepest, safe)}


def check_schedule_free(
    optimizer_name: str, schedule_name: str | None, lr_scheduler_type: str, keeps_average: bool = False
) -> None:
    """
    Refuse what a schedule-free optimizer forbids: a schedule of any kind.

    Paper: Defazio et al., The Road Less Scheduled (2405.15682). Its average replaces the decay.

    Args:
        optimizer_name (`str`): Class or name in `optim=`.
        schedule_name (`str`, *optional*): Schedule of ours.
        lr_scheduler_type (`str`): The Trainer's.
        keeps_average (`bool`, *optional*, defaults to `False`): The optimizer was asked and keeps an average of its
            own; without it the name decides.

    Raises:
        RefusedError: a schedule-free optimizer together with a schedule.

    Example:
    ```python
    >>> check_schedule_free("adamw_torch", "wsd", "linear")
    >>> check_schedule_free("schedule_free_adamw", None, "constant")
    ```
    """
    if not keeps_average and "schedulefree" not in optimizer_name.lower().replace("_", ""):
        return
    if schedule_name not in (None, "constant"):
        raise RefusedError(
            f"{optimizer_name} averages its iterates instead of decaying the LR, and {schedule_name} would decay it "
            "as well. Use constant(), or another optimizer."
        )
    if lr_scheduler_type != "constant":
        raise RefusedError(
            f"{optimizer_name} needs lr_scheduler_type='constant', not {lr_scheduler_type!r}. Warm-up belongs to the "
            "optimizer (warmup_steps in optim_args)."
        )
