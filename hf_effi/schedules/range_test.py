"""`lr_range_test`: raise the LR until training breaks, undo it, and say which range looks usable."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Trainer

from ..checkpoint.snapshot import restore_snapshot, take_snapshot
from ..errors import RefusedError
from ..functional.probes import probing_model
from ..functional.schedules._checks import check_number, check_steps
from ..functional.schedules.adaptive import suggest_from_range_test
from ..functional.schedules.range_curve import RangeCurve, smooth_losses
from ..patching import is_sharded, out_of_reach
from ._trainer_sweep import check_trainer, sweep_trainer


@dataclass(frozen=True)
class RangeTest:
    """
    Outcome of [`lr_range_test`]. It is a report: nothing sets the LR.

    Args:
        low, high (`float` or `None`): Median range over the repeats; `None` where too few of them found one. `high` is
            a peak to try first.
        confidence (`str`): `"high"`: the repeats' upper ends agree within a factor of 2; `"low"`: within a factor of
            10; `"none"`: they do not agree, or the loss did not fall.
        spread (`float` or `None`): Largest upper end / smallest.
        runs (`list[dict]`): LRs and losses of each repeat, why it ended early, and what it suggests: `steepest`,
            `lowest_over_10`, and the smaller and the larger of the two.
        reason (`str`): What the suggestion follows from, in words.
        smoothing (`float`): Of the losses, for what is drawn.
    """

    low: float | None
    high: float | None
    confidence: str
    spread: float | None
    runs: list[dict[str, Any]]
    reason: str = ""
    smoothing: float = 0.9

    @property
    def curves(self) -> list[list[tuple[float, float, float]]]:
        """LR, loss and smoothed loss of each update, for each repeat."""
        return [
            list(zip(run["lrs"], run["losses"], smooth_losses(run["losses"], self.smoothing), strict=True))
            for run in self.runs
        ]

    @property
    def curve(self) -> list[tuple[float, float, float]]:
        """The first of `curves`: the data in the order of the run."""
        return self.curves[0]

    def __str__(self) -> str:
        found = "no range found" if self.high is None else f"{self.low:.3g} to {self.high:.3g}"
        return f"{found} (confidence {self.confidence}): {self.reason}"


def lr_range_test(
    model: Trainer | torch.nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    batches: Sequence[Any] | None = None,
    loss_fn: Callable[[torch.nn.Module, Any], torch.Tensor] | None = None,
    *,
    low: float = 1e-6,
    high: float = 1.0,
    repeats: int = 3,
    stop_factor: float = 4.0,
    smoothing: float = 0.9,
    steps: int | None = None,
) -> RangeTest:
    """
    Run a learning-rate range test and put weights, optimizer and random numbers back, bit for bit.

    Given a Trainer, the updates are its own: its `training_step`, accumulation, precision, clipping, optimizer, data
    and processes, from the weights that it has now, with every method that the trainer class itself brings. Its
    callbacks take no part. Afterwards the Trainer is what it was: what it trains next is what it would have trained,
    to the bit, and no checkpoint, log or evaluation was written. Given a model, an optimizer and batches, the updates
    are a plain loop's.

    Formula: `lr_t = low (high/low)^(t/(n-1))`; a repeat ends when the smoothed loss is above `stop_factor` times the
    lowest, or not finite. Repeats see the batches in different orders, and other random numbers.
    Paper: Smith, Cyclical Learning Rates (1506.01186).

    Args:
        model ([`~transformers.Trainer`] or `torch.nn.Module`): A Trainer before `train()`, and then nothing else but
            the keywords; or the model of a loop of your own. Unchanged afterwards.
        optimizer (`torch.optim.Optimizer`, *optional*): Of the loop; unchanged afterwards.
        batches (`Sequence`, *optional*): Of the loop, at least 10; one is one update.
        loss_fn (`Callable`, *optional*): Of the loop, `(model, batch) -> loss`; `model(**batch).loss` if `None`.
        low, high (`float`, *optional*): Range of LRs, `0 < low < high`. Of the first parameter group; others keep
            their ratio to it.
        repeats (`int`, *optional*, defaults to 3): Repeats with other orders, for the stated confidence.
        stop_factor (`float`, *optional*, defaults to 4.0): Above 1.
        smoothing (`float`, *optional*, defaults to 0.9): Decay of the running mean of the losses, in `[0, 1)`.
        steps (`int`, *optional*): Updates of one repeat on a Trainer, at least 10 and at most those of the run; 100
            where it is left out. With `batches` there are as many as those.

    Raises:
        ValueError: too few batches or steps, a bad range, or arguments of the other form.
        RefusedError: DeepSpeed, FSDP or tensor parallelism, whose weights cannot be put back; a GRPO trainer or
            another with rewards, whose loss does not fall while it learns; an optimizer that steps in the backward; a
            stream that may be read once only.

    Example:
    ```python
    report = lr_range_test(trainer, steps=200)
    print(report)  # 3.2e-05 to 4.1e-04 (confidence high): ...
    trainer.train()  # as if the test had not been
    ```
    """
    check_number("high", high, 0.0, math.inf, low_open=True)
    check_number("low", low, 0.0, high, low_open=True, high_open=True)
    check_steps("repeats", repeats, 1)
    curves = [RangeCurve(stop_factor, smoothing) for _ in range(repeats)]
    if isinstance(model, Trainer):
        _check_trainer_form(optimizer, batches, loss_fn)
        steps = 100 if steps is None else steps
        check_steps("steps", steps, 10, "Fewer updates give no curve.")
        check_trainer(model)
        for repeat, curve in enumerate(curves):
            seed = model.args.seed + repeat if repeat else None
            sweep_trainer(model, curve, low, high, steps, seed)
    else:
        _sweep_loop(model, optimizer, batches, loss_fn, steps, curves, low, high)
    return _judge(curves, smoothing)


def _check_trainer_form(*loop: Any) -> None:
    if any(part is not None for part in loop):
        raise ValueError(
            "lr_range_test was given a Trainer and parts of a loop. A Trainer has its own optimizer and data: call "
            "lr_range_test(trainer), or lr_range_test(model, optimizer, batches)."
        )


def _sweep_loop(
    model: Any,
    optimizer: Any,
    batches: Any,
    loss_fn: Callable[[torch.nn.Module, Any], torch.Tensor] | None,
    steps: int | None,
    curves: Sequence[RangeCurve],
    low: float,
    high: float,
) -> None:
    if not isinstance(model, torch.nn.Module) or not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(
            f"lr_range_test needs a Trainer, or a torch.nn.Module and a torch.optim.Optimizer, not "
            f"{type(model).__name__} and {type(optimizer).__name__}. Pass trainer, or model, optimizer, batches in "
            "this order."
        )
    if steps is not None:
        raise ValueError(f"steps={steps!r} would be ignored: one of the batches is one update. Pass as many batches.")
    _check_whole(model, optimizer)
    if not isinstance(batches, Sequence):
        raise ValueError(f"batches is {type(batches).__name__}, not a list. Pass a list of batches: list(dataloader).")
    if len(batches) < 10:
        raise ValueError(f"{len(batches)} batches are too few for a range test. Pass at least 10, better 100.")
    loss_fn = loss_fn or (lambda m, batch: m(**batch).loss)
    snapshot = take_snapshot(model, optimizer)
    # A private generator: the order of the repeats must not move the run's random numbers.
    generator = torch.Generator().manual_seed(0)
    with probing_model(model):
        try:
            for repeat, curve in enumerate(curves):
                order: Sequence[int] = range(len(batches))
                if repeat > 0:
                    order = torch.randperm(len(batches), generator=generator).tolist()
                _sweep(model, optimizer, [batches[i] for i in order], loss_fn, curve, low, high)
                restore_snapshot(snapshot, model, optimizer)
        finally:
            restore_snapshot(snapshot, model, optimizer)


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
    curve: RangeCurve,
    low: float,
    high: float,
) -> None:
    model.train()
    first = optimizer.param_groups[0]["lr"] or 1.0
    ratios = [float(group["lr"]) / float(first) for group in optimizer.param_groups]
    for i, batch in enumerate(batches):
        lr = low * (high / low) ** (i / (len(batches) - 1))
        for group, ratio in zip(optimizer.param_groups, ratios, strict=True):
            group["lr"] = lr * ratio
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        if not curve.push(lr, loss.detach().item()):
            break
        loss.backward()
        optimizer.step()


def _judge(curves: Sequence[RangeCurve], smoothing: float) -> RangeTest:
    runs: list[dict[str, Any]] = [
        {
            "lrs": curve.lrs,
            "losses": curve.losses,
            "stopped": curve.stopped,
            "suggestion": suggest_from_range_test(curve.lrs, curve.losses, smoothing),
        }
        for curve in curves
    ]
    found: list[dict[str, float]] = [run["suggestion"] for run in runs if run["suggestion"] is not None]
    ends = [curve.stopped for curve in curves if curve.stopped]
    end = f"{len(ends)} of {len(runs)} sweeps ended early ({ends[0]})" if ends else "no sweep ended early"
    if not found or 2 * len(found) < len(runs):
        reason = f"the smoothed loss fell in {len(found)} of {len(runs)} sweeps; {end}"
        return RangeTest(None, None, "none", None, runs, reason, smoothing)
    tops = [suggestion["high"] for suggestion in found]
    spread = max(tops) / min(tops)
    # Sweeps that saw the same batches with the same random numbers confirm nothing.
    differ = len({tuple(run["losses"]) for run in runs}) > 1
    agreed = len(found) == len(runs) and len(runs) > 1 and differ
    confidence = "high" if agreed and spread <= 2 else "low" if spread <= 10 else "none"
    low, high = statistics.median(s["low"] for s in found), statistics.median(tops)
    steepest, tenth = (statistics.median(s[name] for s in found) for name in ("steepest", "lowest_over_10"))
    reason = (
        f"the loss fell fastest at {steepest:.3g}, and a tenth of the rate of the lowest loss is {tenth:.3g}; {end}"
    )
    return RangeTest(low, high, confidence, spread, runs, reason, smoothing)
