"""Measure each checkpointed layer in the middle of a forward pass on tensors that have no data."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from ..functional.saved_bytes import SavedBytes
from ..functional.shape_run import ShapeRun
from ..memory.layer_profile import LayerProbe

#: how the MLP of a decoder layer is called in transformers
_MLP_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe")


class TraceProbe(LayerProbe):
    """
    Measures a layer each time that it runs: a shared layer keeps as much again.

    Args:
        model (`torch.nn.Module`): With checkpointing on.
        run (`ShapeRun`): In which it runs.
        counts_as_copy (`Callable`): Whether what autocast makes of a weight is counted as a copy of weights, apart
            from activations.

    Attributes:
        calls (`list[dict]`): What each run of a layer keeps, in order.
        passed (`dict`): Tensors passed to layers by keyword, such as masks, by storage.
    """

    def __init__(self, model: torch.nn.Module, run: ShapeRun, counts_as_copy: Callable[[torch.Tensor], bool]) -> None:
        super().__init__(model)
        self._shapes, self._counts_as_copy, self._first = run, counts_as_copy, len(run.casts)
        self.calls: list[dict[str, float]] = []
        self.passed: dict[Any, torch.Tensor] = {}

    def _probe(self, index: int, upstream: Any, function: Any, *args: Any) -> Any:
        if torch.is_grad_enabled():
            with _Difference(_mlp_of(self.layers[index]), self._kept_now) as mlp:
                measured = self._run(index, function, args)
            self.calls.append({**measured, "mlp_bytes": mlp.size, "width": args[0].shape[-1]})
            for value in function.keywords.values():
                if isinstance(value, torch.Tensor):
                    self.passed[value.untyped_storage()._cdata] = value
        return upstream(function, *args)

    def _without_trace(self, index: int) -> AbstractContextManager[None]:
        return contextlib.nullcontext()  # tensors without data hold nothing, and draw nothing

    def _kept(self, index: int, saved: SavedBytes) -> int:
        return saved.total - self._copies(saved)

    def _kept_now(self) -> int:
        return self.saved.now - self._copies(self.saved)

    def _copies(self, saved: SavedBytes) -> int:
        casts = self._shapes.casts[self._first :]
        return sum(t.untyped_storage().nbytes() for w, t in casts if self._counts_as_copy(w) and saved.holds(t))


class _Difference:
    """How much a figure grows while a module runs; 0 where there is no module."""

    def __init__(self, module: torch.nn.Module | None, figure: Any) -> None:
        self.size, self._before = 0, 0
        self._module, self._figure, self._handles = module, figure, []

    def __enter__(self) -> _Difference:
        if self._module is not None:
            self._handles = [
                self._module.register_forward_pre_hook(self._begin),
                self._module.register_forward_hook(self._end),
            ]
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def _begin(self, *args: Any) -> None:
        self._before = self._figure()

    def _end(self, *args: Any) -> None:
        self.size += self._figure() - self._before


def _mlp_of(layer: torch.nn.Module) -> torch.nn.Module | None:
    return next(
        (getattr(layer, name) for name in _MLP_NAMES if isinstance(getattr(layer, name, None), torch.nn.Module)), None
    )
