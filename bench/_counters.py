"""Exact counts of what a computation costs, which do not depend on the machine: matrix products and live bytes."""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class GemmCounter(TorchDispatchMode):
    """Counts the multiply-adds of all matrix products inside the `with` block, in place variants included."""

    def __init__(self) -> None:
        super().__init__()
        self.multiply_adds = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._overloadpacket.__name__
        if name in ("mm", "bmm"):
            self.multiply_adds += args[0].numel() * args[1].shape[-1]
        elif name in ("addmm", "addmm_"):
            self.multiply_adds += args[1].numel() * args[2].shape[-1]
        return func(*args, **(kwargs or {}))


class LiveBytes(TorchDispatchMode):
    """
    Follows the tensors that are created inside the `with` block, in a recompute too, and frees them as they die.

    Attributes:
        now, peak (`int`): Bytes alive at this moment, and the most that were alive after any operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {StorageWeakRef(storage) for storage in _storages((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            if (key := StorageWeakRef(storage)) not in before:
                self._alive[key] = storage.nbytes()
        self._alive = {key: size for key, size in self._alive.items() if not key.expired()}
        self.now = sum(self._alive.values())
        self.peak = max(self.peak, self.now)
        return out


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    """Return where the numbers of tensors lie; a sparse one only holds others."""
    tensors = [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]
    return [t.untyped_storage() for t in tensors if t.layout == torch.strided]
