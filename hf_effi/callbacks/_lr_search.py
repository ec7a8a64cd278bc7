"""What `AutoLRSCallback` decides with: denoising, prediction of a probe's loss, the next LR, validation loss."""

from __future__ import annotations

import math
import random
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .._compat import require
from ..checkpoint.snapshot import restore_rng, take_rng
from ..errors import RefusedError
from ..functional.schedules.adaptive import extrapolate_exponential

#: what stands for the loss of a probe that broke
BROKEN = 1e6


def denoise(
    losses: Sequence[float], steps: Sequence[float], validation: bool = False
) -> tuple[list[float], list[float]]:
    """
    Smooth a series of losses by quadratic splines: outliers are left out, then the spline replaces the other values.

    Training losses: ten rounds, each leaving out the 3 % with the largest residuals among the first half of the
    series. Validation losses: one round that leaves out the worst one. Residuals are measured in units of the noise
    that neighbouring losses show, so that the scale of the loss does not matter; those below 3 are no outliers and
    stay. Fewer than 8 losses are returned as they are.
    Paper: Jin et al., AutoLRS (2105.10762).

    Args:
        losses (`Sequence[float]`): Finite losses.
        steps (`Sequence[float]`): When each was measured, rising.
        validation (`bool`, *optional*, defaults to `False`): Which of the two rules.

    Returns:
        `tuple[list[float], list[float]]`: The smooth losses, and the steps that were kept.
    """
    points = list(zip(steps, losses, strict=True))
    if len(points) < 8:
        return list(losses), list(steps)
    middle = steps[len(steps) // 2]
    share = 1 if validation else max(1, int(0.03 * len(points)))
    for _ in range(1 if validation else 10):
        spline, noise = _spline(points)
        residual = {t: abs(float(spline(t)) - y) / noise for t, y in points if validation or t < middle}
        worst = sorted(residual, key=residual.__getitem__, reverse=True)[:share]
        dropped = {t for t in worst if residual[t] > 3}
        if not dropped:
            break
        points = [p for p in points if p[0] not in dropped]
    spline, _ = _spline(points)
    kept = [t for t, _ in points]
    return [float(spline(t)) for t in kept], kept


def _spline(points: Sequence[tuple[float, float]]) -> tuple[Callable[[float], Any], float]:
    """Return a smoothing spline and the noise it smooths: the rms distance from the line between two neighbours."""
    interpolate = require("scipy.interpolate", "AutoLRS")
    squares = []
    for (t0, y0), (t1, y1), (t2, y2) in zip(points, points[1:], points[2:], strict=False):
        w = (t1 - t0) / (t2 - t0)
        squares.append((y1 - (1 - w) * y0 - w * y2) ** 2 / (1 + w * w + (1 - w) ** 2))
    times, values = [t for t, _ in points], [y for _, y in points]
    smallest = 1e-9 * max(max(abs(y) for y in values), 1e-9)
    noise = max(math.sqrt(sum(squares) / len(squares)), smallest)
    with warnings.catch_warnings():
        # scipy warns when the smoothing is not reached to the last digit; the spline is usable.
        warnings.simplefilter("ignore")
        return interpolate.UnivariateSpline(times, values, w=[1 / noise] * len(points), k=2), noise


def predict_loss(
    losses: Sequence[float], steps: Sequence[int], horizon: int, validation: bool = False, before: float | None = None
) -> float:
    """
    Predict the loss after `horizon` updates from those of a probe: denoise, fit an exponential, extrapolate.

    Args:
        losses (`Sequence[float]`): Training or validation losses of the probe.
        steps (`Sequence[int]`): Updates after which they were measured.
        horizon (`int`): Update to predict.
        validation (`bool`, *optional*, defaults to `False`): Whether these are validation losses.
        before (`float`, *optional*): Validation loss before the search. If the probe's largest loss reaches it, the
            last observed loss is returned: a loss that rose has no falling exponential to extrapolate.

    Returns:
        `float`: The prediction; 1e6 when a loss is not finite.
    """
    if not losses or not all(math.isfinite(loss) for loss in losses):
        return BROKEN
    if validation and before is not None and max(losses) >= before:
        return losses[-1]
    smooth, kept = denoise(losses, steps, validation)
    predicted = extrapolate_exponential(smooth, horizon, kept)
    return predicted if math.isfinite(predicted) else BROKEN


def propose_lr(tried: Sequence[tuple[float, float]], low: float, high: float, kappa: float, seed: int) -> float:
    """
    Next LR to probe: the lowest `mu - kappa sigma` of a Gaussian process over log LR, on a grid of 101.

    A function of its arguments alone, so the search resumes from the list of pairs. The first LR is random.

    Args:
        tried (`Sequence[tuple[float, float]]`): Pairs of LR and predicted loss; a broken probe has 1e6.
        low, high (`float`): Range.
        kappa (`float`): Weight of the uncertainty.
        seed (`int`): Seed of the first LR and of the fit of the kernel's parameters.
    """
    grid = [low * (high / low) ** (i / 100) for i in range(101)]
    if not tried:
        return grid[random.Random(seed).randrange(101)]
    fresh = [lr for lr in grid if all(abs(math.log(lr / old)) > 1e-9 for old, _ in tried)]
    gp = require("sklearn.gaussian_process", "AutoLRS")
    usable = sorted(y for _, y in tried if y < BROKEN)
    if not usable:
        return min(fresh)
    # A broken or diverging probe counts as clearly worse than the usable ones, without flattening their differences.
    spread = max(statistics.median(usable) - usable[0], 1e-3 * max(abs(usable[0]), 1e-3))
    worst = usable[0] + 5 * spread
    x = [[math.log(lr)] for lr, _ in tried]
    y = [min(value, worst) for _, value in tried]
    kernel = gp.kernels.Matern(length_scale=1.0, length_scale_bounds=(0.1, 10.0), nu=2.5)
    kernel = kernel + gp.kernels.WhiteKernel(1e-3, (1e-6, 1.0))
    model = gp.GaussianProcessRegressor(kernel, normalize_y=True, random_state=seed % 2**32)
    with warnings.catch_warnings():
        # A kernel parameter at its bound is expected with so few points.
        warnings.simplefilter("ignore")
        mean, deviation = model.fit(x, y).predict([[math.log(lr)] for lr in fresh], return_std=True)
    scores = [float(m) - kappa * float(s) for m, s in zip(mean, deviation, strict=True)]
    return fresh[scores.index(min(scores))]


def share_stage(left: int, stage_steps: int, probes: int, first: bool) -> tuple[int, int, bool]:
    """
    Share what is left of a run between a search and the stage after it.

    Args:
        left (`int`): Updates that are left.
        stage_steps (`int`): Length that the stage should have.
        probes (`int`): LRs to try; with 1 there is nothing to search.
        first (`bool`): Whether no LR is known yet. The first stage is shortened; a later one without room for a search
            and a whole stage keeps the last LR.

    Returns:
        `tuple[int, int, bool]`: Updates of the search, updates of the stage, and whether the last LR is kept. A first
        stage of 0 or fewer updates means that the run is too short.

    Example:
    ```python
    >>> share_stage(20, 6, 3, first=True), share_stage(9, 6, 3, first=True), share_stage(11, 6, 3, first=False)
    ((6, 6, False), (6, 3, False), (0, 6, True))
    ```
    """
    search = probes * (stage_steps // probes) if probes > 1 else 0
    if not first and left < search + stage_steps:
        return 0, min(stage_steps, left), True
    return search, min(stage_steps, left - search), False


def probe_blocks(
    progress: Mapping[str, Any], step: int, max_steps: int, probes: int, max_stage_steps: int
) -> list[tuple[int, int, int]]:
    """
    Return the probes of the search in progress and of all later ones: a function of lengths alone.

    Args:
        progress (`Mapping`): Of `AutoLRSCallback`, once its stage has begun.
        step (`int`): Finished updates.
        max_steps (`int`): Updates of the run.
        probes, max_stage_steps (`int`): Of the search.

    Returns:
        `list[tuple[int, int, int]]`: First update, last update and updates of one probe, for each search.

    Example:
    ```python
    >>> begun = {"phase": "probe", "tried": [], "done": 0, "run_steps": 6, "stage_steps": 6}
    >>> probe_blocks(begun, 0, 26, probes=3, max_stage_steps=6)
    [(1, 6, 2), (13, 18, 2)]
    ```
    """
    blocks, stage = [], progress["stage_steps"]
    end = step + progress["run_steps"] - progress["done"]
    if progress["phase"] == "probe":
        length = stage // probes
        before = step - progress["done"] - len(progress["tried"]) * length
        blocks.append((before + 1, before + probes * length, length))
        end = blocks[0][1] + progress["run_steps"]
    while end < max_steps:
        stage = min(2 * stage, max_stage_steps)
        search, run, _ = share_stage(max_steps - end, stage, probes, first=False)
        if search:
            blocks.append((end + 1, end + search, stage // probes))
        end += search + run
    return blocks


def validation_loss(source: Any, model: torch.nn.Module, device: torch.device) -> float:
    """
    Return the validation loss, averaged over processes; weights, modes and random numbers stay as they are.

    Args:
        source: A function `(model) -> loss`, or a Trainer, whose eval dataset and loss are then used.
        model (`torch.nn.Module`): Put into evaluation mode for the call.
        device (`torch.device`): Where the processes' losses are averaged.
    """
    modes, rng = [module.training for module in model.modules()], take_rng()
    model.eval()
    try:
        with torch.no_grad():
            value = float(_trainer_loss(source, model) if hasattr(source, "get_eval_dataloader") else source(model))
    finally:
        for module, training in zip(model.modules(), modes, strict=True):
            module.training = training
        restore_rng(rng)
    return mean_over_ranks(value, device)


def _trainer_loss(trainer: Any, model: torch.nn.Module) -> float:
    losses = []
    for batch in trainer.get_eval_dataloader():
        loss, _, _ = trainer.prediction_step(model, batch, prediction_loss_only=True)
        if loss is None:
            raise RefusedError("An eval batch gives no loss, which AutoLRS needs. Put labels in the eval dataset.")
        losses.append(float(loss.mean()))
    if not losses:
        raise RefusedError("The Trainer's eval_dataset is empty. Pass at least one batch, or evaluate=function.")
    return sum(losses) / len(losses)


def mean_over_ranks(value: float, device: torch.device) -> float:
    """Return the mean of `value` over processes; not finite where one is not."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    total = torch.tensor(value, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(total)
    return total.item() / torch.distributed.get_world_size()


def same_on_ranks(value: float, device: torch.device) -> float:
    """Return the first process's `value` on every process."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    shared = torch.tensor(value, dtype=torch.float64, device=device)
    torch.distributed.broadcast(shared, src=0)
    return shared.item()
