"""TiledMLP: a gated MLP computed in tiles of tokens, so that its wide activations exist for one tile at a time.

Two things differ from the tiled MLPs of DeepSpeed and Liger. The parameters are inputs of the autograd Function, so that
each gets its gradient once a backward, as DDP and FSDP2 need. And under activation checkpointing nothing is computed
twice: see [`_Keep`].
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..functional.sequence import tile_rows
from .patch_handle import PatchHandle

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class _Activation(NamedTuple):
    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]  # (gradient of the output, input) -> gradient of the input


_ACTIVATIONS = {
    "silu": _Activation(F.silu, torch.ops.aten.silu_backward),
    "gelu": _Activation(F.gelu, torch.ops.aten.gelu_backward),
    "gelu_tanh": _Activation(
        functools.partial(F.gelu, approximate="tanh"),
        functools.partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    ),
}


def _add_product(total: Tensor | None, left: Tensor, right: Tensor) -> None:
    """`total += left @ right`, where there is a total."""
    if total is None:
        return
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


@dataclass(frozen=True)
class _Linear:
    """Which tensors `x W^T + b + sum_k s_k (x A_k^T) B_k^T` has: `[W, b?, A_1, B_1, ...]`, and its LoRA scales `s_k`."""

    has_bias: bool
    scales: tuple[float, ...]

    @property
    def num_tensors(self) -> int:
        return 1 + self.has_bias + 2 * len(self.scales)

    def forward(self, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        y = F.linear(x, tensors[0], tensors[1] if self.has_bias else None)
        for a, b, scale in self._adapters(tensors):
            y = y + F.linear(F.linear(x.to(a.dtype), a), b) * scale
        return y.to(x.dtype)

    def backward(self, grad_y: Tensor, x: Tensor, tensors: Sequence[Tensor], sums: Sequence[Tensor | None]) -> Tensor:
        """Return the gradient of `x` and add those of the tensors to `sums`, where `None` marks a frozen one."""
        _add_product(sums[0], grad_y.t(), x)
        if self.has_bias and sums[1] is not None:
            sums[1].add_(grad_y.sum(0, dtype=sums[1].dtype))
        grad_x = grad_y @ tensors[0]
        for (a, b, scale), (sum_a, sum_b, _) in zip(self._adapters(tensors), self._adapters(sums), strict=True):
            low_rank_x, scaled = x.to(a.dtype), grad_y.to(a.dtype) * scale
            inner = scaled @ b
            if sum_b is not None:
                _add_product(sum_b, scaled.t(), F.linear(low_rank_x, a))
            _add_product(sum_a, inner.t(), low_rank_x)
            grad_x = grad_x + (inner @ a).to(grad_x.dtype)
        return grad_x

    def _adapters(self, tensors: Sequence[Any]) -> list[tuple[Any, Any, float]]:
        rest = tensors[1 + self.has_bias :]
        return list(zip(rest[::2], rest[1::2], self.scales, strict=True))


@dataclass(frozen=True)
class _GatedMLP:
    """`down(act(gate(x)) * up(x))` on tokens `(rows, hidden)`, from a flat list of tensors."""

    gate: _Linear
    up: _Linear
    down: _Linear
    activation: str
    rows: int

    def split(self, tensors: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
        first = self.gate.num_tensors
        second = first + self.up.num_tensors
        return tensors[:first], tensors[first:second], tensors[second:]

    def forward(self, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        gate, up, down = self.split(tensors)
        act = _ACTIVATIONS[self.activation].forward
        out = x.new_empty(x.shape[0], down[0].shape[0])
        for tile, place in zip(x.split(self.rows), out.split(self.rows), strict=True):
            place.copy_(self.down.forward(act(self.gate.forward(tile, gate)) * self.up.forward(tile, up), down))
        return out

    def backward(self, grad: Tensor, x: Tensor, tensors: Sequence[Tensor], sums: Sequence[Tensor | None]) -> Tensor:
        """The down projection of the forward is not needed: 2 of its 3 GEMMs a tile are done again."""
        (gate, up, down), (sum_gate, sum_up, sum_down) = self.split(tensors), self.split(sums)
        act = _ACTIVATIONS[self.activation]
        grad_x = torch.empty_like(x)
        for tile, grad_tile, place in zip(*(t.split(self.rows) for t in (x, grad, grad_x)), strict=True):
            g, u = self.gate.forward(tile, gate), self.up.forward(tile, up)
            h = act.forward(g)
            grad_product = self.down.backward(grad_tile, h * u, down, sum_down)
            grad_g, grad_u = act.backward(grad_product * u, g), grad_product * h
            place.copy_(self.gate.backward(grad_g, tile, gate, sum_gate))
            place.add_(self.up.backward(grad_u, tile, up, sum_up))
        return grad_x


class _Keep(torch.autograd.Function):
    """
    Identity of `x` that saves `x` and the parameters for the MLP's node behind it.

    A Function saves its tensors when its forward has returned. Non-reentrant checkpointing ends its recompute as soon as
    the last saved tensor is known; saved here, before the tiles run, no tile is computed for a recompute that needs
    nothing behind the MLP. Where a later operation saves something (a norm behind the MLP), it goes on and stays exact.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(x, *tensors)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, *(None for _ in ctx.needs_input_grad[1:])


