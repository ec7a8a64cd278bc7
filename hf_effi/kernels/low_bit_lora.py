"""
LoRA on a frozen base of 8 bits: [`hf_effi.kernels.fused_lora`] with the products of [`hf_effi.kernels.low_bit`].

While a layer is patched its wide weight lies in host memory, and the device holds one byte per parameter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ._layers import Unit
from ._targets import Target
from ._verify import _LayerRefusedError
from .fused_lora import SIBLINGS, FusedLoRALinear, LoRAWeights, _check_layer, _read, _Siblings, _unit
from .low_bit import FORMATS, LowBitWeight, check_device

_HEAD = "lm_head"
#: a method by which a layer of PEFT may say how it is unloaded
_UNLOAD = "unload_and_optionally_merge_module"
_TRAINED = (
    "its base weight is trained, and 8 bits take no updates. Freeze it (requires_grad=False), or use FusedLoRALinear."
)
_TAKEN_OVER = (
    "its base weight, which is empty while patched, was replaced since, as FSDP does when it shards a model: the wide "
    "weight could not come back. Use DDP or ZeRO-2 (8 bits need no shards), or FusedLoRALinear."
)


def _reject(name: str, reason: str) -> _LayerRefusedError:
    return _LayerRefusedError(f"LowBitLoRALinear cannot compute {name}: {reason}")


class _Base:
    """The base layer of one LoRA layer, whose wide weight is in host memory between `release` and `restore`."""

    def __init__(self, name: str, module: Any, format: str) -> None:
        self.name, self.module, self.format = name, module, format
        self.wide: Tensor | None = None
        self.emptied: nn.Parameter | None = None
        self.low: LowBitWeight | None = None
        self._hooks: list[Any] = []

    def weight_for(self, device: torch.device) -> LowBitWeight:
        """Return the 8-bit weight on the device of the input, to which the model may have been moved since."""
        if self.module.base_layer.weight.requires_grad:
            raise _reject(self.name, _TRAINED)
        if self.low is None:  # during the self-check, which brings its own wide weights
            return LowBitWeight.of(self.module.base_layer.weight, self.format)
        if self.module.base_layer.weight is not self.emptied:
            raise _reject(self.name, _TAKEN_OVER)
        self.low = self.low.to(device)
        return self.low

    def release(self) -> Callable[[], None]:
        """Keep 8 bits on the device and the wide weight in host memory; return what undoes it."""
        layer = self.module.base_layer
        low, most = LowBitWeight.of(layer.weight, self.format), FORMATS[self.format].error_budget
        lost = low.relative_error(layer.weight)
        if not lost <= most:  # also of NaN
            raise _reject(
                self.name,
                f"its weight is off by {lost:.1%} in {self.format}, and {most:.0%} are allowed: a few entries of a "
                "row are far larger than the others. Leave this layer out by a narrower key, or try the other format.",
            )
        self.low, self.wide = low, layer.weight.detach().to("cpu")
        self.emptied = layer.weight
        layer.weight.data = layer.weight.new_empty(0)
        self._hooks = [
            layer.register_state_dict_post_hook(functools.partial(_put_wide, self)),
            layer.register_load_state_dict_pre_hook(functools.partial(_refuse_load, self)),
        ]
        self.module.__dict__["merge"] = functools.partial(_refuse_merge, self.name)
        self.module.__dict__[_UNLOAD] = functools.partial(_unload, self)
        return self.restore

    def restore(self) -> None:
        """Put the wide weight back, on the device and in the dtype that the parameter has by now."""
        if self.wide is None:
            return  # by `unload()`
        weight = self.emptied
        weight.data = self.wide.to(weight.device, weight.dtype)
        self.low = self.wide = self.emptied = None
        for hook in self._hooks:
            hook.remove()
        for name in ("merge", _UNLOAD):
            del self.module.__dict__[name]


def _put_wide(base: _Base, layer: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    state[f"{prefix}weight"] = base.wide


def _refuse_load(base: _Base, layer: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    if f"{prefix}weight" in state:
        raise _LayerRefusedError(
            f"{prefix}weight cannot be loaded into a base of 8 bits. Revert the patch, load, and patch again."
        )


def _refuse_merge(name: str, *args: Any, **kwargs: Any) -> None:
    raise _reject(name, "an adapter cannot be merged into a base of 8 bits. Revert the patch, then merge.")


def _unload(base: _Base, merge: bool, **kwargs: Any) -> nn.Module:
    """What PEFT asks a layer to do when it takes the adapters off: the base layer goes out with its wide weight."""
    if merge:
        _refuse_merge(base.name)
    base.restore()
    return base.module.get_base_layer()


class _LowBitSiblings(_Siblings):
    """Projections that share an input, which is rounded once for all of them."""

    def __init__(self, targets: Sequence[Target], format: str) -> None:
        super().__init__(targets)
        self.bases = [_Base(target.name, target.module, format) for target in targets]

    @torch.compiler.disable
    def run(self, index: int, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs:
            raise _reject(self.names[index], f"its caller passes {[*args, *kwargs]}, such as adapters chosen by row.")
        return self.share(index, x, self.read(index, x))

    def read(self, index: int, x: Tensor) -> LoRAWeights:
        """Return the adapter with the 8-bit base; one of rank 0 where PEFT would compute the base layer only."""
        module, low = self.modules[index], self.bases[index].weight_for(x.device)
        found = _read(self.names[index], module)
        if found is not None:
            return found._replace(weight=None, low_bit=low)
        size_out, size_in = low.rows.values.shape
        a, b = x.new_empty(0, size_in), x.new_empty(size_out, 0)
        return LoRAWeights(None, module.base_layer.bias, a, b, 1.0, low_bit=low)

    def install(self, target: Target) -> Callable[[], None]:
        return next(base for base in self.bases if base.module is target.module).release()


class LowBitLoRALinear(FusedLoRALinear):
    """
    A value of [`~hf_effi.patch`] for the key `"LoRALinear"`: PEFT's linear LoRA layers on a frozen base of 8 bits.

    `y = round(x) round(W)^T + s B (A x)`, `dx = round(dy s_w) W_q + s A^T B^T dy`: weights are rounded once, when
    patched, inputs and gradients at every product, each row with its own scale. Adapters stay as they are. On a CPU
    the same 8-bit values are multiplied in fp32 (FP8) or as integers (INT8).

    The wide weight waits in host memory until the patch is reverted, and comes back to the bit. Meanwhile the
    parameter is empty, `state_dict()` gives the wide weight, and adapters are saved as always. With the adapter
    disabled the 8-bit base runs: a reference model is then the one that training started from. `model.unload()` gives
    the wide base back. The output head (`lm_head`) is left as it is.

    Args:
        format (`str`): `"fp8"`: e4m3 on Hopper and B200. `"int8"`: from compute capability 7.5.
        siblings (`Sequence[Sequence[str]]`, *optional*): As in [`~hf_effi.kernels.FusedLoRALinear`].

    Raises:
        RefusedError: when applied or when called: a base that is trained, merged, sharded or no `torch.nn.Linear`;
            sizes that are no multiple of 16 (FP8) or 8 (INT8); a weight that 8 bits change too much; a GPU without the
            format; several active adapters, DoRA and other variants, `lora_dropout > 0` while training, `lora_bias`,
            hooks inside the layer. `merge_adapter` and loading of base weights while patched.
        ValueError: an unknown `format`.

    Example:
    ```python
    with patch(peft_model, {"LoRALinear": LowBitLoRALinear("fp8")}):
        trainer.train()
    ```
    """

    def __init__(self, format: str, siblings: Sequence[Sequence[str]] = SIBLINGS) -> None:
        if format not in FORMATS:
            raise ValueError(f"format={format!r} must be one of {', '.join(map(repr, FORMATS))}.")
        super().__init__(siblings)
        self.format = format

    def units(self, targets: Sequence[Target]) -> list[Unit]:
        """Return one unit for each group of siblings among the targets, without the output head."""
        inner = [target for target in targets if target.name.rpartition(".")[2] != _HEAD]
        if not inner:
            raise _LayerRefusedError(
                f"LowBitLoRALinear leaves the output head as it is, and {targets[0].name} is all there is."
            )
        return super().units(inner)

    def check(self, target: Target) -> None:
        """Refuse a layer that this cannot compute."""
        name, module, multiple = target.name, target.module, FORMATS[self.format].multiple
        base = getattr(module, "base_layer", None)
        if base is not None and type(base) is not nn.Linear:
            raise _reject(name, f"its base layer is a {type(base).__name__}; torch.nn.Linear works.")
        _check_layer(name, module)
        weight = base.weight
        if module.merged:
            raise _reject(name, "an adapter is merged into its base. Call unmerge_adapter() first.")
        if weight.requires_grad:
            raise _reject(name, _TRAINED)
        if type(weight.data) is not Tensor or not weight.is_floating_point() or weight.element_size() < 2:
            raise _reject(
                name, f"its weight is a {type(weight.data).__name__} of {weight.dtype}; 16 bits or more work."
            )
        if weight.is_meta or not weight.numel():
            raise _reject(name, "its weight is sharded or offloaded. Patch before the model is wrapped.")
        if any(size % multiple for size in weight.shape):
            raise _reject(name, f"its sizes {tuple(weight.shape)} must be multiples of {multiple} for {self.format}.")
        check_device(self.format, weight.device)

    def unit(self, targets: Sequence[Target]) -> Unit:
        """Return the unit of one group of siblings."""
        siblings = _LowBitSiblings(targets, self.format)
        budget = FORMATS[self.format].error_budget
        label = f"LowBitLoRALinear {self.format}"
        return _unit(targets, siblings, label, install=siblings.install, error_budget=budget)
