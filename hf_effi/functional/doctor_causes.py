"""
Rules for what `CausesCallback` reads: layers whose gradients are out of line, outliers, growing weights, stragglers.

A cause must be seen in `cause_probes` readings that follow each other; log entries between them do not count.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from . import metrics
from .findings import Finding, Rule, RunFacts, Trace, TrainLimits, step_of

#: a median over fewer layers says nothing of one of them
_FEWEST_LAYERS = 3


def layer_gradient_high(trace: Trace, facts: RunFacts, limits: TrainLimits) -> Finding | None:
    """One layer, but the last, has many times the gradient of the median layer."""
    readings = _by_layer(trace, metrics.CAUSE_LAYER_GRADIENT, limits.cause_probes)
    if not readings:
        return None
    last = [*readings[-1]][-1]
    shares = [_over_median(reading) for reading in readings]
    high = [
        layer
        for layer in shares[-1]
        if layer != last and all(share.get(layer, 0.0) > limits.layer_gradient for share in shares)
    ]
    if not high:
        return None
    worst = max(high, key=lambda layer: shares[-1][layer])
    return Finding(
        "layer_gradient_high",
        step_of(trace, facts),
        f"The gradient of layer {worst} is {shares[-1][worst]:.3g} times that of the median layer",
        "look at its weights and its input for a wrong scale (a bad merge, an initialisation, a missing norm); a "
        "lower LR for it, or longer warm-up, keeps it from undoing the others",
    )


def layer_dead(trace: Trace, facts: RunFacts, limits: TrainLimits) -> Finding | None:
    """One layer has next to no gradient where the others have."""
    readings = _by_layer(trace, metrics.CAUSE_LAYER_GRADIENT, limits.cause_probes)
    if not readings:
        return None
    shares = [_over_median(reading) for reading in readings]
    dead = [layer for layer in shares[-1] if all(share.get(layer, math.inf) < limits.dead_layer for share in shares)]
    if not dead:
        return None
    several = f"Layers {', '.join(dead[:8])} have" if len(dead) > 1 else f"Layer {dead[0]} has"
    return Finding(
        "layer_dead",
        step_of(trace, facts),
        f"{several} less than {limits.dead_layer:g} of the gradient of the median layer: next to "
        "nothing is learned there",
        "look for a gate, a mask or a detach that leaves it out of the loss, for activations that are always off, or "
        "freeze it with requires_grad_(False) if that is meant",
    )


def last_layer_dominates(trace: Trace, facts: RunFacts, limits: TrainLimits) -> Finding | None:
    """The last layer has nearly all of the gradient of the layers."""
    readings = _by_layer(trace, metrics.CAUSE_LAYER_GRADIENT, limits.cause_probes)
    shares = []
    for reading in readings:
        squares = [value**2 for value in reading.values()]
        shares.append(squares[-1] / sum(squares) if sum(squares) > 0 else 0.0)
    if not shares or min(shares) <= limits.last_layer:
        return None
    return Finding(
        "last_layer_dominates",
        step_of(trace, facts),
        f"The last layer has {shares[-1]:.1%} of the squared gradient of all layers: the others hardly learn",
        "look for what stops the gradient on its way down (a residual that is missing or scaled, a detach, an output "
        "projection near 0), and for an LR of its own for the last layer",
    )


def quantization_will_hurt(trace: Trace, facts: RunFacts, limits: TrainLimits) -> Finding | None:
    """Hidden states have outliers that 4 bits cannot hold beside the rest."""
    kurtosis = _largest(trace, metrics.CAUSE_KURTOSIS, limits.cause_probes)
    massive = _largest(trace, metrics.CAUSE_MASSIVE_TOKENS, limits.cause_probes)
    if kurtosis and min(value for _, value in kurtosis) > limits.kurtosis:
        layer, value = kurtosis[-1]
        seen = f"The hidden states behind layer {layer} have an excess kurtosis of {value:.3g}"
    elif massive and min(value for _, value in massive) > limits.massive_tokens:
        layer, value = massive[-1]
        seen = f"{value:.2%} of the tokens behind layer {layer} have a massive activation"
    else:
        return None
    return Finding(
        "quantization_will_hurt",
        step_of(trace, facts),
        f"{seen}: quantising the activations of this model to 4 bits will hurt",
        "keep activations in 8 bits or more, or use a method that moves outliers away (rotation, smoothing), and "
        "measure the loss of the quantised model before you rely on it",
        severity="note",
    )


def effective_lr_collapse(trace: Trace, facts: RunFacts, limits: TrainLimits) -> Finding | None:
    """The weights have grown so much that a step turns them by a fraction of what it did."""
    factors = [entry[metrics.CAUSE_EFFECTIVE_LR] for entry in _having(trace, metrics.CAUSE_EFFECTIVE_LR)]
    factors = factors[-limits.cause_probes :]
    if len(factors) < limits.cause_probes or max(factors) >= limits.effective_lr:
        return None
    growth = 1 / math.sqrt(factors[-1]) if factors[-1] > 0 else math.inf
    return Finding(
        "effective_lr_collapse",
        step_of(trace, facts),
        f"The norm of the median layer's weights has grown {growth:.3g} times: where a norm follows, a gradient step "
        f"is worth {factors[-1]:.1%} of what it was, and one of Adam or Muon {math.sqrt(factors[-1]):.1%}",
        "lower the LR if the weights run away, or raise weight_decay so that their norm settles",
    )


def straggler(trace: Trace, facts: RunFacts, limits: TrainLimits) -> Finding | None:
    """The same process is slower than the others, report after report."""
    reports = _having(trace, metrics.STRAGGLER_RATIO)[-limits.straggler_logs :]
    if len(reports) < limits.straggler_logs or len({report.get(metrics.STRAGGLER_RANK) for report in reports}) > 1:
        return None
    slow = all(
        report[metrics.STRAGGLER_RATIO] > limits.straggler
        and report.get(metrics.STRAGGLER_PERSISTENCE, 0.0) >= limits.straggler_share
        for report in reports
    )
    if not slow:
        return None
    report = reports[-1]
    return Finding(
        "straggler",
        step_of(trace, facts),
        f"Process {report[metrics.STRAGGLER_RANK]:.0f} takes {report[metrics.STRAGGLER_RATIO]:.2f} times the mean of "
        f"all, and the others wait {report.get(metrics.STRAGGLER_WAITING, 0.0):.0%} of the time",
        "look at its device (clock, temperature, other jobs), and at the lengths of the rows that it gets",
    )


CAUSE_RULES: tuple[Rule, ...] = (
    layer_gradient_high,
    layer_dead,
    last_layer_dominates,
    quantization_will_hurt,
    effective_lr_collapse,
    straggler,
)


# --- readings --------------------------------------------------------------------------------------------------------


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _having(trace: Trace, key: str) -> list[Mapping[str, Any]]:
    return [entry for entry in trace if _is_number(entry.get(key))]


def _readings(trace: Trace, prefix: str, count: int) -> list[dict[str, float]]:
    """Return layer -> value of the last `count` entries that have any, or nothing where there are fewer."""
    found = []
    for entry in trace:
        own = {
            name.removeprefix(prefix): float(value)
            for name, value in entry.items()
            if isinstance(name, str) and name.startswith(prefix) and _is_number(value)
        }
        if own:
            found.append(own)
    return found[-count:] if len(found) >= count else []


def _by_layer(trace: Trace, prefix: str, count: int) -> list[dict[str, float]]:
    found = _readings(trace, prefix, count)
    return found if all(len(reading) >= _FEWEST_LAYERS for reading in found) else []


def _over_median(reading: Mapping[str, float]) -> dict[str, float]:
    """Return layer -> value over the median; where that is 0, whatever is above it is infinitely far."""
    median = statistics.median(reading.values())
    return {
        layer: value / median if median > 0 else (math.inf if value > 0 else 1.0) for layer, value in reading.items()
    }


def _largest(trace: Trace, prefix: str, count: int) -> Sequence[tuple[str, float]]:
    """Return the layer with the largest value, and the value, of each of the last readings."""
    return [max(reading.items(), key=lambda one: one[1]) for reading in _readings(trace, prefix, count)]
