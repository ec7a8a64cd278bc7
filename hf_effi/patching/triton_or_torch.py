"""Which implementation of an op runs: Triton on a GPU and in triton's interpreter, torch elsewhere."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

from torch import Tensor

from .._compat import is_available


def triton_ops(module: str, tensor: Tensor) -> ModuleType | None:
    """
    Return the module of Triton ops with this dotted name if Triton computes this tensor, else `None`.

    Triton's statistics are fp32: double precision, as tests use, stays with torch.
    """
    on_device = tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    if not on_device or tensor.element_size() > 4 or not is_available("triton"):
        return None
    return importlib.import_module(module)
