"""MARS-M: Muon on gradients whose variance is reduced by the gradient of the update before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .base import fp32_like, gradient_of
from .factory import optimizer_factory, with_report
from .matrix_views import Split
from .muon_adamw import MuonAdamW, check_momentum, plan_muon
from .roles import GroupRules


class MarsM(MuonAdamW):
    """
    [`MuonAdamW`] whose matrices get a corrected gradient.

    Formula, `b` the momentum: `C = G + gamma b / (1 - b) (G - G_before)`, divided by its norm where that is above 1;
    `M <- b M + (1 - b) C`; `M` is made orthogonal. Without memory of the gradient before: `B <- b B + (1 - gamma)
    (1 - b) / b G`, and `gamma G + b B` is made orthogonal. The first update has no gradient before it: `C = G`.
    """

    def direction(self, group: dict[str, Any], state: dict[str, Any], parameter: nn.Parameter) -> Tensor:
        """Return what is made orthogonal; the gradient is kept as a copy, since the Trainer drops its own."""
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = fp32_like(parameter)
        buffer, beta, gamma = state["momentum_buffer"], group["momentum"], group["gamma"]
        gradient = gradient_of(parameter, buffer.dtype)
        if group["memory_free"]:
            buffer.mul_(beta).add_(gradient, alpha=(1 - gamma) * (1 - beta) / beta)
            return gradient * gamma + buffer * beta
        before = state.get("previous_gradient", gradient).to(buffer.dtype)
        corrected = gradient + (gradient - before) * (gamma * beta / (1 - beta))
        state["previous_gradient"] = gradient_of(parameter, parameter.dtype).detach().clone()
        if group["clip"]:
            norm = torch.linalg.vector_norm(corrected)
            corrected = corrected / (norm.full_tensor() if isinstance(norm, DTensor) else norm).clamp(min=1.0)
        return buffer.lerp_(corrected, 1 - beta)


@optimizer_factory(sharded=True)
def mars_m(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.0,
    gamma: float = 0.025,
    clip: bool | None = None,
    memory_free: bool = False,
    momentum: float = 0.95,
    ns_steps: int = 5,
    adjust_lr: str = "match_rms_adamw",
    which: str = "hidden",
    adam_lr_ratio: float | None = None,
    adam_lr: float | None = None,
    betas: Sequence[float] = (0.9, 0.95),
    eps: float = 1e-8,
    split: Split | None = None,
    rules: GroupRules | None = None,
) -> torch.optim.Optimizer:
    """
    Make [`MarsM`] for a model: MARS-M for the matrices inside of its layers, AdamW for the rest.

    Args:
        model (`nn.Module`): Its trainable parameters are updated. Not sharded yet.
        lr, weight_decay: As in [`muon`]. Paper: 6e-3 (GPT-2 small) and 0.1.
        gamma (`float`, *optional*, defaults to 0.025): Strength of the correction, in [0, 1]; 0 is Muon without
            Nesterov.
        clip (`bool`, *optional*): Whether a corrected gradient of norm above 1 is scaled to 1; of a parameter, all
            experts together. On by default, and not there with `memory_free`.
        memory_free (`bool`, *optional*, defaults to `False`): The form that keeps no gradient.
        momentum (`float`, *optional*, defaults to 0.95): In [0, 1), with `memory_free` above 0.
        ns_steps, adjust_lr, which, adam_lr_ratio, adam_lr, betas, eps, split, rules (*optional*): As in [`muon`].

    Raises:
        ValueError: a value out of range.
        RefusedError: as in [`muon`].
    """
    check_momentum(momentum, ns_steps)
    if isinstance(gamma, bool) or not isinstance(gamma, (int, float)) or not 0 <= gamma <= 1:
        raise ValueError(f"gamma={gamma!r} must be a number in [0, 1]. Paper: 0.025.")
    if memory_free and clip is not None:
        raise ValueError(f"clip={clip!r} acts on a corrected gradient, which memory_free=True does not have.")
    if memory_free and not momentum > 0:
        raise ValueError(f"momentum={momentum!r} must be above 0 with memory_free=True, which divides by it.")
    plan = plan_muon(
        model,
        {"momentum": momentum, "ns_steps": ns_steps, "gamma": gamma, "clip": clip is not False}
        | {"memory_free": memory_free},
        lr=lr,
        weight_decay=weight_decay,
        which=which,
        adjust_lr=adjust_lr,
        adam_lr_ratio=adam_lr_ratio,
        adam_lr=adam_lr,
        betas=tuple(betas),  # type: ignore[arg-type]
        eps=eps,
        split=split,
        rules=rules,
    )
    return with_report(MarsM(plan.groups, plan.views), plan.roles)
