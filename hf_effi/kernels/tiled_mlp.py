"""TiledMLP: a gated MLP computed in tiles of tokens, so that its wide activations exist for one tile at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..errors import RefusedError
from ..functional.sequence import tile_rows
from ..patching import Results, compare, gradients, sharded_by_zero3
from ..patching.handle import PatchHandle, check_free
from ._gated_mlp import GatedMLP, Keep, Linear, TiledFunction
from ._layers import Unit
from ._peft_layers import active_adapters, has_own_call, is_repacked
from ._targets import GATED_NAMES, Target, kernel_name
from .gated_product import ACTIVATIONS

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_CAST_BY_AUTOCAST = (torch.float32, torch.float16, torch.bfloat16)


def tile_mlp(model: nn.Module, num_shards: int | None = None) -> PatchHandle:
    """
    Compute every gated MLP of a model in tiles of tokens: the same output and gradients, for a fraction of the memory.

    `down(act(gate(x)) * up(x))` acts on each token alone, so that it may run over `num_shards` tiles one after
    another; the backward does a tile's forward again instead of keeping `8 I` bytes per token (bf16, `I` the
    intermediate size). Under non-reentrant activation checkpointing this costs no further matrix product.
    ALST, https://arxiv.org/abs/2506.13996.

    Args:
        model (`torch.nn.Module`): Model whose MLPs have `gate_proj`, `up_proj`, `down_proj` and `act_fn` (Llama,
            Mistral, Qwen, Gemma, ...); plain or wrapped by PEFT, before or after. Only instances are changed.
        num_shards (`int`, *optional*): Tiles of a call, at least 1. Default: `ceil(tokens / hidden_size)`, so that a
            tile is about square.

    Returns:
        [`PatchHandle`]: `handle.revert()`, or the end of a `with` block, undoes it.

    Raises:
        ValueError: a bad `num_shards`.
        RefusedError: no such MLP, an MLP with another formula or activation; at the call, a
            projection that is no plain, 4-bit or LoRA linear layer (DoRA, LoRA dropout, 8-bit), or whose weights only
            its own hooks bring together (ZeRO-3, FSDP around single linear layers).

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
        raise RefusedError(
            f"{type(model).__name__} has no gated MLP: none of its modules has {', '.join(_PROJECTIONS)} and act_fn."
        )
    for name, module in found.items():
        check_free(f"{name}.forward", module)
    forwards = {name: tiled_forward(name, module, num_shards) for name, module in found.items()}
    checked: set[Any] = set()
    for name, module in found.items():
        if (kind := _kind(module)) not in checked and not _is_sharded(module):
            _check_formula(name, module, forwards[name])
            checked.add(kind)
    handle = PatchHandle("tile_mlp")
    for name, module in found.items():
        forward = forwards[name]
        if _kind(module) not in checked:  # whose weights come together at its call
            forward = _CheckedAtFirst(name, forward, checked)
        handle.replace(name, module, "forward", MethodType(forward, module))
    return handle


class TiledMLP:
    """
    A value of [`~hf_effi.patch`] for gated MLPs: what [`~hf_effi.kernels.tile_mlp`] does, under the handle of `patch`.

    Args:
        num_shards (`int`, *optional*): As in [`~hf_effi.kernels.tile_mlp`].

    Raises:
        ValueError: a bad `num_shards`.
        RefusedError: when applied: a module that is no gated MLP.

    Example:
    ```python
    with patch(model, {"SwiGLUMLP": TiledMLP(num_shards=8), "RMSNorm": "liger"}):
        trainer.train()
    ```
    """

    def __init__(self, num_shards: int | None = None) -> None:
        check_num_shards(num_shards)
        self.num_shards = num_shards

    def units(self, targets: Sequence[Target]) -> list[Unit]:
        """Return one unit a target."""
        return [self._unit(target) for target in targets]

    def _unit(self, target: Target) -> Unit:
        if kernel_name(target.module) not in GATED_NAMES:
            raise RefusedError(
                f"TiledMLP cannot compute {target.name}: {type(target.module).__name__} is none of "
                f"{', '.join(GATED_NAMES)}."
            )
        forward = MethodType(tiled_forward(target.name, target.module, self.num_shards), target.module)
        return Unit(
            (target,),
            (forward,),
            original=target.original,
            replacement=forward,
            modules=(target.module,),
            label="TiledMLP",
        )


