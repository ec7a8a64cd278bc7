"""Which curvature an optimizer stands at the settings that it has now: read from its groups and its state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ..functional.sharpness import adam_preconditioner, adam_threshold, sgd_threshold
from .report import innermost
from .schedule_free import is_schedule_free


@dataclass(frozen=True)
class Stability:
    """
    What [`read_stability`] found.

    Args:
        weights (`list[torch.Tensor]`): What the optimizer trains.
        scales (`list`): The diagonal `S` for which `S H S` has the eigenvalues of the preconditioned Hessian: a tensor
            of the shape of its weight, or one number. Empty where there is no threshold.
        lr (`float`): Of the next update, the largest of all groups.
        factor (`float`): The threshold at an LR of 1, of the group with that LR; NaN where there is none.
        reason (`str`): Why there is no threshold; empty where there is one.
    """

    weights: list[torch.Tensor]
    scales: list[torch.Tensor | float]
    lr: float
    factor: float
    reason: str = ""

    @property
    def preconditions(self) -> bool:
        """Whether the preconditioned Hessian is another matrix than the Hessian."""
        return any(isinstance(scale, torch.Tensor) or scale != 1.0 for scale in self.scales)

    def rho(self, eigenvalue: float) -> float:
        """Return the preconditioned eigenvalue as a share of the threshold at the LR of the next update."""
        return self.lr * eigenvalue / self.factor


class _NoThreshold(Exception):
    """Says why."""


@torch.no_grad()
def read_stability(optimizer: Any) -> Stability:
    """
    Read from an optimizer what its next update stands.

    It is asked what it has, not what it is called. A group with two `betas` and `eps` whose state holds `exp_avg_sq`
    of the shape of the weight (`max_exp_avg_sq` where it has one) is Adam's; one with `momentum`, `dampening` and
    `nesterov` is that of SGD. Groups with other learning rates or betas are brought to those of the group with the
    largest LR: where a group has half the LR, its part of the preconditioner is twice as large. Weight decay is left
    out, and so are elements whose second moment is exactly 0, such as the embeddings of tokens that have not come up:
    Adam learns gradient and moment of them together, so that their first step is no larger than others.

    Args:
        optimizer (`torch.optim.Optimizer`): Wrapped by accelerate or not.

    Raises:
        ValueError: it trains nothing.
    """
    inner = innermost(optimizer)
    pairs = [
        (group, weight)
        for group in inner.param_groups
        for weight in group["params"]
        if weight.requires_grad and weight.numel()
    ]
    if not pairs:
        raise ValueError("The optimizer has no weight with requires_grad=True, so that there is nothing to measure.")
    weights, groups = [weight for _, weight in pairs], {id(group): group for group, _ in pairs}
    lr = max(float(group["lr"]) for group in groups.values())
    try:
        if is_schedule_free(inner):
            raise _NoThreshold("it takes its gradients at another point than the one that it moves")
        # In the first update of a warm-up every LR is 0: then the shares are those of the LRs that it leads to.
        field = "lr" if lr > 0 or any("initial_lr" not in group for group in groups.values()) else "initial_lr"
        top = max(groups.values(), key=lambda group: float(group[field]))
        factor, largest = _factor(top), float(top[field])
        scales: list[torch.Tensor | float] = []
        for group, weight in pairs:
            share = float(group[field]) / largest if largest > 0 else 1.0
            scale = math.sqrt(share * factor / _factor(group))
            scales.append(_divided(inner, group, weight, scale) if "betas" in group else scale)
    except _NoThreshold as reason:
        return Stability(weights, [], lr, math.nan, str(reason))
    if all(not isinstance(scale, torch.Tensor) and scale == 0.0 for scale in scales):
        return Stability(weights, [], lr, math.nan, "it has made no update yet, and knows no second moments")
    return Stability(weights, scales, lr, factor)


def _factor(group: dict[str, Any]) -> float:
    """Return the threshold of a group at an LR of 1."""
    if group.get("maximize"):
        raise _NoThreshold("it maximizes")
    if "betas" in group and "eps" in group and len(group["betas"]) == 2:
        return adam_threshold(1.0, float(group["betas"][0]))
    if all(name in group for name in ("momentum", "dampening", "nesterov")):
        return sgd_threshold(1.0, float(group["momentum"]), float(group["dampening"]), bool(group["nesterov"]))
    raise _NoThreshold("its groups have the settings of neither SGD nor Adam")


def _divided(inner: Any, group: dict[str, Any], weight: torch.Tensor, scale: float) -> torch.Tensor | float:
    """Return `scale / sqrt(P)`, and 0 where there was no gradient yet."""
    state = inner.state.get(weight, {})
    if not state:
        return 0.0
    moment = state.get("max_exp_avg_sq", state.get("exp_avg_sq"))
    if not isinstance(moment, torch.Tensor) or moment.shape != weight.shape or "step" not in state:
        raise _NoThreshold("its state has no exp_avg_sq of the shape of each weight")
    betas, seen = (float(group["betas"][0]), float(group["betas"][1])), moment != 0
    preconditioner = adam_preconditioner(moment.float(), int(state["step"]), betas, float(group["eps"]))
    return scale * (preconditioner + ~seen).rsqrt() * seen
