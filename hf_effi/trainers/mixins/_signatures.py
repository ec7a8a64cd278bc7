"""The signatures of the Effi trainers: those of their stock trainer, and ours behind them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

Cls = TypeVar("Cls", bound=type)
_MARK = "_hf_effi_passes_on"


def with_signatures_of(stock: type) -> Callable[[Cls], Cls]:
    """
    Decorate a trainer class: what `inspect.signature` says of its methods is what it says of `stock`'s, plus our
    arguments.

    Our mixins take `*args, **kwargs` and pass them on, so that nothing of a signature is copied from upstream. But
    `"processing_class" in inspect.signature(SomeTrainer.__init__).parameters` is how projects tell versions of
    transformers apart, and editors and documentation read signatures too. Each public method that a mixin overrides
    gets the parameters of the installed `stock`, with the same names, order, kinds and defaults; ours follow by
    keyword only.
    """

    def decorate(cls: Cls) -> Cls:
        for name in overridden(cls, stock):
            signature = merged_signature(cls, stock, name)
            own = cls.__dict__.get(name)
            method = _passing_on(cls, name) if own is None else own
            method.__signature__ = signature
            setattr(cls, name, method)
        return cls

    return decorate


def overridden(cls: type, stock: type) -> list[str]:
    """Return the public methods of `stock`, and `__init__`, that `cls` or a class between the two overrides."""
    between = cls.__mro__[: cls.__mro__.index(stock)]
    return [
        name
        for name in dir(stock)
        if (name == "__init__" or not name.startswith("_"))
        and inspect.isfunction(inspect.getattr_static(stock, name))
        and any(name in base.__dict__ for base in between)
    ]


def merged_signature(cls: type, stock: type, name: str) -> inspect.Signature:
    """Return the signature of `stock`'s method with the arguments that classes before it add, by keyword only."""
    signature = inspect.signature(getattr(stock, name))
    parameters = list(signature.parameters.values())
    known = set(signature.parameters)
    added: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__[: cls.__mro__.index(stock)]:
        if (function := base.__dict__.get(name)) is None:
            continue
        for parameter in inspect.signature(function).parameters.values():
            named = parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
            if named and parameter.default is not parameter.empty and parameter.name not in known:
                added.setdefault(parameter.name, parameter.replace(kind=parameter.KEYWORD_ONLY))
    rest = [parameter for parameter in parameters if parameter.kind is parameter.VAR_KEYWORD]
    return signature.replace(parameters=[*(p for p in parameters if p not in rest), *added.values(), *rest])


def _passing_on(cls: type, name: str) -> Callable[..., Any]:
    """Return a method that only passes on: a signature of its own needs a function of its own."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(super(cls, self), name)(*args, **kwargs)

    method.__name__, method.__qualname__, method.__module__ = name, f"{cls.__qualname__}.{name}", cls.__module__
    method.__doc__ = getattr(cls, name).__doc__
    setattr(method, _MARK, True)
    return method


def only_passes_on(method: Any) -> bool:
    """
    Return whether a method was made here, for its signature: whoever looks for who overrides something goes on
    looking.
    """
    return getattr(method, _MARK, False)
