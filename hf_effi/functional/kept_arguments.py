"""What an object was made with, remembered so that a card or recipe can hold it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, TypeVar

_Params = ParamSpec("_Params")
_Self = TypeVar("_Self")

#: longest list, and most values of one argument, that a card holds; longer ones are not remembered either
LARGEST_LIST, MOST_VALUES = 256, 4096
_RECORD = "_made_with"
_NUMBERS = (int, float)


@dataclass(frozen=True)
class NotKept:
    """Stands for an argument that was not remembered; `reason` says what it is and what the limit is."""

    reason: str


class _TooLarge(Exception):
    pass


def keeps_arguments(init: Callable[Concatenate[_Self, _Params], None]) -> Callable[Concatenate[_Self, _Params], None]:
    """
    Decorate an `__init__`: the object remembers the arguments of its constructor, for [`arguments_of`].

    Lists, tuples, mappings, tensors and arrays are copied where they are small (`LARGEST_LIST` in each, `MOST_VALUES`
    in all), so that a later change of them does not count, and named by a [`NotKept`] where they are not, so that
    nothing large stays alive. Iterators are not touched. Other objects are kept as they are.

    The record is an attribute like others: copies and pickles have it. A subclass with an `__init__` of its own has
    other arguments, and a record only if that is decorated too.

    Raises:
        TypeError: the constructor takes arguments that have no name.

    Example:
    ```python
    >>> class Steps:
    ...     @keeps_arguments
    ...     def __init__(self, count, **options): ...
    >>> arguments_of(Steps(3, start=0.5))
    {'count': 3, 'start': 0.5}
    ```
    """
    signature = inspect.signature(init)
    kinds = {parameter.kind for parameter in list(signature.parameters.values())[1:]}
    if kinds & {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL}:
        raise TypeError(f"{init.__qualname__} takes arguments without a name, and they could not be given back by it.")
    of_rest = next((name for name, p in signature.parameters.items() if p.kind is p.VAR_KEYWORD), "")

    @functools.wraps(init)
    def remember(self: _Self, *args: _Params.args, **kwargs: _Params.kwargs) -> None:
        # Called by a subclass, it would see what the subclass passes on and not what its user gave.
        if type(self).__init__ is remember:
            try:
                given = dict(list(signature.bind(self, *args, **kwargs).arguments.items())[1:])
            except TypeError:
                pass  # `init` says it better
            else:
                given |= given.pop(of_rest, {})
                setattr(self, _RECORD, {name: _kept(value) for name, value in given.items()})
        init(self, *args, **kwargs)

    return remember


def arguments_of(thing: Any) -> dict[str, Any] | None:
    """
    Return the arguments that an object was made with, by name and without those that were left at their defaults.

    A number, flag or word that the object keeps under the same name counts as it is now.

    Returns:
        `dict` or `None`: `None` where its class does not remember them. See [`keeps_arguments`].
    """
    record = getattr(thing, _RECORD, None)
    if record is None:
        return None
    return {name: _now(value, getattr(thing, name, value)) for name, value in record.items()}


def _now(given: Any, current: Any) -> Any:
    same_kind = type(given) is type(current) or (type(given) in _NUMBERS and type(current) in _NUMBERS)
    return current if same_kind and isinstance(given, (bool, str, *_NUMBERS)) else given


def _kept(value: Any) -> Any:
    try:
        return _copied(value, [MOST_VALUES])
    except _TooLarge as error:
        return NotKept(str(error))
    except Exception as error:  # remembering only looks on: what is wrong with the value is for the constructor to say
        return NotKept(f"a {type(value).__name__} that could not be read ({type(error).__name__})")


def _copied(value: Any, left: list[int]) -> Any:
    left[0] -= 1
    if left[0] < 0:
        raise _TooLarge(f"more than {MOST_VALUES:,} values, the most that a card holds in one argument")
    if hasattr(value, "tolist") and hasattr(value, "ndim"):  # tensors, arrays and their numbers
        if value.ndim > 1:
            raise _TooLarge(f"a {type(value).__name__} of shape {tuple(value.shape)}, and a card holds lists")
        if value.ndim == 1:
            _check_length(value)
        return value.tolist()
    if isinstance(value, Mapping):
        _check_length(value)
        return {key: _copied(inner, left) for key, inner in value.items()}
    if isinstance(value, (set, frozenset)):
        _check_length(value)
        return frozenset(value)
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray)):
        _check_length(value)
        items = [_copied(item, left) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    return value


def _check_length(value: Any) -> None:
    if len(value) > LARGEST_LIST:
        raise _TooLarge(
            f"{len(value):,} values ({type(value).__name__}), and a card holds at most {LARGEST_LIST} in a list"
        )
