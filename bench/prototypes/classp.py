"""CLASSP: each coordinate moves only where its gradient is large, and less the more it has moved."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


class Classp(torch.optim.Optimizer):
    """
    `s <- s + |g|^p` and `w <- w - lr g / (eps + s)^(1/p)` where `g^2 > threshold`; elsewhere nothing changes.

    The rule of the paper, for each coordinate by itself. The authors' code tests whether any coordinate of a tensor is
    above the threshold, and throws the result of the power away.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 0.2, threshold: float = 0.5, eps: float = 1e-5, power: float = 1.0
    ) -> None:
        for name, value in (("lr", lr), ("threshold", threshold), ("eps", eps)):
            if not value >= 0:
                raise ValueError(f"{name}={value!r} must be at least 0.")
        if not power > 0:
            raise ValueError(f"power={power!r} must be above 0.")
        super().__init__(params, {"lr": lr, "threshold": threshold, "eps": eps, "power": power})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["importance"] = torch.zeros_like(weight)
                grad, importance, power = weight.grad, state["importance"], group["power"]
                moves = grad.square() > group["threshold"]
                importance.add_(torch.where(moves, grad.abs() ** power, 0.0))
                update = group["lr"] * grad / (group["eps"] + importance) ** (1 / power)
                weight.copy_(torch.where(moves, weight - update, weight))

    def moved_share(self) -> float:
        """Return the share of the coordinates that have moved at least once."""
        states = [state["importance"] for state in self.state.values()]
        return sum(int((s > 0).sum()) for s in states) / max(sum(s.numel() for s in states), 1)
