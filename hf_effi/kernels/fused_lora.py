"""
Fused LoRA linears: the projections that share an input compute their adapters together and save the input once.

PEFT computes `y_i = W_i x + s_i B_i A_i x` for each projection by itself. With adapters in fp32, its default, each
projection makes and keeps an fp32 copy of `x` outside autocast.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ._layers import Unit
from ._peft_layers import active_adapters, dense_weight, has_own_call, is_repacked
from ._targets import Target
from ._verify import _LayerRefusedError
from .low_bit import LowBitWeight, QuantizedRows, quantize_rows

#: names of projections that are given the same input by the modules of transformers
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class LoRAWeights(NamedTuple):
    """
    One linear layer with one adapter.

    Args:
        weight (`Tensor`, *optional*): `(out, in)`, or packed 4-bit weights; `None` with `low_bit`.
        bias (`Tensor`, *optional*): `(out,)`.
        a (`Tensor`): `(r, in)`.
        b (`Tensor`): `(out, r)`.
        scale (`float`): `s`: `alpha / r`, or `alpha / sqrt(r)` with rsLoRA.
        quant_state (*optional*): bitsandbytes' description of packed weights.
        compute_dtype (`torch.dtype`, *optional*): Dtype of the product with packed weights; `None`: that of `x`.
        low_bit ([`~hf_effi.kernels.low_bit.LowBitWeight`], *optional*): The weight in 8 bits: `x` and `dy` are rounded
            too.
    """

    weight: Tensor | None
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scale: float
    quant_state: Any = None
    compute_dtype: torch.dtype | None = None
    low_bit: LowBitWeight | None = None


class _Form(NamedTuple):
    """What of [`LoRAWeights`] autograd does not save, with the dtypes of this call."""

    scale: float
    quant_state: Any
    low_bit: LowBitWeight | None
    dtype: torch.dtype  # of the product with W
    out_dtype: torch.dtype


def fused_lora_reference(x: Tensor, linears: Sequence[LoRAWeights]) -> tuple[Tensor, ...]:
    """Return `W_i x + b_i + s_i B_i (A_i x)` for each layer, by autograd: what [`fused_lora`] is compared with."""
    return tuple(
        F.linear(x, w.weight, w.bias) + w.scale * F.linear(F.linear(x.to(w.a.dtype), w.a), w.b) for w in linears
    )


def fused_lora(x: Tensor, linears: Sequence[LoRAWeights]) -> tuple[Tensor, ...]:
    """
    Compute `y_i = W_i x + b_i + s_i B_i (A_i x)` for layers that share `x`, with one save of `x`.

    Forward: `U = x [A_1; ...; A_n]^T` in one product, `y_i = W_i x + b_i`, `y_i += s_i U_i B_i^T` in place. Saved: `x`
    and `U`. Backward: `dU_i = s_i dy_i B_i`, `dB_i = s_i dy_i^T U_i`, `dA = dU^T x`,
    `dx = sum_i dy_i W_i + dU [A_1; ...; A_n]` in one buffer. Packed weights are unpacked once a forward and once a
    backward. LoRA: https://arxiv.org/abs/2106.09685, equation 3.

    Args:
        x (`Tensor`): `(..., in)`.
        linears (`Sequence[LoRAWeights]`): At least one, all with the same `in`; adapters of several dtypes are
            promoted.

    Returns:
        `tuple[Tensor, ...]`: `(..., out_i)`, in the dtypes that PEFT returns.

    Example:
    ```python
    >>> import torch
    >>> eye = torch.eye(2)
    >>> w = LoRAWeights(weight=eye, bias=None, a=torch.ones(1, 2), b=torch.ones(2, 1), scale=0.5)
    >>> fused_lora(torch.tensor([[1.0, 3.0]]), [w])[0]
    tensor([[3., 5.]])
    ```
    """
    autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64  # which autocast leaves alone
    autocast_dtype = torch.get_autocast_dtype(x.device.type) if autocast else None
    adapter_dtype = autocast_dtype or functools.reduce(torch.promote_types, (w.a.dtype for w in linears))
    forms = tuple(
        _Form(
            w.scale,
            w.quant_state,
            w.low_bit,
            autocast_dtype or w.compute_dtype or x.dtype,
            # bitsandbytes returns the dtype of its input, a plain linear layer what autocast makes of it.
            x.dtype if w.quant_state is not None else autocast_dtype or x.dtype,
        )
        for w in linears
    )
    tensors = [tensor for w in linears for tensor in (w.weight, w.bias, w.a, w.b)]
    with torch.autocast(x.device.type, enabled=False):
        if len(dtypes := {adapter_dtype, *(form.dtype for form in forms)}) == 1:
            x = x.to(dtypes.pop())  # outside of the Function: what is saved is the narrow copy
        outputs = _FusedLoRA.apply(x, forms, adapter_dtype, *tensors)
        # Views are made here: one that a Function returns could not be changed in place by the model.
        return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs)


def _base_output(
    rows: Tensor, quantized: dict[str, QuantizedRows], weight: Tensor | None, bias: Tensor | None, form: _Form
) -> Tensor:
    bias = None if bias is None else bias.to(form.dtype)
    if form.low_bit is None:
        return F.linear(rows.to(form.dtype), dense_weight(weight, form.quant_state, form.dtype), bias)
    y = form.low_bit.product(quantized[form.low_bit.format], form.dtype)
    return y if bias is None else y.add_(bias)


def _quadruples(tensors: Sequence[Any]) -> list[tuple[Any, Any, Any, Any]]:
    return list(zip(tensors[::4], tensors[1::4], tensors[2::4], tensors[3::4], strict=True))


class _FusedLoRA(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, forms: tuple[_Form, ...], adapter_dtype: torch.dtype, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        rows = x.reshape(-1, x.shape[-1])
        linears = _quadruples(tensors)
        stacked = torch.cat([a for _, _, a, _ in linears]).to(adapter_dtype)
        inner = rows.to(adapter_dtype) @ stacked.t()
        formats = {form.low_bit.format for form in forms if form.low_bit is not None}
        quantized = {name: quantize_rows(rows, name) for name in formats}
        outputs = []
        for form, (weight, bias, _, b), u in zip(forms, linears, _split(inner, linears), strict=True):
            y = _base_output(rows, quantized, weight, bias, form).to(adapter_dtype)
            y = y.addmm_(u, b.to(adapter_dtype).t(), alpha=form.scale).to(form.out_dtype)
            outputs.append(y)
        ctx.save_for_backward(x, inner, *tensors)
        ctx.forms, ctx.adapter_dtype = forms, adapter_dtype
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, inner, *tensors = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            return _backward(ctx, x, inner, tensors, grads)


def _backward(
    ctx: Any, x: Tensor, inner: Tensor, tensors: Sequence[Tensor | None], grads: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    rows, dtype, linears = x.reshape(-1, x.shape[-1]), ctx.adapter_dtype, _quadruples(tensors)
    needed = _quadruples(ctx.needs_input_grad[3:])
    grad_inner, grad_x = torch.zeros_like(inner), None
    found: list[Tensor | None] = []
    parts = zip(ctx.forms, linears, needed, grads, _split(inner, linears), _split(grad_inner, linears), strict=True)
    for form, (weight, bias, _, b), (wants_weight, wants_bias, _, wants_b), grad, u, grad_u in parts:
        if grad is None:
            found += [None] * 4
            continue
        grad = grad.reshape(-1, grad.shape[-1])
        low, dense = grad.to(dtype), grad.to(form.dtype)
        torch.mm(low, b.to(dtype), out=grad_u).mul_(form.scale)
        if ctx.needs_input_grad[0] and form.low_bit is not None:
            part = form.low_bit.grad_input(grad, rows.dtype)
            grad_x = part if grad_x is None else grad_x.add_(part)
        elif ctx.needs_input_grad[0]:
            grad_x = _plus_product(grad_x, dense, dense_weight(weight, form.quant_state, form.dtype), rows.dtype)
        found += [
            (dense.t() @ rows.to(form.dtype)).to(weight.dtype) if wants_weight else None,
            dense.sum(0).to(bias.dtype) if wants_bias else None,
            None,
            (form.scale * (low.t() @ u)).to(b.dtype) if wants_b else None,
        ]
    stacked = torch.cat([a for _, _, a, _ in linears])
    if any(wants_a for _, _, wants_a, _ in needed):
        grad_stacked = (grad_inner.t() @ rows.to(dtype)).to(stacked.dtype)
        for index, part in enumerate(_split(grad_stacked, linears, dim=0)):
            if needed[index][2] and grads[index] is not None:
                found[4 * index + 2] = part
    if ctx.needs_input_grad[0]:
        grad_x = _plus_product(grad_x, grad_inner, stacked.to(dtype), rows.dtype).view(x.shape)
    return grad_x, None, None, *found


def _split(tensor: Tensor, linears: Sequence[tuple[Any, ...]], dim: int = -1) -> tuple[Tensor, ...]:
    return tensor.split([a.shape[0] for _, _, a, _ in linears], dim)


def _plus_product(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `total + left @ right` in `total`'s memory, without a temporary where the dtypes agree."""
    if total is None:
        return (left @ right).to(dtype)
    return total.addmm_(left, right) if left.dtype == dtype else total.add_(left @ right)


