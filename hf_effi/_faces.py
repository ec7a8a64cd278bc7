"""The face of a room: public names that are loaded on first use, so that a room costs what is taken from it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any


def face(
    module: str,
    table: Mapping[str, str],
    rooms: Collection[str] = (),
    elsewhere: Callable[[str], str] | None = None,
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """
    Return `__getattr__`, `__dir__` and `__all__` of a package whose names are loaded on first use.

    Args:
        module (`str`): `__name__` of the package.
        table (`Mapping[str, str]`): Public name -> the module that defines it, dotted.
        rooms (`Collection[str]`, *optional*): Packages below this one that are loaded on first use too.
        elsewhere (`Callable`, *optional*): Gets a name that is not in the table; returns where it is, for the message.
    """
    space = vars(sys.modules[module])
    names = sorted(table)

    def load(name: str) -> Any:
        if name in rooms:
            return importlib.import_module(f"{module}.{name}")
        if name not in table:
            where = elsewhere(name) if elsewhere and not name.startswith("_") else ""
            raise AttributeError(
                f"module {module!r} has no attribute {name!r}. {where or 'Public names: ' + ', '.join(names) + '.'}"
            )
        value = getattr(importlib.import_module(table[name]), name)
        space[name] = value
        return value

    return load, lambda: sorted({*space, *names, *rooms}), names
