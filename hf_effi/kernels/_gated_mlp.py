"""
The arithmetic of [`hf_effi.kernels.tiled_mlp`]: a gated MLP and its backward, a tile of tokens at a time.

Two things differ from the tiled MLPs of DeepSpeed and Liger. The parameters are inputs of the autograd Function, so
that each gets its gradient once a backward, as DDP and FSDP2 need. And under activation checkpointing nothing is
computed twice: see [`Keep`].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._peft_layers import dense_weight
from ._products import add_product
from .gated_product import gated_product, gated_product_backward


@dataclass(frozen=True)
class Linear:
    """
    Which tensors `x W^T + b + sum_k s_k (x A_k^T) B_k^T` has, in this order: `[W, b?, A_1, B_1, ...]`.

    Args:
        has_bias (`bool`): Whether there is `b`.
        scales (`tuple[float, ...]`): `s_k`, one an adapter.
        quant_state (*optional*): bitsandbytes' description of a packed `W`.
        compute_dtype (`torch.dtype`, *optional*): Dtype of the product with a packed `W`; `None`: that of `x`.
    """

    has_bias: bool
    scales: tuple[float, ...] = ()
    quant_state: Any = None
    compute_dtype: torch.dtype | None = None

    @property
    def num_tensors(self) -> int:
        return 1 + self.has_bias + 2 * len(self.scales)

    def unpacked(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
        """Return the tensors with `W` as numbers: once per call, for all tiles."""
        if self.quant_state is None:
            return tensors
        return [dense_weight(tensors[0], self.quant_state, dtype), *tensors[1:]]

    def forward(self, x: Tensor, tensors: Sequence[Tensor], into: Tensor | None = None) -> Tensor:
        weight = tensors[0].t()
        y = torch.addmm(tensors[1], x, weight, out=into) if self.has_bias else torch.mm(x, weight, out=into)
        for a, b, scale in self._adapters(tensors):
            y.add_(F.linear(F.linear(x.to(a.dtype), a), b), alpha=scale)
        return y

    def grad_input(self, grad_y: Tensor, tensors: Sequence[Tensor], into: Tensor, beta: int = 0) -> list[Tensor]:
        """Make `into` the gradient of `x` plus `beta` times itself; return `s_k dy B_k` for [`add_grads`]."""
        into.addmm_(grad_y, tensors[0], beta=beta)
        inners = []
        for a, b, scale in self._adapters(tensors):
            inners.append((grad_y.to(b.dtype) @ b).mul_(scale))
            add_product(into, inners[-1], a)
        return inners

    def add_grads(
        self,
        grad_y: Tensor,
        inners: Sequence[Tensor],
        x: Tensor,
        tensors: Sequence[Tensor],
        sums: Sequence[Tensor | None],
    ) -> None:
        """Add the gradients of the tensors to `sums`, where `None` marks a frozen one."""
        if sums[0] is not None:
            add_product(sums[0], grad_y.t(), x)
        if self.has_bias and sums[1] is not None:
            sums[1].add_(grad_y.sum(0, dtype=sums[1].dtype))
        parts = zip(inners, self._adapters(tensors), self._adapters(sums), strict=True)
        for inner, (a, b, scale), (sum_a, sum_b, _) in parts:
            rows = x.to(a.dtype)
            if sum_a is not None:
                add_product(sum_a, inner.t(), rows)
            if sum_b is not None:
                add_product(sum_b, grad_y.to(b.dtype).t(), F.linear(rows, a).mul_(scale))

    def _adapters(self, tensors: Sequence[Any]) -> list[tuple[Any, Any, float]]:
        rest = tensors[1 + self.has_bias :]
        return list(zip(rest[::2], rest[1::2], self.scales, strict=True))


@dataclass(frozen=True)
class GatedMLP:
    """`down(act(gate(x)) * up(x))` on tokens `(rows, hidden)`, from a flat list of tensors."""

    gate: Linear
    up: Linear
    down: Linear
    activation: str
    rows: int

    def _split(self, tensors: Sequence[Any]) -> list[Sequence[Any]]:
        first = self.gate.num_tensors
        second = first + self.up.num_tensors
        return [tensors[:first], tensors[first:second], tensors[second:]]

    def _unpacked(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Sequence[Tensor]]:
        linears = (self.gate, self.up, self.down)
        return [linear.unpacked(own, dtype) for linear, own in zip(linears, self._split(tensors), strict=True)]

    def forward(self, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        gate, up, down = self._unpacked(tensors, x.dtype)
        out = x.new_empty(x.shape[0], down[0].shape[0])
        for tile, place in zip(x.split(self.rows), out.split(self.rows), strict=True):
            product = gated_product(self.gate.forward(tile, gate), self.up.forward(tile, up), self.activation)
            self.down.forward(product, down, into=place)
        return out

    def backward(self, grad: Tensor, x: Tensor, tensors: Sequence[Tensor], sums: Sequence[Tensor | None]) -> Tensor:
        """The down projection of the forward is not needed: 2 of its 3 GEMMs a tile are done again."""
        parts, sums = self._unpacked(tensors, x.dtype), self._split(sums)
        grad_x = torch.empty_like(x)
        for tile, grad_tile, place in zip(*(t.split(self.rows) for t in (x, grad, grad_x)), strict=True):
            self._backward_tile(grad_tile, tile, parts, sums, into=place)
        return grad_x

    def _backward_tile(
        self,
        grad: Tensor,
        x: Tensor,
        parts: Sequence[Sequence[Tensor]],
        sums: Sequence[Sequence[Tensor | None]],
        into: Tensor,
    ) -> None:
        gate, up, down = parts
        sum_gate, sum_up, sum_down = sums
        g, u = self.gate.forward(x, gate), self.up.forward(x, up)
        grad_product = torch.empty_like(g)
        inners = self.down.grad_input(grad, down, grad_product)
        product, grad_g, grad_u = gated_product_backward(grad_product, g, u, self.activation)
        self.down.add_grads(grad, inners, product, down, sum_down)
        inners = self.gate.grad_input(grad_g, gate, into)
        self.gate.add_grads(grad_g, inners, x, gate, sum_gate)
        inners = self.up.grad_input(grad_u, up, into, beta=1)
        self.up.add_grads(grad_u, inners, x, up, sum_up)


class Keep(torch.autograd.Function):
    """
    Identity of `x` that saves `x` and the parameters for the MLP's node behind it.

    A Function saves its tensors when its forward has returned. Non-reentrant checkpointing ends its recompute as soon
    as the last saved tensor is known; saved here, before the tiles run, no tile is computed for a recompute that needs
    nothing behind the MLP. Where a later operation saves something (a norm behind the MLP), it goes on and stays
    exact.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(x, *tensors)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, *(None for _ in ctx.needs_input_grad[1:])


class TiledFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, keeper: Any, mlp: GatedMLP, *tensors: Tensor) -> Tensor:
        ctx.keeper, ctx.mlp = keeper, mlp
        return mlp.forward(x, tensors)

    @staticmethod
    @once_differentiable
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
