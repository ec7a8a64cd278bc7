"""The largest attention logits of a model while it trains, taken beside the attention function that it uses."""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import AttentionInterface

from ..errors import RefusedError
from ..functional.qk_clip import max_logits

_FIELD = "_attn_implementation_internal"


class LogitWatch:
    """
    Takes the largest logit of each head between [`start`] and [`stop`], in forwards that have gradients.

    The attention functions of transformers are registered again under their own names, with one that measures first
    and then calls them: what the model computes stays the same to the bit. Generation and reference models, which have
    no gradients, are passed by. It knows the masks of eager, sdpa and flash attention, and refuses others.

    Args:
        modules (`Iterable[nn.Module]`): Attention modules to watch.

    Attributes:
        largest (`dict[nn.Module, Tensor]`): `(heads,)` of each module since [`start`].
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.modules = frozenset(modules)
        self.largest: dict[nn.Module, Tensor] = {}
        self._names: tuple[str, ...] = ()

    def start(self, model: nn.Module) -> None:
        """Begin to measure; `model` says which attention functions are in use."""
        self.stop()
        self.largest = {}
        known: Mapping[str, Callable] = AttentionInterface._global_mapping
        # All of them: a forward may switch to another one for a while, and its logits must not be missed.
        self._names = tuple(sorted({*known, *attention_names(model)}))
        for name in self._names:
            before = known.get(name)
            while isinstance(before, _Watching):  # of a run that ended in an error
                before = before.before
            AttentionInterface.register(name, _Watching(self, name, before))

    def stop(self) -> None:
        """Stop to measure, and put back the functions."""
        known = AttentionInterface._global_mapping
        for name in self._names:
            watching = known.get(name)
            if isinstance(watching, _Watching) and watching.watch is self:
                if watching.before is None:  # "eager" is known to each class, and not to the interface
                    known.pop(name)
                else:
                    AttentionInterface.register(name, watching.before)
        self._names = ()


def attention_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the attention functions that the configs of a model ask for."""
    configs = (getattr(module, "config", None) for module in model.modules())
    names = (vars(config).get(_FIELD) for config in configs if hasattr(config, "__dict__"))
    return tuple(sorted({"eager" if name is None else str(name) for name in names}))


class _Watching:
    """Measures for a watch, then calls the function it stands for."""

    def __init__(self, watch: LogitWatch, name: str, before: Callable | None) -> None:
        # Of a run that ended in an error nobody stops the watch; it ends with its callback.
        self._watch, self.name, self.before = weakref.ref(watch), name, before

    @property
    def watch(self) -> LogitWatch | None:
        """The watch, while it lives."""
        return self._watch()

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kw: Any
    ) -> Any:
        watch = self.watch
        if watch is not None and torch.is_grad_enabled() and module in watch.modules:
            if self.name not in ("eager", "sdpa") and "flash" not in self.name:
                watch.stop()
                raise RefusedError(
                    f"mode='sampled' does not know which pairs attend under attn_implementation={self.name!r}, which "
                    "exact_savings of EffiGRPOTrainer and packing use too. Use mode='bound', exact_savings='off', or "
                    "attn_implementation='sdpa'."
                )
            with torch.no_grad():
                found = _of_call(module, query, key, attention_mask, kw)
            known = watch.largest.get(module)
            watch.largest[module] = found if known is None else torch.maximum(known, found)
        function = self.before or _eager_of(module)
        return function(module, query, key, value, attention_mask, *args, **kw)


def _of_call(module: nn.Module, query: Tensor, key: Tensor, mask: Any, kw: Mapping[str, Any]) -> Tensor:
    scaling = kw.get("scaling")
    causal = kw.get("is_causal")
    documents = None
    if isinstance(mask, Tensor) and mask.ndim == 4:
        return max_logits(query, key, query.shape[-1] ** -0.5 if scaling is None else scaling, mask=mask)
    bounds, positions = kw.get("cu_seq_lens_q"), kw.get("position_ids")
    places = torch.arange(query.shape[2], device=query.device)
    if isinstance(bounds, Tensor):
        documents = torch.searchsorted(bounds[1:].contiguous(), places.to(bounds.dtype), right=True)[None]
    elif isinstance(positions, Tensor) and positions.ndim == 2 and positions.shape[1] == len(places):
        documents = (positions.diff(dim=1, prepend=positions[:, :1] - 1) != 1).cumsum(1)
    return max_logits(
        query,
        key,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        mask=mask if isinstance(mask, Tensor) and mask.ndim == 2 else None,
        causal=bool(getattr(module, "is_causal", True) if causal is None else causal),
        window=kw.get("sliding_window"),
        documents=documents,
    )


def _eager_of(module: nn.Module) -> Callable:
    """Return the eager attention function beside the class of a module, which is what transformers calls."""
    for kind in type(module).__mro__:
        with contextlib.suppress(KeyError, AttributeError):
            return sys.modules[kind.__module__].eager_attention_forward
    raise RefusedError(
        f"{type(module).__name__} asks for eager attention and has no eager_attention_forward in its file. Load the "
        "model with attn_implementation='sdpa'."
    )
