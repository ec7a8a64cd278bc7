"""NAdamW in AlgoPerf's form: AdamW with Nesterov momentum and the plain bias correction."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .base import EffiOptimizer, check_betas, check_not_negative, check_positive, fp32_like, gradient_of
from .factory import optimizer_factory, parameter_groups, with_report
from .roles import GroupRules, parameter_roles


class NAdamW(EffiOptimizer):
    """
    AdamW whose numerator looks one step ahead.

    Formula, t from 1: `w <- w (1 - lr decay)`, `m <- b1 m + (1 - b1) g`, `v <- b2 v + (1 - b2) g^2`,
    `w <- w - lr ((b1 m + (1 - b1) g) / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)`.
    `torch.optim.NAdam` is another rule: its momentum has a schedule, which no setting of it switches off.
    Source: the reference of AlgoPerf (Dahl et al., 2306.07179). Moments are kept in fp32 also for bf16 weights.

    Args:
        params (iterable): Parameters or groups, as for torch's optimizers.
        lr (`float`, *optional*, defaults to 1e-3): AlgoPerf searches [1e-4, 1e-2], on a log scale.
        betas (`tuple[float, float]`, *optional*, defaults to (0.9, 0.999)): In [0, 1).
        eps (`float`, *optional*, defaults to 1e-8): Above 0.
        weight_decay (`float`, *optional*, defaults to 0.0): Decoupled. AlgoPerf searches [5e-3, 1].

    Raises:
        ValueError: a value out of range.

    Example:
    ```python
    >>> w = nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = NAdamW([w], lr=0.1, betas=(0.5, 0.5), eps=1e-12)
    >>> w.grad = torch.tensor([2.0])
    >>> optimizer.step(); round(w.item(), 4)  # m = 1, (0.5 + 1) / 0.5 = 3, sqrt(2 / 0.5) = 2
    0.85

    ```
    """

    elementwise = True

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {
            "lr": check_not_negative("lr", lr),
            "betas": check_betas(betas),
            "eps": check_positive("eps", eps),
            "weight_decay": check_not_negative("weight_decay", weight_decay),
        }
        super().__init__(params, defaults)

    def update_group(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        """Update the parameters of one group."""
        (beta1, beta2), lr = group["betas"], group["lr"]
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state.update(step=0, exp_avg=fp32_like(parameter), exp_avg_sq=fp32_like(parameter))
            state["step"] += 1
            mean, square = state["exp_avg"], state["exp_avg_sq"]
            gradient = gradient_of(parameter, mean.dtype)
            mean.lerp_(gradient, 1 - beta1)
            square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            ahead = torch.lerp(gradient, mean, beta1).div_(1 - beta1 ** state["step"])
            scale = (square / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
            parameter.mul_(1 - lr * group["weight_decay"])
            parameter.sub_((ahead.div_(scale) * lr).to(parameter.dtype))


@optimizer_factory(elementwise=True)
def nadamw(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    rules: GroupRules | None = None,
) -> torch.optim.Optimizer:
    """
    Make [`NAdamW`] for a model.

    Args:
        model (`nn.Module`): Its trainable parameters are updated.
        lr, weight_decay, betas, eps: As in [`NAdamW`].
        rules (`GroupRules`, *optional*): Learning rates and weight decay by parameter.
    """
    groups = parameter_groups(model, lambda role: "nadamw", lr=lr, weight_decay=weight_decay, rules=rules)
    return with_report(NAdamW(groups, lr=lr, betas=betas, eps=eps), parameter_roles(model, rules))
