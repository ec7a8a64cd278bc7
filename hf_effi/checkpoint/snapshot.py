"""An exact copy of what training changes: weights, buffers, optimizer, loss scaler, scheduler, gradients, RNG."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy
import torch


def _clone(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {k: _clone(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_clone(v) for v in value)
    return copy.deepcopy(value)


def take_rng() -> dict[str, Any]:
    """
    Return the state of every random number generator, in a form that a checkpoint gives back without running code.
    """
    legacy: Any = numpy.random.get_state()  # a tuple, unless a dict is asked for
    name, keys, *rest = legacy
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_rng(state: dict[str, Any]) -> None:
    """Put back what [`take_rng`] returned."""
    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])


def copy_weights(model: torch.nn.Module) -> dict[str, Any]:
    """Return a copy of parameters and buffers for `load_state_dict`."""
    return _clone(dict(model.state_dict()))


def take_snapshot(model: torch.nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any = None) -> dict[str, Any]:
    """
    Return a snapshot that shares no memory with the run.

    The loss scaler of fp16 training is taken from an optimizer that carries one, as accelerate's does.

    Args:
        model, optimizer: Of the run, unsharded.
        scheduler (*optional*): An LR scheduler to include.
    """
    scaler = getattr(optimizer, "scaler", None)
    return {
        "model": copy_weights(model),
        "optimizer": _clone(optimizer.state_dict()),
        "scaler": None if scaler is None else _clone(scaler.state_dict()),
        "scheduler": None if scheduler is None else _clone(scheduler.state_dict()),
        "gradients": [None if p.grad is None else p.grad.detach().clone() for p in model.parameters()],
        "training": [module.training for module in model.modules()],
        "rng": take_rng(),
    }


def restore_snapshot(
    snapshot: dict[str, Any],
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    rng: bool = True,
    scheduler: Any = None,
) -> None:
    """
    Put a snapshot back, bit for bit; `rng=False` leaves the random numbers where they are, and `scheduler` is the one
    that was given to [`take_snapshot`].
    """
    model.load_state_dict(snapshot["model"])
    optimizer.load_state_dict(_clone(snapshot["optimizer"]))
    if snapshot["scaler"] is not None:
        carrier: Any = optimizer  # it carried a scaler when the snapshot was taken
        carrier.scaler.load_state_dict(_clone(snapshot["scaler"]))
    if scheduler is not None:
        scheduler.load_state_dict(_clone(snapshot["scheduler"]))
    for parameter, gradient in zip(model.parameters(), snapshot["gradients"], strict=True):
        parameter.grad = None if gradient is None else gradient.clone()
    for module, training in zip(model.modules(), snapshot["training"], strict=True):
        module.training = training
    if rng:
        restore_rng(snapshot["rng"])
