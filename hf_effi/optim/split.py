"""Several optimizers as one: each has its own parameters, and a Trainer, a scheduler and a checkpoint see one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .base import EffiOptimizer


class SplitOptimizer(EffiOptimizer):
    """
    One optimizer made of several, each of which updates its own parameters.

    Groups and state are shared with the parts, not copied: a scheduler that changes the LR of a group changes it in
    its part, and the `state_dict` is one, in the form of torch's optimizers.

    Args:
        parts (`Sequence[torch.optim.Optimizer]`): They have no parameter in common and have made no update yet.
        lr (`float`): What `defaults["lr"]` says: the LR that was asked for.

    Raises:
        ValueError: no part, a parameter in two parts, or a part with a state.

    Example:
    ```python
    >>> a, b = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    >>> parts = [torch.optim.SGD(a.parameters(), lr=1.0), torch.optim.AdamW(b.parameters(), lr=0.1)]
    >>> both = SplitOptimizer(parts, lr=1.0)
    >>> both.param_groups[1]["lr"] = 0.5
    >>> parts[1].param_groups[0]["lr"]
    0.5

    ```
    """

    def __init__(self, parts: Sequence[torch.optim.Optimizer], lr: float) -> None:
        parts = tuple(parts)
        if not parts:
            raise ValueError("SplitOptimizer needs at least one optimizer.")
        if any(part.state for part in parts):
            raise ValueError("SplitOptimizer takes optimizers that have made no update yet.")
        groups = [group for part in parts for group in part.param_groups]
        # torch checks the groups and takes copies; the parts' own take their place below.
        super().__init__([dict(group) for group in groups], {"lr": lr})
        self.parts = parts
        self.param_groups = groups
        self._share()

    def _share(self) -> None:
        """Give the parts the groups and the state of the whole."""
        first = 0
        for part in self.parts:
            count = len(part.param_groups)
            part.param_groups = self.param_groups[first : first + count]
            part.state = self.state
            first += count

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "parts": self.parts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # also of `load_state_dict`, which brings no parts
        if hasattr(self, "parts"):
            self._share()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Let each part update its parameters; `closure`, if given, computes loss and gradients first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group while the optimizer is made; later it would belong to no part."""
        if hasattr(self, "parts"):
            raise ValueError("SplitOptimizer takes no further group: add it to one of its parts before it is made.")
        super().add_param_group(param_group)
