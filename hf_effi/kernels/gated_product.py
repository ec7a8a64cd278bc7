"""`act(g) u`, the product inside a gated MLP, and its backward: SwiGLU and both GeGLUs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..patching.triton_or_torch import triton_ops


class Activation(NamedTuple):
    """
    By torch.

    Args:
        forward (`Callable`): Of the input.
        backward (`Callable`): Of the gradient of the output, and the input.
    """

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


ACTIVATIONS = {
    "silu": Activation(F.silu, torch.ops.aten.silu_backward),
    "gelu": Activation(F.gelu, torch.ops.aten.gelu_backward),
    "gelu_tanh": Activation(
        functools.partial(F.gelu, approximate="tanh"),
        functools.partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    ),
}


class GatedGradients(NamedTuple):
    """
    What the backward of a gated MLP needs of its product.

    Args:
        product (`Tensor`): `act(g) u`, again.
        gate, up (`Tensor`): Gradients of `g` and `u`.
    """

    product: Tensor
    gate: Tensor
    up: Tensor


def gated_product_reference(g: Tensor, u: Tensor, activation: str) -> Tensor:
    """[`gated_product`] by torch."""
    return ACTIVATIONS[activation].forward(g) * u


def gated_product(g: Tensor, u: Tensor, activation: str) -> Tensor:
    """
    Return `act(g) u`. No gradient passes here.

    The kernel computes in fp32 and rounds once; torch rounds `act(g)` to the dtype first. SwiGLU and GeGLU:
    https://arxiv.org/abs/2002.05202, equation 6.

    Args:
        g, u (`Tensor`): The same shape and dtype. `g` is used up: the kernel writes into its memory.
        activation (`str`): `"silu"`, `"gelu"` or `"gelu_tanh"`.

    Example:
    ```python
    >>> import torch
    >>> gated_product(torch.tensor([0.0, 100.0]), torch.tensor([5.0, 2.0]), "silu")
    tensor([  0., 200.])
    ```
    """
    if ops := triton_ops("hf_effi.kernels._gated_product_triton", g):
        return ops.gated_product_(g, u, activation)
    return gated_product_reference(g, u, activation)


def gated_product_backward_reference(grad: Tensor, g: Tensor, u: Tensor, activation: str) -> GatedGradients:
    """[`gated_product_backward`] by torch."""
    act = ACTIVATIONS[activation]
    h = act.forward(g)
    product = h * u
    return GatedGradients(product, act.backward(u.mul_(grad), g), h.mul_(grad))


def gated_product_backward(grad: Tensor, g: Tensor, u: Tensor, activation: str) -> GatedGradients:
    """
    From the gradient of `a = act(g) u` return `a` again, `dg = da u act'(g)` and `du = da act(g)`.

    The kernel reads and writes each of three tensors once: the results lie in the memory of `grad`, `g` and `u`.

    Args:
        grad, g, u (`Tensor`): The same shape and dtype. Used up: their values afterwards are undefined.
        activation (`str`): As in [`gated_product`].

    Example:
    ```python
    >>> import torch
    >>> one = torch.ones(1)
    >>> gated_product_backward(one, 0.0 * one, 3.0 * one, "silu")
    GatedGradients(product=tensor([0.]), gate=tensor([1.5000]), up=tensor([0.]))
    ```
    """
    if ops := triton_ops("hf_effi.kernels._gated_product_triton", g):
        return GatedGradients(*ops.gated_product_backward_(grad, g, u, activation))
    return gated_product_backward_reference(grad, g, u, activation)
