"""What the optimizers of this package share: the frame of a step, state in the precision it was made in, engines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import RefusedError


class EffiOptimizer(torch.optim.Optimizer):
    """
    Base of an optimizer: a subclass writes `update_group`.

    Its state holds only tensors, numbers, strings, lists and dicts, so that a Trainer can load it again
    (`weights_only=True`), and tensors keep the precision that they were saved in: torch casts them to that of the
    weights, which takes the digits of fp32 moments of bf16 weights.
    """

    #: Whether each weight is updated from its own gradient alone, so that a flattened or sharded tensor is as good.
    elementwise = False

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the weights that have a gradient; `closure`, if given, computes loss and gradients first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            live = [p for p in group["params"] if p.grad is not None]
            if any(p.grad.is_sparse for p in live):
                raise RefusedError(
                    f"{type(self).__name__} takes no sparse gradients. Make the embedding with sparse=False."
                )
            if live:
                self.update_group(group, live)
        return loss

    def update_group(self, group: dict[str, Any], parameters: list[torch.nn.Parameter]) -> None:
        """Update the parameters of one group; each has a gradient."""
        raise NotImplementedError

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state; its tensors keep their precision and go to the device of their parameter."""
        super().load_state_dict(dict(state_dict))
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        here = [p for group in self.param_groups for p in group["params"]]
        for number, parameter in zip(saved, here, strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor) and value.is_floating_point():
                    self.state[parameter][key] = value.detach().clone().to(self.state[parameter][key].device)


def fp32_like(parameter: Tensor) -> Tensor:
    """Return zeros in the shape of a parameter, in fp32 or, for fp64 weights, in fp64."""
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    return torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format)


def gradient_of(parameter: torch.nn.Parameter, dtype: torch.dtype) -> Tensor:
    """Return the gradient of a parameter that has one, in a precision."""
    gradient = parameter.grad
    if gradient is None:
        raise ValueError(f"A parameter of shape {tuple(parameter.shape)} has no gradient. Update only those that do.")
    return gradient.to(dtype)


def check_betas(betas: Any) -> tuple[float, float]:
    """
    Return two coefficients of moments.

    Raises:
        ValueError: not two numbers in [0, 1).
    """
    pair = tuple(betas) if isinstance(betas, (tuple, list)) else ()
    if len(pair) != 2 or not all(isinstance(b, (int, float)) and not isinstance(b, bool) and 0 <= b < 1 for b in pair):
        raise ValueError(f"betas={betas!r} must be two numbers in [0, 1), e.g. (0.9, 0.999).")
    return float(pair[0]), float(pair[1])


def check_positive(name: str, value: Any) -> float:
    """
    Return a number above 0.

    Raises:
        ValueError: anything else.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise ValueError(f"{name}={value!r} must be a number above 0.")
    return float(value)


def check_not_negative(name: str, value: Any) -> float:
    """
    Return a number of at least 0.

    Raises:
        ValueError: anything else.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise ValueError(f"{name}={value!r} must be a number of at least 0.")
    return value