# --- PEFT layers ---------------------------------------------------------------------------------------------------


def _reject(name: str, reason: str) -> _LayerRefusedError:
    return _LayerRefusedError(f"LoRA kernels cannot compute {name}: {reason}")


def _check_layer(name: str, module: Any) -> None:
    """Refuse what is fixed when the adapters are made."""
    kind = type(module)
    if not kind.__module__.startswith("peft.tuners.lora.") or kind.__name__ not in ("Linear", "Linear4bit"):
        raise _reject(name, f"{kind.__module__}.{kind.__name__} is not PEFT's lora.Linear or lora.Linear4bit.")
    base = type(module.base_layer)
    if base is not nn.Linear and base.__name__ != "Linear4bit":
        raise _reject(name, f"its base layer is a {base.__name__}; torch.nn.Linear and bitsandbytes' Linear4bit work.")
    _read(name, module)


def _read(name: str, module: Any) -> LoRAWeights | None:
    """
    Return the weights as they are at this moment, or `None` where PEFT would compute the base layer only.

    Raises:
        RefusedError: several active adapters, a variant such as DoRA, dropout while training, a bias in the adapter,
            or hooks inside the layer.
    """
    adapters = active_adapters(module, functools.partial(_reject, name))
    if not adapters:
        return None
    if len(adapters) > 1:
        raise _reject(
            name, f"{len(adapters)} adapters are active ({', '.join(adapters)}). Activate one: set_adapter(name)."
        )
    if has_own_call(module.base_layer):
        raise _reject(name, "its base layer has hooks or a forward of its own, which would be skipped.")
    (adapter,) = adapters.values()
    base = module.base_layer
    if type(base) is nn.Linear:
        return LoRAWeights(base.weight, base.bias, *adapter)
    state = base.weight.quant_state
    return None if is_repacked(state) else LoRAWeights(base.weight, base.bias, *adapter, state, base.compute_dtype)