def check_num_shards(num_shards: int | None) -> None:
    """Raise `ValueError` unless `num_shards` is `None` or an integer of at least 1."""
    if num_shards is not None and (not isinstance(num_shards, int) or isinstance(num_shards, bool) or num_shards < 1):
        raise ValueError(
            f"num_shards={num_shards!r} must be an integer of at least 1, or None for tokens / hidden_size."
        )


def tiled_forward(name: str, module: nn.Module, num_shards: int | None = None) -> Callable[..., Tensor]:
    """Return a function of a gated MLP and its input that computes it in tiles; `name` is for the errors."""
    return functools.partial(_tiled_forward, activation=_activation_of(name, module), num_shards=num_shards)


@torch.compiler.disable(reason="the backward reads tensors that another node saved")
def _tiled_forward(module: nn.Module, x: Tensor, *, activation: str, num_shards: int | None) -> Tensor:
    parts = [_read_projection(getattr(module, name), name) for name in _PROJECTIONS]
    linears, tensors = [linear for linear, _ in parts], [tensor for _, own in parts for tensor in own]
    # bitsandbytes returns the dtype of its input, a plain linear layer what autocast makes of it.
    out_dtype = None if linears[-1].quant_state is None else x.dtype
    if torch.is_autocast_enabled(x.device.type):
        # As `F.linear` would cast them; inside the Function each tile would cast the weights again.
        dtype = torch.get_autocast_dtype(x.device.type)
        x, *tensors = (t.to(dtype) if t.dtype in _CAST_BY_AUTOCAST else t for t in (x, *tensors))
    else:
        x = x.to(next((linear.compute_dtype for linear in linears if linear.compute_dtype), x.dtype))
    tokens = x.reshape(-1, x.shape[-1])
    mlp = GatedMLP(*linears, activation, tile_rows(tokens.shape[0], tokens.shape[1], num_shards))
    kept = Keep.apply(tokens, *tensors) if torch.is_grad_enabled() else tokens
    if kept.grad_fn is None:
        out = mlp.forward(tokens, tensors)
    else:
        out = TiledFunction.apply(kept, kept.grad_fn, mlp, *tensors)
    return out.view(*x.shape[:-1], out.shape[-1]).to(out_dtype or out.dtype)


def _read_projection(module: Any, name: str) -> tuple[Linear, list[Tensor]]:
    """Return a projection's form and tensors as they are at this moment: adapters may be switched at any time."""
    if not hasattr(module, "lora_A"):
        return _read_linear(module, name)
    _check_bare(module, name)
    if module.merged and module.disable_adapters:
        module.unmerge()  # as PEFT's own forward does
    base, tensors = _read_linear(module.base_layer, name)
    adapters = active_adapters(module, lambda reason: RefusedError(f"TiledMLP: {name}: {reason}")).values()
    pairs = [tensor for adapter in adapters for tensor in (adapter.a, adapter.b)]
    return replace(base, scales=tuple(adapter.scale for adapter in adapters)), tensors + pairs


def _read_linear(module: Any, name: str) -> tuple[Linear, list[Tensor]]:
    _check_bare(module, name)
    bias = [] if getattr(module, "bias", None) is None else [module.bias]
    if type(module) is nn.Linear:
        return Linear(bool(bias)), [module.weight, *bias]
    if type(module).__name__ != "Linear4bit":
        raise RefusedError(
            f"TiledMLP: {name} is a {type(module).__name__}, not a torch.nn.Linear or bitsandbytes' Linear4bit. "
            "stream_layers can run it; or pass the part of the model whose MLPs are plain, such as "
            "model.model.language_model."
        )
    state, dtype = module.weight.quant_state, module.compute_dtype
    if is_repacked(state):
        raise RefusedError(
            f"TiledMLP: {name} was repacked for inference on a CPU, which only bitsandbytes itself can read. "
            "model.state_dict() packs it as before."
        )
    return Linear(bool(bias), (), state, dtype), [module.weight, *(b.to(dtype or b.dtype) for b in bias)]


