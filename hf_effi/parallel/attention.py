"""Attention over the whole sequence with this rank's heads, around whatever backend the model uses."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import RefusedError
from ..functional.sequence import LAYOUT
from .exchange import heads_from_sequence, sequence_from_heads
from .groups import SequenceGroup
from .layout import SequenceLayout

_PROBE_LENGTH = 16
_proven: set[tuple[Any, ...]] = set()


class _LocalHeads:
    """A module as its backend should see it: with the head ratio of this rank. The module itself is not touched."""

    def __init__(self, module: nn.Module, groups: int) -> None:
        self._module = module
        self.num_key_value_groups = groups

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _Dispatcher:
    """Stands in for one backend: exchanges where the model was called with a layout, and is the backend elsewhere."""

    def __init__(self, name: str, core: Callable[..., Any]) -> None:
        self.name, self.core = name, core

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        layout = kwargs.pop(LAYOUT, None)
        if layout is None:
            return self.core(module, query, key, value, attention_mask, **kwargs)
        layout.entered.add(id(module))
        # What the model was called with comes along and describes the shard; it would mislead the backend.
        options = {name: value for name, value in kwargs.items() if name not in layout.inputs}
        _check_call(module, options)
        query, key, value = heads_from_sequence(query, key, value, layout.group)
        local = _LocalHeads(module, query.size(1) // key.size(1))
        prove_isolation(self.name, self.core, local, query, key, value, options=options, group=layout.group)
        output = attend(self.name, self.core, local, query, key, value, layout=layout, options=options)
        return sequence_from_heads(output.transpose(1, 2), layout.group).transpose(1, 2).contiguous(), None


@contextlib.contextmanager
def attention_scope(implementations: Iterable[str]) -> Iterator[None]:
    """
    Let models that are called with a layout attend over the whole sequence; put everything back at the end.

    Forward, backward and the recomputation of checkpoints belong inside. Calls without a layout (generation, a
    teacher) reach their backend unchanged.

    Args:
        implementations (`Iterable[str]`): Names of backends, such as `"sdpa"`.
    """
    replaced: dict[str, Callable[..., Any]] = {}
    try:
        for name in set(implementations):
            core = ALL_ATTENTION_FUNCTIONS[name]
            if not isinstance(core, _Dispatcher):
                replaced[name] = core
                ALL_ATTENTION_FUNCTIONS[name] = _Dispatcher(name, core)
        yield
    finally:
        for name, core in replaced.items():
            del ALL_ATTENTION_FUNCTIONS[name]
            if ALL_ATTENTION_FUNCTIONS.get(name) is not core:  # it was an override of someone else
                ALL_ATTENTION_FUNCTIONS[name] = core


def attend(
    name: str,
    core: Callable[..., Any],
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    layout: SequenceLayout,
    options: dict[str, Any],
) -> Tensor:
    """
    Run a backend on whole sequences, telling it about documents in its own way.

    `sdpa` gets a mask, `flex_attention` a block mask, all others boundaries (`cu_seq_lens_q`, ...).

    Args:
        query (`Tensor`): `(B, Hq/P, S, D)`.
        key, value (`Tensor`): `(B, Hk/P, S, D)`.

    Returns:
        `Tensor`: `(B, S, Hq/P, D)`.
    """
    window = _window(module, options)
    mask: Any = None
    if name == "sdpa":
        mask = layout.mask(window)
    elif name == "flex_attention":
        mask = layout.block_mask(window)
    elif not layout.one_document:
        cu_seqlens, longest = layout.boundaries
        options = options | {
            "cu_seq_lens_q": cu_seqlens,
            "cu_seq_lens_k": cu_seqlens,
            "max_length_q": longest,
            "max_length_k": longest,
        }
    return core(module, query, key, value, mask, **options)[0]


def _window(module: Any, options: dict[str, Any]) -> int | None:
    return options["sliding_window"] if "sliding_window" in options else getattr(module, "sliding_window", None)


def _check_call(module: nn.Module, options: dict[str, Any]) -> None:
    if not (options["is_causal"] if options.get("is_causal") is not None else getattr(module, "is_causal", True)):
        raise RefusedError(f"{type(module).__name__} attends in both directions; only causal layers can run.")
    for name, value in options.items():
        if isinstance(value, Tensor):
            raise RefusedError(
                f"{type(module).__name__} gives its attention the tensor {name!r} (such as sinks or a bias), which is "
                "laid out for all heads and this rank's tokens. Sequence parallelism does not support this model."
            )


def prove_isolation(
    name: str,
    core: Callable[..., Any],
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    options: dict[str, Any],
    group: SequenceGroup,
) -> None:
    """
    Run the backend on two short documents and change one of them: the other must not notice, nor may an earlier token.

    Runs once for each backend, device, dtype and head layout. What a backend claims about packing is not trusted.

    Raises:
        RefusedError: something leaks, or the changed document does not change either.
    """
    window = _window(module, options)
    kind = (name, core, query.device.type, query.dtype, query.shape[1::2], key.size(1), value.size(-1), window is None)
    if kind in _proven:
        return
    half = _PROBE_LENGTH // 2
    documents = (torch.arange(_PROBE_LENGTH, device=query.device) >= half).long()[None]
    layout = SequenceLayout(group, documents, _PROBE_LENGTH)
    options = options | {"dropout": 0.0} | ({"sliding_window": 3} if window is not None else {})
    random = torch.Generator().manual_seed(0)

    def draw(like: Tensor) -> Tensor:
        return torch.randn(1, like.size(1), _PROBE_LENGTH, like.size(-1), generator=random).to(like)

    tensors = [0.1 * draw(query), 0.1 * draw(key), draw(value)]  # nearly equal weights: every change shows

    def changes(token: int) -> list[bool]:
        """Which outputs move when the query, key and value of one token change."""
        other = [x.clone() for x in tensors]
        for x in other:
            x[:, :, token] += 1.0
        before, after = (attend(name, core, module, *x, layout=layout, options=options) for x in (tensors, other))
        return ((after - before).abs().amax(dim=(0, 2, 3)) > 1e-3).tolist()

    with torch.no_grad():
        for token in (0, half):
            reach = half if window is None else 3
            expected = [token <= i < min(token + reach, token // half * half + half) for i in range(_PROBE_LENGTH)]
            moved = changes(token)
            if moved != expected:
                raise RefusedError(
                    f"attn_implementation={name!r} does not keep documents apart: changing token {token} of two "
                    f"packed documents of {half} tokens moves the outputs {[i for i, m in enumerate(moved) if m]} "
                    f"instead of {[i for i, m in enumerate(expected) if m]}. Use 'sdpa', 'flash_attention_2' or "
                    "another backend that follows cu_seq_lens_q and cu_seq_lens_k."
                )
    _proven.add(kind)
