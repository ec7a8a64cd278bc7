"""What `patch` takes as a value, and how each kind becomes something to call on one module."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from ..errors import RefusedError
from ._targets import ROTARY_FUNCTION, Target, calling, decorated, holds

#: Hugging Face's contract for a kernel layer: no state and no members of its own but these.
_CONTRACT = {"forward", "has_backward", "can_torch_compile"}


@dataclass(frozen=True, eq=False)
class Unit:
    """
    Replacements that are checked together and applied or left out together.

    Args:
        targets (`Sequence[Target]`): Where they go.
        replacements (`Sequence[Callable]`): What goes there, one a target.
        original, replacement (`Callable`): What the self-check compares.
        modules (`Sequence[nn.Module]`): Whose parameters these two use.
        label (`str`): Name of the layer for the report.
        has_backward (`bool`): Whether gradients are compared.
        input_of (`nn.Module`, *optional*): Whose input the self-check draws; `None`: the first target's.
        switch_off (`Callable`, *optional*): Makes the replacement compute the original. For one that others may wrap
            after the patch, as accelerate wraps a model's forward for mixed precision.
        install (`Callable`, *optional*): Called for each target once the self-check has passed; returns what undoes
            it.
        error_budget (`float`): Relative error, by the Frobenius norm, that outputs and gradients of inputs may have
            beyond rounding, for a replacement that approximates. Gradients of weights get none.
    """

    targets: Sequence[Target]
    replacements: Sequence[Callable[..., Any]]
    _: KW_ONLY
    original: Callable[..., Any]
    replacement: Callable[..., Any]
    modules: Sequence[nn.Module]
    label: str
    has_backward: bool = True
    input_of: nn.Module | None = None
    switch_off: Callable[[], None] | None = None
    install: Callable[[Target], Callable[[], None]] | None = None
    error_budget: float = 0.0


@runtime_checkable
class LayerGroup(Protocol):
    """A value of `patch` that treats several modules at once, such as the linear layers that share an input."""

    def units(self, targets: Sequence[Target]) -> list[Unit]:
        """Return the units for these targets; raise `RefusedError` for one that cannot be treated."""
        ...


def check_contract(layer: Any) -> type[nn.Module]:
    """
    Return `layer` if it satisfies Hugging Face's contract for kernel layers.

    Raises:
        ValueError: it is no `nn.Module` class, has a constructor, or has members besides `forward`, `has_backward` and
            `can_torch_compile`.
    """
    if not isinstance(layer, type) or not issubclass(layer, nn.Module):
        raise ValueError(
            f"{layer!r} is no kernel layer: give an nn.Module class without state, an object with `.load()` that "
            "returns one, 'liger', or 'organisation/repository:Layer'."
        )
    if layer.__init__ is not nn.Module.__init__:
        raise ValueError(
            f"{layer.__name__} has a constructor. A kernel layer is stateless: its forward reads the weights and "
            "settings of the module that it replaces from `self`."
        )
    own = {name for base in layer.__mro__ if base not in nn.Module.__mro__ for name in vars(base)}
    if extra := sorted(name for name in own - _CONTRACT if not name.startswith("__")):
        raise ValueError(
            f"{layer.__name__} has members that a kernel layer may not have: {', '.join(extra)}. Move them to module "
            "level: the replaced module has its own members under `self`."
        )
    if layer.forward is nn.Module.forward:
        raise ValueError(f"{layer.__name__} has no forward.")
    return layer


def _flags(layer: type[nn.Module]) -> tuple[bool, bool]:
    return getattr(layer, "has_backward", True), getattr(layer, "can_torch_compile", False)


def _guarded(run: Callable[..., Any], original: Callable[..., Any], layer: type[nn.Module]) -> Callable[..., Any]:
    """Call `original` where the layer says that it does not work: with gradients, or inside a compiled graph."""
    has_backward, can_compile = _flags(layer)
    if has_backward and can_compile:
        return run

    def guarded(*args: Any, **kwargs: Any) -> Any:
        if (not has_backward and torch.is_grad_enabled()) or (not can_compile and torch.compiler.is_compiling()):
            return original(*args, **kwargs)
        return run(*args, **kwargs)

    return guarded


def _unbound(function: Callable[..., Any], module: nn.Module) -> Callable[..., Any]:
    """Return a function of `(module, ...)`, so that a deep copy of the model calls it on its own module."""
    if isinstance(function, types.MethodType) and function.__self__ is module:
        return function.__func__

    def call(_: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return call


def with_globals(function: Callable[..., Any], **changed: Any) -> Callable[..., Any]:
    """
    Return a copy of `function` that sees other values for some globals of its module.

    The copy changes one instance, where an assignment to the global would change every model of the process.
    Decorators that hold what they wrap in their closure are copied around it.
    """
    inner = decorated(function)
    names, closure = function.__globals__, function.__closure__
    if inner is not None:
        copied = with_globals(inner, **changed)
        closure = tuple(types.CellType(copied) if holds(cell, inner) else cell for cell in closure)
    if inner is None or changed.keys() & set(function.__code__.co_names):
        names = {**names, **changed}
        del names["__name__"]  # by this name the compiler would look the function up in its module again
    copy = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, closure)
    copy.__kwdefaults__, copy.__module__ = function.__kwdefaults__, function.__module__
    if inner is not None:  # the names of the arguments are read off it
        copy.__wrapped__ = copied
    return copy


def _with_rotary(target: Target, rotary: Callable[..., Any]) -> Callable[..., Any]:
    """Return the attention's own forward with another rotary function, which is a global of the modeling file."""
    forward = _unbound(target.original, target.module)
    if calling(forward, ROTARY_FUNCTION) is None:
        raise RefusedError(
            f"{target.name} ({type(target.module).__name__}): its forward does not call `{ROTARY_FUNCTION}` itself, "
            "or under a decorator that cannot be copied, so its rotary embedding cannot be replaced."
        )
    return with_globals(forward, **{ROTARY_FUNCTION: rotary})


def layer_unit(layer: type[nn.Module], target: Target) -> Unit:
    """Return the unit that puts one kernel layer into one place."""
    about: dict[str, Any] = {"label": layer.__name__, "has_backward": _flags(layer)[0]}
    if target.kind == "module":
        run = _guarded(layer.forward, _unbound(target.original, target.module), layer)
        replacement = types.MethodType(run, target.module)
        return Unit(
            (target,),
            (replacement,),
            original=target.original,
            replacement=replacement,
            modules=(target.module,),
            **about,
        )
    function = layer().forward
    if target.kind == "loss":
        run = _guarded(function, target.original, layer)
        return Unit((target,), (run,), original=target.original, replacement=run, modules=(), **about)
    forward = _unbound(target.original, target.module)
    calls = calling(forward, ROTARY_FUNCTION)
    original = None if calls is None else calls.__globals__.get(ROTARY_FUNCTION)
    run = _guarded(function, original, layer)
    installed = types.MethodType(_with_rotary(target, run), target.module)
    return Unit((target,), (installed,), original=original, replacement=run, modules=(), **about)