class _TiledMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, keeper: Any, mlp: _GatedMLP, *tensors: Tensor) -> Tensor:
        ctx.keeper, ctx.mlp = keeper, mlp
        return mlp.forward(x, tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.keeper.saved_tensors
        trained = ctx.needs_input_grad[3:]
        # Half precision would round the sum at every tile.
        sums = [
            torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) if needed else None
            for t, needed in zip(tensors, trained, strict=True)
        ]
        grad_x = ctx.mlp.backward(grad, x, tensors, sums)
        grads = (None if total is None else total.to(t.dtype) for total, t in zip(sums, tensors, strict=True))
        return grad_x, None, None, *grads


def tile_mlp(model: nn.Module, num_shards: int | None = None) -> PatchHandle:
    """
    Compute every gated MLP of a model in tiles of tokens: the same output and gradients, for a fraction of the memory.

    `down(act(gate(x)) * up(x))` acts on each token alone, so that it may run over `num_shards` tiles one after another;
    the backward does a tile's forward again instead of keeping `8 I` bytes a token (bf16, `I` the intermediate size).
    Under non-reentrant activation checkpointing this costs no further matrix product.
    ALST, https://arxiv.org/abs/2506.13996.

    Args:
        model (`torch.nn.Module`): Model whose MLPs have `gate_proj`, `up_proj`, `down_proj` and `act_fn` (Llama, Mistral,
            Qwen, Gemma, ...); plain or wrapped by PEFT, before or after. Only instances are changed.
        num_shards (`int`, *optional*): Tiles of a call, at least 1. Default: `ceil(tokens / hidden_size)`, so that a
            tile is about square.

    Returns:
        [`PatchHandle`]: `handle.revert()`, or the end of a `with` block, undoes it.

    Raises:
        ValueError: no such MLP, an MLP with another formula or activation, a bad `num_shards`; at the call, a projection
            that is no plain or LoRA linear layer (DoRA, quantized, LoRA dropout), or whose weights only its own hooks
            bring together (ZeRO-3, FSDP around single linear layers).

    Example:
    ```python
    handle = tile_mlp(model)
    Trainer(model, args, train_dataset=rows).train()
    handle.revert()
    ```
    """
    check_num_shards(num_shards)
    found = {
        name: module
        for name, module in model.named_modules()
        if all(isinstance(getattr(module, part, None), nn.Module) for part in _PROJECTIONS)
        and hasattr(module, "act_fn")
    }
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no gated MLP: none of its modules has {', '.join(_PROJECTIONS)} and act_fn."
        )
    forwards = {name: tiled_forward(name, module, num_shards) for name, module in found.items()}
    for name, module in found.items():
        _check_formula(name, module, forwards[name])
    handle = PatchHandle()
    for name, module in found.items():
        handle.replace(name, module, "forward", MethodType(forwards[name], module))
    return handle


def check_num_shards(num_shards: int | None) -> None:
    """Raise `ValueError` unless `num_shards` is `None` or an integer of at least 1."""
    if num_shards is not None and (not isinstance(num_shards, int) or isinstance(num_shards, bool) or num_shards < 1):
        raise ValueError(
            f"num_shards={num_shards!r} must be an integer of at least 1, or None for tokens / hidden_size."
        )


def tiled_forward(name: str, module: nn.Module, num_shards: int | None = None) -> Callable[..., Tensor]:
    """Return a function of a gated MLP and its input that computes it in tiles; `name` is for the errors."""
    return functools.partial(_tiled_forward, activation=_activation_of(name, module), num_shards=num_shards)


