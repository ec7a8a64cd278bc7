"""The rule for what `SharpnessProbe` measures: a learning rate that the curvature of the loss does not stand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from . import metrics
from .findings import Finding, Rule, RunFacts, Trace, TrainLimits, step_of

#: an LR that rises by less than this share has stopped rising
_RISE = 1e-6


def lr_over_sharpness(trace: Trace, facts: RunFacts, limits: TrainLimits) -> Finding | None:
    """After warm-up the LR is above what the sharpest direction of the loss stands, again and again."""
    shares, highest = [], -math.inf
    for entry in trace:
        rate = _rate(entry)
        rises = rate is None or rate > highest * (1 + _RISE) or highest <= 0
        highest = highest if rate is None else max(highest, rate)
        if metrics.SHARPNESS_RHO in entry and not rises:
            shares.append(float(entry[metrics.SHARPNESS_RHO]))
    above = [share for share in shares if share > limits.sharpness]
    if len(above) < limits.sharpness_probes:
        return None
    return Finding(
        "lr_over_sharpness",
        step_of(trace, facts),
        f"In {len(above)} of {len(shares)} probes after warm-up the LR was up to {max(above):.3g} times what the "
        "curvature of the loss stands, so that updates overshoot along the sharpest direction",
        "take a longer warm-up or a lower peak LR; suggest_warmup reads the length from the curve of a run "
        "with a lower LR",
    )


def _rate(entry: Mapping[str, Any]) -> float | None:
    rate = entry.get("learning_rate", entry.get("optimizer_lr"))
    return float(rate) if isinstance(rate, (int, float)) and math.isfinite(rate) else None


SHARPNESS_RULES: tuple[Rule, ...] = (lr_over_sharpness,)