def _check_bare(module: nn.Module, name: str) -> None:
    """The tiles read the weights and never call the projection: hooks on it would be lost."""
    if has_own_call(module):
        raise RefusedError(
            f"TiledMLP: {name} has hooks of its own (ZeRO-3: use ZeRO-2; FSDP around a single layer, an accelerate "
            "hook or a patch), which the tiles would pass by. Shard whole decoder layers, or leave tile_mlp out."
        )


def _activation_of(name: str, module: Any) -> str:
    grid = torch.linspace(-6, 6, 49)
    for key, activation in ACTIVATIONS.items():
        if torch.allclose(module.act_fn(grid), activation.forward(grid), rtol=0, atol=1e-5):
            return key
    raise RefusedError(
        f"TiledMLP: the activation of {name} ({type(module.act_fn).__name__}) is none of {', '.join(ACTIVATIONS)}."
    )


def _kind(module: nn.Module) -> Any:
    """Return what the computation of an MLP depends on: modules that have it in common are checked once."""
    settings = [
        (
            name,
            sorted(
                (k, str(v))
                for k, v in vars(part).items()
                if isinstance(v, (bool, int, float, str)) and k != "training"
            ),
        )
        for name, part in module.named_modules()
    ]
    hooks = [(name, len(part._forward_hooks), len(part._forward_pre_hooks)) for name, part in module.named_modules()]
    return type(module), repr(module), str(settings), str(hooks)


def _is_sharded(module: nn.Module) -> bool:
    weights = list(module.parameters())
    return sharded_by_zero3(weights) or any(isinstance(p, DTensor) or p.is_meta or not p.numel() for p in weights)


class _CheckedAtFirst:
    """A tiled forward of a module whose weights are sharded: compared with the module's own at the first call."""

    def __init__(self, name: str, forward: Callable[..., Tensor], checked: set[Any]) -> None:
        self.name, self.forward, self.checked = name, forward, checked

    def __call__(self, module: nn.Module, x: Tensor) -> Tensor:
        if (kind := _kind(module)) not in self.checked:
            _check_formula(self.name, module, self.forward)
            self.checked.add(kind)
        return self.forward(module, x)


def _check_formula(name: str, module: nn.Module, forward: Callable[..., Tensor]) -> None:
    """
    Compare output and gradients on a few tokens, in both modes: a class may have the names of a gated MLP and scale,
    clip or drop on top, and models are loaded in evaluation mode.
    """
    for part in _PROJECTIONS:
        _read_projection(getattr(module, part), f"{name}.{part}")
    base = getattr(module.gate_proj, "base_layer", module.gate_proj)
    weight = base.weight
    size = getattr(base, "in_features", weight.shape[-1])
    places = torch.linspace(-1, 1, 3 * size, device=weight.device).view(3, size)

    def run(module: nn.Module, compute: Callable[..., Tensor]) -> Results:
        x = places.to(_input_dtype(base), copy=True).requires_grad_()  # a leaf of this run alone
        out = compute(module, x)
        found = {"the output": out, **gradients(module, out, also=[x])}
        return found if x.grad is None else {**found, "the gradient of the input": x.grad}

    own = functools.partial(run, compute=type(module).forward)
    tiled = functools.partial(run, compute=forward)
    for training in (True, False):
        # Dropout drops everything at the low end, which tiles would not.
        found = compare(module, own, tiled, level="low", training=training)
        if not found.equal:
            mode = "in training" if training else "in evaluation"
            raise RefusedError(
                f"TiledMLP: {name} ({type(module).__name__}) does not compute down(act(gate(x)) * up(x)) {mode}: "
                f"{found}."
            )


def _input_dtype(base: nn.Module) -> torch.dtype:
    if base.weight.is_floating_point():
        return base.weight.dtype
    return getattr(base, "compute_dtype", None) or torch.float32
