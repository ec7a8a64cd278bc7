"""Which point a schedule-free optimizer holds: the one that gradients are taken at, or the average that counts."""

from __future__ import annotations

from typing import Any

from .report import innermost


def is_schedule_free(optimizer: Any) -> bool:
    """
    Return whether an optimizer keeps an average of its own, between which and the point of its gradients it moves the
    weights by `train()` and `eval()`.

    It is asked what it has, not what it is called: the two methods, and a mode in its groups.

    Args:
        optimizer (`torch.optim.Optimizer`): Wrapped by accelerate or not; `None` counts as no.
    """
    inner = innermost(optimizer)
    moves = callable(getattr(inner, "train", None)) and callable(getattr(inner, "eval", None))
    return moves and any("train_mode" in group for group in inner.param_groups)


def holds_average(optimizer: Any) -> bool:
    """
    Return whether the weights are the average now; they are of an optimizer that keeps none.

    Args:
        optimizer (`torch.optim.Optimizer`): Wrapped by accelerate or not.
    """
    if not is_schedule_free(optimizer):
        return True
    return not any(group.get("train_mode", False) for group in innermost(optimizer).param_groups)
