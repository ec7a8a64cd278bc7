"""`lr_range_test`: raise the LR until training breaks, on a copy, and say which range looks usable."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..checkpoint.snapshot import restore_snapshot, take_snapshot
from ..errors import RefusedError
from ..functional.probes import probing_model
from ..functional.schedules._checks import check_number, check_steps
from ..functional.schedules.adaptive import suggest_from_range_test
from ..patching import is_sharded, out_of_reach


@dataclass(frozen=True)
class RangeTest:
    """
    Outcome of [`lr_range_test`]. It is a report: nothing sets the LR.

    Args:
        low, high (`float` or `None`): Median range over the repeats; `None` where too few of them found one.
        confidence (`str`): `"high"`: the repeats' upper ends agree within a factor of 2; `"low"`: within a factor of
            10; `"none"`: they do not agree, or the loss did not fall.
        spread (`float` or `None`): Largest upper end / smallest.
        runs (`list[dict]`): LRs and losses of each repeat, and what it suggests.
    """

    low: float | None
    high: float | None
    confidence: str
    spread: float | None
    runs: list[dict[str, Any]]


def lr_range_test(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Any],
    loss_fn: Callable[[torch.nn.Module, Any], torch.Tensor] | None = None,
    *,
    low: float = 1e-6,
    high: float = 1.0,
    repeats: int = 3,
    stop_factor: float = 4.0,
) -> RangeTest:
    """
    Run a learning-rate range test and put weights, optimizer and random numbers back, bit for bit.

    Its updates are made outside of a Trainer's loop, so callbacks have no event of them, and what counts tokens in
    front of the model leaves them out.

    Formula: `lr_t = low (high/low)^(t/(n-1))`; a repeat ends when the smoothed loss is above `stop_factor` times the
    lowest, or not finite. Repeats see the batches in different orders.
    Paper: Smith, Cyclical Learning Rates (1506.01186).

    Args:
        model, optimizer: The ones of the run; unchanged afterwards.
        batches (`Sequence`): At least 10; one is one update.
        loss_fn (`Callable`, *optional*): `(model, batch) -> loss`; `model(**batch).loss` if `None`.
        low, high (`float`, *optional*): Range of LRs, `0 < low < high`.
        repeats (`int`, *optional*, defaults to 3): Repeats with other orders, for the stated confidence.
        stop_factor (`float`, *optional*, defaults to 4.0): Above 1.

    Raises:
        ValueError: too few batches, a bad range, or a model and optimizer of DeepSpeed, FSDP or tensor parallelism.
    """
    if not isinstance(model, torch.nn.Module) or not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(
            f"lr_range_test needs a torch.nn.Module and a torch.optim.Optimizer, not {type(model).__name__} and "
            f"{type(optimizer).__name__}. Pass model, optimizer, batches in this order."
        )
    _check_whole(model, optimizer)
    if not isinstance(batches, Sequence):
        raise ValueError(f"batches is {type(batches).__name__}, not a list. Pass a list of batches: list(dataloader).")
    check_number("high", high, 0.0, math.inf, low_open=True)
    check_number("low", low, 0.0, high, low_open=True, high_open=True)
    check_steps("repeats", repeats, 1)
    check_number("stop_factor", stop_factor, 1.0, math.inf, low_open=True)
    if len(batches) < 10:
        raise ValueError(f"{len(batches)} batches are too few for a range test. Pass at least 10, better 100.")
    loss_fn = loss_fn or (lambda m, batch: m(**batch).loss)
    snapshot = take_snapshot(model, optimizer)
    # A private generator: the order of the repeats must not move the run's random numbers.
    generator = torch.Generator().manual_seed(0)
    runs = []
    with probing_model(model):
        try:
            for repeat in range(repeats):
                order: Sequence[int] = range(len(batches))
                if repeat > 0:
                    order = torch.randperm(len(batches), generator=generator).tolist()
                runs.append(
                    _sweep(
                        model,
                        optimizer,
                        [batches[i] for i in order],
                        loss_fn,
                        low=low,
                        high=high,
                        stop_factor=stop_factor,
                    )
                )
                restore_snapshot(snapshot, model, optimizer)
        finally:
            restore_snapshot(snapshot, model, optimizer)
    return _judge(runs)


def _check_whole(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Under DeepSpeed the engine steps and not the optimizer, so that the test would find a flat loss."""
    kind = type(optimizer).__module__
    owned = kind.startswith("deepspeed") or kind == "accelerate.utils.deepspeed"
    if owned or is_sharded(model) or out_of_reach(model):
        raise RefusedError(
            f"lr_range_test steps the optimizer itself and puts whole weights back, but {type(optimizer).__name__} or "
            "the model is DeepSpeed's, FSDP's or tensor-parallel. Run the test on the plain model, before it is "
            "given to the engine."
        )


def _sweep(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Any],
    loss_fn: Callable[[torch.nn.Module, Any], torch.Tensor],
    *,
    low: float,
    high: float,
    stop_factor: float,
) -> dict[str, Any]:
    model.train()
    first = optimizer.param_groups[0]["lr"] or 1.0
    ratios = [float(group["lr"]) / float(first) for group in optimizer.param_groups]
    lrs: list[float] = []
    losses: list[float] = []
    mean, best = 0.0, math.inf
    for i, batch in enumerate(batches):
        lr = low * (high / low) ** (i / (len(batches) - 1))
        for group, ratio in zip(optimizer.param_groups, ratios, strict=True):
            group["lr"] = lr * ratio
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        value = loss.detach().item()
        if not math.isfinite(value):
            break
        lrs.append(lr)
        losses.append(value)
        mean = 0.9 * mean + 0.1 * value
        smooth = mean / (1 - 0.9 ** (i + 1))
        best = min(best, smooth)
        if best > 0 and smooth > stop_factor * best:
            break
        loss.backward()
        optimizer.step()
    return {"lrs": lrs, "losses": losses, "suggestion": suggest_from_range_test(lrs, losses)}


def _judge(runs: list[dict[str, Any]]) -> RangeTest:
    found = [run["suggestion"] for run in runs if run["suggestion"] is not None]
    if not found or 2 * len(found) < len(runs):
        return RangeTest(None, None, "none", None, runs)
    tops = [suggestion["high"] for suggestion in found]
    spread = max(tops) / min(tops)
    agreed = len(found) == len(runs) and len(runs) > 1
    confidence = "high" if agreed and spread <= 2 else "low" if spread <= 10 else "none"
    low, high = statistics.median(s["low"] for s in found), statistics.median(tops)
    return RangeTest(low, high, confidence, spread, runs)
