"""
Caches that a forward fills outside of its instance: dictionaries of its class or file, and functions that remember.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor


class SharedCaches:
    """
    Take out what a probe put into caches that a class, or all models, share.

    A table of positions that is remembered by its length alone would stay in the dtype of the probe, and the next
    forward of the model would fail on it, or be slower. Dictionaries lose their new tensors; a function that remembers
    its results (`functools.lru_cache`) is asked to forget all of them where it has learned new ones.

    Args:
        spaces (`Iterable[Mapping]`): What the classes and files hold, by name.
    """

    def __init__(self, spaces: Iterable[Mapping[str, Any]]) -> None:
        spaces = list(spaces)
        self._dicts = {id(d): (d, d.copy()) for space in spaces for d in _of_type(space, dict)}
        self._functions = {id(f): (f, f.cache_info().misses) for space in spaces for f in _remembering(space)}

    def undo(self) -> None:
        """Put the caches back."""
        for held, was in self._dicts.values():
            new = [key for key, value in held.items() if value is not was.get(key) and _has_tensor(value)]
            for key in new:
                if key in was:
                    held[key] = was[key]
                else:
                    del held[key]
        for function, misses in self._functions.values():
            if function.cache_info().misses != misses:
                function.cache_clear()


def _of_type(space: Any, kind: type) -> list[Any]:
    return [value for name, value in list(space.items()) if not name.startswith("__") and type(value) is kind]


def _remembering(space: Any) -> Iterator[Any]:
    for value in list(space.values()):
        function = getattr(value, "__func__", value)  # a class holds static methods wrapped
        if callable(getattr(type(function), "cache_clear", None)) and hasattr(function, "cache_info"):
            yield function


def _has_tensor(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(map(_has_tensor, value))
    return isinstance(value, Tensor)
