"""Loss, outputs and all gradients of a model, and how far two of them are apart."""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: relative to the largest entry; fp32 where a model insists on it
TOLERANCE = {torch.float64: 1e-7, torch.float32: 2e-3}
#: where fp32 is only inside of an fp64 model, as in TRL's head
MIXED_TOLERANCE = 1e-5

_TORCH_FLOAT = torch.Tensor.float
_SUMS = ("sum", "mean", "cumsum", "prod")


@contextlib.contextmanager
def all_double() -> Iterator[None]:
    """
    Keep tensors in fp64 where the model asks for fp32, also where a backward computes again.

    Norms, softmaxes and rotary embeddings of transformers compute in fp32 whatever they are given: their rounding
    would hide differences of that size.
    """
    places = [(torch.Tensor, name) for name in ("to", "type", "softmax", "log_softmax", *_SUMS)]
    places += [(where, name) for where in (torch, F) for name in ("softmax", "log_softmax")]
    places += [(torch, name) for name in _SUMS]
    originals = [getattr(where, name) for where, name in places]
    try:
        for (where, name), original in zip(places, originals, strict=True):
            setattr(where, name, _wider(original))
        torch.Tensor.float = _float
        yield
    finally:
        for (where, name), original in zip(places, originals, strict=True):
            if where is torch.Tensor:
                delattr(where, name)  # torch's own lies in the base class
            else:
                setattr(where, name, original)
        del torch.Tensor.float


def _wider(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(first: Tensor, *args: Any, **kwargs: Any) -> Any:
        if _is_wide(first):
            args = tuple(torch.float64 if value is torch.float32 else value for value in args)
            kwargs = {name: torch.float64 if value is torch.float32 else value for name, value in kwargs.items()}
        return original(first, *args, **kwargs)

    return call


def _float(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return tensor if _is_wide(tensor) else _TORCH_FLOAT(tensor, *args, **kwargs)


def _is_wide(tensor: Any) -> bool:
    """Not in TRL's head, which makes its buffers in fp32 and checks them against its products."""
    if not isinstance(tensor, Tensor) or tensor.dtype != torch.float64:
        return False
    return not sys._getframe(2).f_globals.get("__name__", "").startswith("trl.")


def measure(
    model: nn.Module,
    call: Callable[[nn.Module], tuple[Tensor, Mapping[str, Tensor]]],
    seed: int = 7,
) -> dict[str, Tensor]:
    """
    Return loss, outputs and gradients by name, and clear the gradients.

    Args:
        model (`nn.Module`): In the mode it is to run in.
        call (`Callable`): Runs the model and returns the loss and what else is to be compared.
        seed (`int`, *optional*, defaults to 7): Of the random numbers of the call.
    """
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    with all_double():
        loss, outputs = call(model)
        if loss.requires_grad:
            loss.backward()
    return {"loss": loss.detach(), **{name: value.detach() for name, value in outputs.items()}, **gradients(model)}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradients by name and clear them; the names are those of the model without wrappers."""
    found = {gradient_name(n): weight.grad for n, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def gradient_name(name: str) -> str:
    """Return the name under which the gradient of a weight is compared."""
    return f"grad {name.replace('base_model.model.', '')}"


def largest_difference(expected: Mapping[str, Tensor], actual: Mapping[str, Tensor]) -> tuple[float, str]:
    """
    Return the largest difference relative to the largest entry of its tensor, and the tensor's name.

    A gradient that is nothing but rounding beside the others of its model counts by theirs. What one side lacks counts
    as zero.
    """
    rounding = 1e-6 if all(v.dtype == torch.float64 for v in expected.values() if v.is_floating_point()) else 1e-3
    scale = max((float(v.abs().max()) for n, v in expected.items() if n.startswith("grad") and v.numel()), default=0.0)
    worst = 0.0, ""
    for name in sorted({*expected, *actual}):
        one, two = expected.get(name), actual.get(name)
        one = torch.zeros_like(two) if one is None else one
        two = torch.zeros_like(one) if two is None else two
        if one.shape != two.shape:
            return math.inf, f"{name}: shape {tuple(two.shape)} instead of {tuple(one.shape)}"
        if not one.numel():
            continue
        floor = rounding * scale if name.startswith("grad") else 1e-30
        gap = float((one.double() - two.double()).abs().max()) / max(float(one.abs().max()), floor)
        if not gap <= worst[0]:
            worst = (gap if math.isfinite(gap) else math.inf), name
    return worst
