"""`SavedBytes`: how much memory autograd saves inside a block of code."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks


class SavedBytes(saved_tensors_hooks):
    """
    Count the bytes of the tensors that autograd saves for the backward pass, each storage once.

    A view counts as its whole storage, since that is what it keeps alive. Works on real, fake and meta tensors.

    Args:
        exclude (`Iterable[torch.Tensor]`, *optional*, defaults to `()`): Tensors whose storage does not count, such as
            parameters, which are there anyway.

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
        super().__init__(self._pack, lambda tensor: tensor)
        self._seen = {_storage(tensor) for tensor in exclude}
        self.total = 0

    def __enter__(self) -> SavedBytes:
        super().__enter__()
        return self

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        # The tensor itself is returned, so that its storage, and with it the key, stays taken.
        key = _storage(tensor)
        if key not in self._seen:
            self._seen.add(key)
            self.total += tensor.untyped_storage().nbytes()
        return tensor


def _storage(tensor: torch.Tensor) -> Any:
    return tensor.untyped_storage()._cdata
