"""COAT: Adam's moments in fp8 with their range expanded, and saved activations in fp8 (arXiv 2410.19313)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaForCausalLM

GROUP, STEPS_OF_POWER, E4M3_MAX = 128, 16, 448.0
#: log2 of the range that e4m3 is filled to: 448^2 / 2.
FULL_RANGE = 16.6147098441152


def power(ratio: torch.Tensor) -> torch.Tensor:
    """
    Return `k = floor(16 log2(448^2 / 2) / log2(ratio)) / 16` for groups whose largest over smallest magnitude is
    `ratio`.

    A ratio below 2 counts as 2: the formula has no value for equal magnitudes.
    """
    return (STEPS_OF_POWER * FULL_RANGE / ratio.log2().clamp(min=1)).floor() / STEPS_OF_POWER


class Expanded(NamedTuple):
    """A tensor in e4m3, `(groups, 128)`, with three fp32 numbers per group."""

    values: torch.Tensor
    scale: torch.Tensor
    power: torch.Tensor
    middle: torch.Tensor


def compress(x: torch.Tensor) -> Expanded:
    """
    Expand the range of each group of 128 and round to e4m3: `f(x) = sign(x) (|x| / sqrt(max min))^k`.

    `min` is of the magnitudes that are not zero; a zero stays zero.
    """
    groups = F.pad(x.flatten(), (0, -x.numel() % GROUP)).view(-1, GROUP)
    size = groups.abs()
    largest = size.amax(1, keepdim=True)
    smallest = torch.where(size > 0, size, largest).amin(1, keepdim=True)
    zero = largest == 0
    k = power(torch.where(zero, 1.0, largest / smallest))
    # the square root of each, because their product is below fp32's range for a second moment
    middle = torch.where(zero, 1.0, largest.sqrt() * smallest.sqrt())
    scale = torch.where(zero, 1.0, (largest / middle) ** k / E4M3_MAX)
    values = groups.sign() * (size / middle) ** k / scale
    return Expanded(values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale, k, middle)


def restore(packed: Expanded, shape: torch.Size) -> torch.Tensor:
    """Invert `compress`, up to the rounding."""
    y = packed.values.float() * packed.scale
    x = y.sign() * y.abs() ** (1 / packed.power) * packed.middle
    return x.flatten()[: shape.numel()].view(shape)


class CoatAdamW(torch.optim.Optimizer):
    """AdamW whose two moments lie in memory as `Expanded`."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, self.state[p], **{k: group[k] for k in ("lr", "betas", "eps", "weight_decay")})

    @staticmethod
    def _update(p: nn.Parameter, state: dict[str, Any], lr: float, betas, eps: float, weight_decay: float) -> None:
        state["step"] = step = state.get("step", 0) + 1
        m, v = (
            restore(state[name], p.shape) if name in state else torch.zeros_like(p)
            for name in ("exp_avg", "exp_avg_sq")
        )
        m.lerp_(p.grad, 1 - betas[0])
        v.lerp_(p.grad.square(), 1 - betas[1])
        p.mul_(1 - lr * weight_decay)
        p.addcdiv_(m, (v / (1 - betas[1] ** step)).sqrt() + eps, value=-lr / (1 - betas[0] ** step))
        state["exp_avg"], state["exp_avg_sq"] = compress(m), compress(v)


def pack(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round to e4m3 with one scale for each 128 elements of a row: `s = max|x| / 448`."""
    groups = x.float().unflatten(-1, (-1, GROUP))
    scale = groups.abs().amax(-1, keepdim=True) / E4M3_MAX
    scale = torch.where(scale == 0, 1.0, scale)
    return (groups / scale).to(torch.float8_e4m3fn), scale


def unpack(packed: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    values, scale = packed
    return (values.float() * scale).flatten(-2)


class SavedInFp8:
    """
    Keeps the hidden and intermediate activations of decoder layers in fp8; parameters and attention's tensors stay.

    A tensor that several operators save is packed once, as autograd keeps it once. `stored` and `bf16` count the bytes
    that were saved so far, as they lie in memory and as they would in bf16.
    """

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.stored = self.bf16 = 0
        self._parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        for layer in model.model.layers:
            layer.forward = functools.partial(self._forward, layer.forward)

    def _forward(self, forward: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        seen: dict[tuple, Any] = {}
        with torch.autograd.graph.saved_tensors_hooks(functools.partial(self._save, seen), self._load):
            return forward(*args, **kwargs)

    def _save(self, seen: dict[tuple, Any], x: torch.Tensor) -> Any:
        address = x.untyped_storage().data_ptr()
        if address in self._parameters or not x.is_floating_point():
            return x
        packs = x.dim() in (2, 3) and x.size(-1) % GROUP == 0 and x.is_contiguous()
        key = (address, x.storage_offset(), x.numel(), packs)
        if key not in seen:
            kept = pack(x) if packs else x
            # x as well: its address must not be used again before the forward ends
            seen[key] = (kept, x)
            self.bf16 += 2 * x.numel()
            self.stored += sum(part.nbytes for part in kept) if packs else 2 * x.numel()
        return (seen[key][0], x.shape) if packs else x

    @staticmethod
    def _load(kept: Any) -> torch.Tensor:
        return unpack(kept[0]).view(kept[1]) if isinstance(kept, tuple) else kept
