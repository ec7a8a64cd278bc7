"""Triton kernels of [`hf_effi.kernels.gated_product`]: in place, in fp32, rounded once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _activation(x, ACTIVATION: tl.constexpr):
    """`act(x)` and `act'(x)`; SiLU and the tanh form of GELU are both `x sigmoid(z(x))`."""
    if ACTIVATION == "gelu":
        share = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        slope = 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        z, dz = x, 1.0
        if ACTIVATION == "gelu_tanh":
            z = 1.5957691216057308 * (x + 0.044715 * x * x * x)
            dz = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        share = tl.sigmoid(z)
        slope = share * (1.0 - share) * dz
    return x * share, share + x * slope


@triton.jit
def _gated_product_fwd_kernel(g_ptr, u_ptr, num_elements, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_elements
    g = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + at, mask=inside, other=0.0).to(tl.float32)
    h, _ = _activation(g, ACTIVATION)
    tl.store(g_ptr + at, (h * u).to(g_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gated_product_bwd_kernel(grad_ptr, g_ptr, u_ptr, num_elements, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_elements
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + at, mask=inside, other=0.0).to(tl.float32)
    h, slope = _activation(g, ACTIVATION)
    tl.store(grad_ptr + at, (h * u).to(grad_ptr.dtype.element_ty), mask=inside)
    tl.store(g_ptr + at, (grad * u * slope).to(g_ptr.dtype.element_ty), mask=inside)
    tl.store(u_ptr + at, (grad * h).to(u_ptr.dtype.element_ty), mask=inside)


def _launch(kernel: triton.JITFunction, tensors: tuple[Tensor, ...], activation: str) -> tuple[Tensor, ...]:
    tensors = tuple(t.contiguous() for t in tensors)
    if count := tensors[0].numel():
        kernel[(triton.cdiv(count, BLOCK),)](*tensors, count, ACTIVATION=activation, BLOCK=BLOCK)
    return tensors


def gated_product_(g: Tensor, u: Tensor, activation: str) -> Tensor:
    """[`hf_effi.kernels.gated_product.gated_product`] in the memory of `g`."""
    return _launch(_gated_product_fwd_kernel, (g, u), activation)[0]


def gated_product_backward_(grad: Tensor, g: Tensor, u: Tensor, activation: str) -> tuple[Tensor, ...]:
    """[`hf_effi.kernels.gated_product.gated_product_backward`] in the memory of its arguments."""
    return _launch(_gated_product_bwd_kernel, (grad, g, u), activation)