def _moment(x: Tensor) -> tuple[int | None, bool, torch.dtype | None]:
    """Return what a result depends on beside the tensor `x` itself: its version, the grad mode, and autocast."""
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return None if x.is_inference() else x._version, torch.is_grad_enabled(), autocast


class _Siblings:
    """
    Projections that share an input. The first one that is called computes all, the others take their result.

    A result is handed out for the very tensor that it was computed from, unchanged and in the same mode. What is left
    over when a recompute stops early is dropped at the next call.
    """

    def __init__(self, targets: Sequence[Target]) -> None:
        self.names = [target.name for target in targets]
        self.modules = [target.module for target in targets]
        self.originals = [target.original for target in targets]
        self.input: Tensor | None = None
        self.moment: Any = None
        self.waiting: dict[int, Tensor] = {}

    def run(self, index: int, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        mine = self.read(index, x)
        if mine is None or args or kwargs or torch.compiler.is_compiling():
            return self.originals[index](x, *args, **kwargs)
        return self.share(index, x, mine)

    def read(self, index: int, x: Tensor) -> LoRAWeights | None:
        """Return what is to be computed for `x`, or `None` where PEFT is to do it."""
        return _read(self.names[index], self.modules[index])

    def share(self, index: int, x: Tensor, mine: LoRAWeights) -> Tensor:
        """Return the output of one projection: the one that waits, or one that is computed with its siblings'."""
        if index in self.waiting:
            y = self.waiting.pop(index)
            shared = self.input is x and self.moment == _moment(x)
            self.input = self.input if self.waiting else None
            return y if shared else fused_lora(x, [mine])[0]
        read = {i: self.read(i, x) for i in range(len(self.modules))}
        present = {i: weights for i, weights in read.items() if weights is not None}
        self.waiting = dict(zip(present, fused_lora(x, list(present.values())), strict=True))
        y = self.waiting.pop(index)
        self.input, self.moment = x if self.waiting else None, _moment(x)
        return y


class FusedLoRALinear:
    """
    A value of [`~hf_effi.patch`] for the key `"LoRALinear"`: PEFT's linear LoRA layers, grouped by shared input.

    Reads the adapter at every call, so that `disable_adapter`, `merge_adapter` and `set_adapter` act as usual. rsLoRA
    works through its scale. Base layers are `torch.nn.Linear`, trained or frozen, or bitsandbytes' `Linear4bit`.
    Inside a compiled graph PEFT's own forward runs.

    Args:
        siblings (`Sequence[Sequence[str]]`, *optional*): Names of children of one module that are given the same
            input. Default: `(q_proj, k_proj, v_proj)` and `(gate_proj, up_proj)`.

    Raises:
        RefusedError: when applied or when called: several active adapters, DoRA and other variants, `lora_dropout > 0`
            while training, `lora_bias`, other base layers, hooks inside the layer.
        ValueError: `siblings` are no groups of names.

    Example:
    ```python
    with patch(peft_model, {"LoRALinear": FusedLoRALinear()}):
        trainer.train()
    ```
    """

    def __init__(self, siblings: Sequence[Sequence[str]] = SIBLINGS) -> None:
        if isinstance(siblings, str) or any(isinstance(group, str) for group in siblings):
            raise ValueError(f"siblings={siblings!r} must be groups of names, such as (('q_proj', 'k_proj'),).")
        self.siblings = tuple(tuple(group) for group in siblings)

    def units(self, targets: Sequence[Target]) -> list[Unit]:
        """Return one unit for each group of siblings among the targets."""
        groups: dict[tuple[str, Any], list[Target]] = {}
        for target in targets:
            self.check(target)
            parent, _, child = target.name.rpartition(".")
            group = next((group for group in self.siblings if child in group), child)
            groups.setdefault((parent, group), []).append(target)
        return [self.unit(group) for group in groups.values()]

    def check(self, target: Target) -> None:
        """Refuse a layer that this cannot compute."""
        _check_layer(target.name, target.module)

    def unit(self, targets: Sequence[Target]) -> Unit:
        """Return the unit of one group of siblings."""
        return _unit(targets, _Siblings(targets), "FusedLoRALinear")


def _unit(targets: Sequence[Target], siblings: _Siblings, label: str, **options: Any) -> Unit:
    runs = [functools.partial(siblings.run, index) for index in range(len(targets))]
    return Unit(
        targets,
        runs,
        original=_together(siblings.originals),
        replacement=_together(runs),
        modules=siblings.modules,
        label=f"{label} x{len(targets)}",
        **options,
    )


def _together(functions: Sequence[Callable[..., Tensor]]) -> Callable[..., tuple[Tensor, ...]]:
    return lambda x: tuple(function(x) for function in functions)
