"""`SavedBytes`: how much memory autograd saves inside a block of code."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks


class SavedBytes:
    """
    Count the bytes of the tensors that autograd saves for the backward pass, each storage once.

    A view counts as its whole storage, since that is what it keeps alive. What is freed again before the end, with a
    part of the graph that leads nowhere, no longer counts: `total` is the most that was saved at one time. Works on
    real, fake and meta tensors.

    Args:
        exclude (`Iterable[torch.Tensor]`, *optional*, defaults to `()`): Tensors whose storage does not count, such as
            parameters, which are there anyway.

    Attributes:
        total (`int`): The most bytes that were saved at one time.
        now (`int`): What is saved now.

    Example:
    ```python
    >>> weight = torch.ones(3, 3, requires_grad=True)
    >>> with SavedBytes(exclude=[weight]) as saved:
    ...     loss = torch.tanh(torch.ones(2, 3) @ weight).sum()
    >>> saved.total  # the input of the product and the output of tanh, 24 bytes each
    48

    ```
    """

    def __init__(self, exclude: Iterable[torch.Tensor] = ()) -> None:
        self._hooks = saved_tensors_hooks(self._pack, lambda held: held.tensor)
        self._excluded = {_storage(tensor) for tensor in exclude}
        #: storage -> how many saved tensors lie in it now
        self._holders: dict[Any, int] = {}
        self.now = self.total = 0

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def holds(self, tensor: torch.Tensor) -> bool:
        """Return whether autograd saves this tensor, or another one in the same storage, now."""
        return _storage(tensor) in self._holders

    def _pack(self, tensor: torch.Tensor) -> _Held:
        # Without its graph: an output that a node saves would keep the node alive, and itself with it.
        return _Held(self, tensor.detach())

    def _take(self, held: _Held) -> None:
        if held.key not in self._holders and held.key not in self._excluded:
            self.now += held.size
            self.total = max(self.total, self.now)
        self._holders[held.key] = self._holders.get(held.key, 0) + 1

    def _release(self, held: _Held) -> None:
        self._holders[held.key] -= 1
        if self._holders[held.key] == 0:
            del self._holders[held.key]
            if held.key not in self._excluded:
                self.now -= held.size


class _Held:
    """A saved tensor in the hands of autograd, which lets go of it with the node of the graph."""

    __slots__ = ("key", "owner", "size", "tensor")

    def __init__(self, owner: SavedBytes, tensor: torch.Tensor) -> None:
        self.owner, self.tensor = owner, tensor
        # Noted now, as nothing of torch may be called while it is thrown away.
        self.key, self.size = _storage(tensor), tensor.untyped_storage().nbytes()
        owner._take(self)

    def __del__(self) -> None:
        self.owner._release(self)


def _storage(tensor: torch.Tensor) -> Any:
    return tensor.untyped_storage()._cdata