def _tiled_forward(module: nn.Module, x: Tensor, *, activation: str, num_shards: int | None) -> Tensor:
    linears, tensors = [], []
    for name in _PROJECTIONS:
        linear, own = _read_linear(getattr(module, name), name)
        linears.append(linear)
        tensors += own
    if torch.is_autocast_enabled(x.device.type):
        # As `F.linear` would cast them; inside the Function each tile would cast the weights again.
        dtype = torch.get_autocast_dtype(x.device.type)
        x, *tensors = (t if t.dtype == torch.float64 else t.to(dtype) for t in (x, *tensors))
    tokens = x.reshape(-1, x.shape[-1])
    mlp = _GatedMLP(*linears, activation, tile_rows(tokens.shape[0], tokens.shape[1], num_shards))
    kept = _Keep.apply(tokens, *tensors) if torch.is_grad_enabled() else tokens
    out = mlp.forward(tokens, tensors) if kept.grad_fn is None else _TiledMLP.apply(kept, kept.grad_fn, mlp, *tensors)
    return out.view(*x.shape[:-1], out.shape[-1])


def _read_linear(module: nn.Module, name: str) -> tuple[_Linear, list[Tensor]]:
    """Return a projection's form and tensors as they are at this moment: adapters may be switched at any time."""
    if hasattr(module, "lora_A"):
        return _read_lora(module, name)
    _check_bare(module, name)
    if type(module) is not nn.Linear:
        raise ValueError(
            f"TiledMLP: {name} is a {type(module).__name__}, not a torch.nn.Linear. stream_layers can run it."
        )
    bias = [] if module.bias is None else [module.bias]
    return _Linear(bool(bias), ()), [module.weight, *bias]


def _read_lora(module: Any, name: str) -> tuple[_Linear, list[Tensor]]:
    _check_bare(module, name)
    base, tensors = _read_linear(module.base_layer, name)
    if module.merged and module.disable_adapters:
        module.unmerge()  # as PEFT's own forward does
    if module.merged or module.disable_adapters:
        return base, tensors
    scales = []
    for adapter in module.active_adapters:
        if adapter not in module.lora_A:
            continue
        a, b, dropout = module.lora_A[adapter], module.lora_B[adapter], module.lora_dropout[adapter]
        if adapter in module.lora_variant:
            raise ValueError(
                f"TiledMLP: adapter {adapter!r} of {name} is {type(module.lora_variant[adapter]).__name__}, not LoRA."
            )
        if module.training and getattr(dropout, "p", 0.0) > 0:
            raise ValueError(f"TiledMLP: lora_dropout={dropout.p} of {name}: tiles are computed twice. Set it to 0.")
        if b.bias is not None:
            raise ValueError(f"TiledMLP: adapter {adapter!r} of {name} has a bias. Set lora_bias=False.")
        scales.append(float(module.scaling[adapter]))
        tensors += [a.weight, b.weight]
    return _Linear(base.has_bias, tuple(scales)), tensors


def _check_bare(module: nn.Module, name: str) -> None:
    """The tiles read the weights and never call the projection: hooks on it would be lost."""
    if module._forward_pre_hooks or module._forward_hooks or "forward" in module.__dict__:
        raise ValueError(
            f"TiledMLP: {name} has hooks of its own (ZeRO-3, FSDP around a single layer, an accelerate hook or a patch), "
            "which the tiles would pass by. Shard whole decoder layers, or leave tile_mlp out."
        )


def _activation_of(name: str, module: Any) -> str:
    grid = torch.linspace(-6, 6, 49)
    for key, activation in _ACTIVATIONS.items():
        if torch.allclose(module.act_fn(grid), activation.forward(grid), rtol=0, atol=1e-5):
            return key
    raise ValueError(
        f"TiledMLP: the activation of {name} ({type(module.act_fn).__name__}) is none of {', '.join(_ACTIVATIONS)}."
    )


@torch.no_grad()
def _check_formula(name: str, module: nn.Module, forward: Callable[..., Tensor]) -> None:
    """Compare on a few tokens: a class may have the names of a gated MLP and scale or clip on top."""
    weight = next(module.parameters())
    if isinstance(weight, DTensor):
        return  # sharded already: only FSDP's hooks around the layer could run it
    size = getattr(module.gate_proj, "in_features", weight.shape[-1])
    x = torch.linspace(-1, 1, 3 * size, device=weight.device).view(3, size).to(weight.dtype)
    expected, ours = module(x), forward(module, x)
    if not torch.allclose(expected, ours, rtol=0.02, atol=0.02 * float(expected.abs().max())):
        raise ValueError(f"TiledMLP: {name} ({type(module).__name__}) does not compute down(act(gate(x)) * up(x)).")
