"""What the package offers by name: the top, and the faces of its rooms."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import hf_effi

#: packages with a face, without the top
ROOMS = (*(f"hf_effi.{room}" for room in hf_effi._ROOMS if room != "methods"), "hf_effi.trainers.mixins")


@functools.cache
def public_objects() -> dict[str, Any]:
    """Return `{name: object}` of every public name; one that two faces have is one object."""
    found: dict[str, Any] = {name: getattr(hf_effi, name) for name in hf_effi.__all__}
    for room in (*ROOMS, "hf_effi.functional.rollouts"):
        module = importlib.import_module(room)
        for name in module.__all__:
            value = getattr(module, name)
            if found.setdefault(name, value) is not value:
                raise TypeError(f"{room}.{name} is another object than {name} of another face")
    return found
