"""StreamLayer: the backward of a decoder layer, a chunk of tokens at a time, through the layer's own code.

A causal layer needs of earlier chunks only their keys and values, which every decoder layer of transformers takes from
a cache. So a chunk is an ordinary call of the layer with the earlier keys and values in a cache, whatever its norms,
projections (LoRA, quantized) and position embedding are, and nothing of the layer is written again here.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from .._compat import CACHE_ARGUMENTS, cache_argument, given_cache, recorded_outputs
from ..errors import RefusedError
from ..functional.sequence import LAYOUT, chunk_bounds, chunk_segments
from ..patching import (
    OtherStates,
    Results,
    compare,
    draws_random_numbers,
    loss_and_gradients,
    named_draws,
    remembered,
    sharded_by_zero3,
    short_reach,
    tiny_tokens,
)
from ..patching.handle import PatchHandle

#: arguments of a layer that are per token along dimension 1
_PER_TOKEN = ("position_ids", "position_embeddings", "seq_idx", "shift_labels")
_PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")

#: chunks of the self-check: more of them are more of the same
_MOST_CHUNKS = 8


class _KeysKnown(Exception):
    """Ends a layer's forward where its keys and values are known."""


class _Prefix:
    """
    The cache that a chunk sees: puts the earlier keys and values in front of its own.

    Attributes:
        new, whole (`tuple[torch.Tensor, torch.Tensor]`): Keys and values of the chunk alone, and with the earlier
            ones.
    """

    new: tuple[Tensor, Tensor] | None = None
    whole: tuple[Tensor, Tensor] | None = None

    def __init__(self, keys: Tensor | None = None, values: Tensor | None = None, stop: bool = False) -> None:
        self.keys, self.values, self.stop = keys, values, stop

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.new = self.whole = keys, values
        if self.stop:
            raise _KeysKnown
        if self.keys is not None:
            self.whole = torch.cat([self.keys, keys], dim=-2), torch.cat([self.values, values], dim=-2)
        return self.whole

    def get_seq_length(self, *args: Any) -> int:
        return 0 if self.keys is None else self.keys.shape[-2]


@dataclass
class _Chunk:
    """Tokens `[start, end)`, which attend to tokens from `first_key` on, and the layer's arguments but the mask."""

    start: int
    end: int
    first_key: int
    arguments: dict[str, Any]


class _Call:
    """One call of one layer: its chunks, and the autocast state to run them in."""

    def __init__(
        self, layer: Any, arguments: dict[str, Any], x: Tensor, num_chunks: int, may_draw: bool = False
    ) -> None:
        self.layer, self.device, self.may_draw = layer, x.device.type, may_draw
        self.parameters = [weight for weight in layer.parameters() if weight.requires_grad]
        self.mask, self.cache_name = arguments.get("attention_mask"), cache_argument(type(layer).forward)
        self.implementation = layer.self_attn.config._attn_implementation
        if self.implementation in ("sdpa", "eager"):  # these read a mask, and no boundaries
            arguments = {name: value for name, value in arguments.items() if name not in _PACKING}
        else:
            arguments = _with_boundaries(arguments, x.shape[0])
        self.chunks = [_cut(arguments, start, end) for start, end in chunk_bounds(x.shape[1], num_chunks)]
        self.autocast = torch.get_autocast_dtype(self.device), torch.is_autocast_enabled(self.device)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The layer without its checkpointing, which this replaces."""
        before = self.layer.__dict__.get("gradient_checkpointing")
        self.layer.__dict__["gradient_checkpointing"] = False
        try:
            # Without autocast's cache: the forward's copies of the weights have no graph.
            with torch.autocast(self.device, *self.autocast, cache_enabled=False):
                yield
        finally:
            del self.layer.__dict__["gradient_checkpointing"]
            if before is not None:
                self.layer.__dict__["gradient_checkpointing"] = before

    @contextlib.contextmanager
    def without_draws(self, device: torch.device) -> Iterator[None]:
        """Refuse dropout that was switched on since the patch: the backward would draw other masks."""
        if self.may_draw or torch.compiler.is_compiling():
            yield
            return
        before = _random_states(device)
        yield
        torchs, others = _random_states(device)
        if others != before[1] or not all(map(torch.equal, before[0], torchs)):
            raise RefusedError(
                f"StreamLayer: {type(self.layer).__name__} draws random numbers (dropout, noise), and chunks are "
                "computed twice, with other ones. Set its rates to 0."
            )

    def run(self, x: Tensor, chunk: _Chunk, prefix: _Prefix) -> Tensor:
        # Made for the moment: a mask of every chunk, kept, would be half of the square that there is to avoid.
        mask = _cut_mask(self.mask, chunk, self.implementation, x.device)
        earlier = {self.cache_name: prefix}
        out = type(self.layer).forward(self.layer, x, attention_mask=mask, **earlier, **chunk.arguments)
        if not isinstance(out, Tensor) or prefix.new is None:
            raise RefusedError(
                f"StreamLayer: {type(self.layer).__name__} returns a {type(out).__name__} or keeps no keys and values "
                "in its cache. It streams layers that return their hidden states and attend by keys and values."
            )
        return out

    def keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """
        Return those of all chunks but the last, `(batch, heads, tokens, head_dim)`, without the rest of the layer.
        """
        found = []
        for chunk in self.chunks[:-1]:
            prefix = _Prefix(stop=True)
            with contextlib.suppress(_KeysKnown):
                self.run(x[:, chunk.start : chunk.end], chunk, prefix)
            found.append(prefix.new)
        keys, values = zip(*found, strict=True)
        return torch.cat(keys, dim=-2), torch.cat(values, dim=-2)


class _StreamedLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, call: _Call, *parameters: Tensor) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(x)
        out, keys, values = torch.empty_like(x), None, None
        with call.running(), call.without_draws(x.device):
            for chunk in call.chunks:
                if keys is not None:
                    seen = chunk.start - chunk.first_key
                    keys, values = (t.narrow(-2, t.shape[-2] - seen, seen) for t in (keys, values))
                prefix = _Prefix(keys, values)
                out[:, chunk.start : chunk.end] = call.run(x[:, chunk.start : chunk.end], chunk, prefix)
                keys, values = prefix.whole
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        call, (x,) = ctx.call, ctx.saved_tensors
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        sums: list[Tensor | None] = [None] * len(call.parameters)
        with call.running():
            past = None
            if len(call.chunks) > 1:
                keys, values = call.keys_and_values(x)
                past = keys, values, _zeros(keys), _zeros(values)
            # From the last chunk on: when a chunk's turn comes, all that attend to it have been there.
            for chunk in reversed(call.chunks):
                grad_chunk, grads = _chunk_backward(call, chunk, x, grad, past=past, needs_x=grad_x is not None)
                if grad_x is not None:
                    grad_x[:, chunk.start : chunk.end] = grad_chunk
                for index, found in enumerate(grads):
                    if found is not None:
                        sums[index] = _zeros(found) if sums[index] is None else sums[index]
                        sums[index].add_(found)
        grads = (None if s is None else s.to(p.dtype) for s, p in zip(sums, call.parameters, strict=True))
        return grad_x, None, *grads


def _random_states(device: torch.device) -> tuple[list[Tensor], OtherStates]:
    on_device = [] if device.type == "cpu" else [getattr(torch, device.type).get_rng_state(device)]
    return [torch.get_rng_state(), *on_device], OtherStates()


def _zeros(like: Tensor) -> Tensor:
    """In fp32 at least: half precision would round a sum over chunks at every chunk."""
    return torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32))


def _chunk_backward(
    call: _Call, chunk: _Chunk, x: Tensor, grad: Tensor, *, past: tuple[Tensor, ...] | None, needs_x: bool
) -> tuple[Tensor | None, Sequence[Tensor | None]]:
    """
    Run one chunk forward and backward; `past` is `(K, V, dK, dV)` of all chunks but the last.

    Reads the chunk's own part of `dK, dV` and adds to those of the chunks before it.
    """
    own, before = slice(chunk.start, chunk.end), slice(chunk.first_key, chunk.start)
    tokens = x[:, own].detach().requires_grad_(needs_x)
    leaves = []
    if chunk.start > chunk.first_key:
        leaves = [t[..., before, :].detach().requires_grad_() for t in past[:2]]
    prefix = _Prefix(*leaves)
    with torch.enable_grad():
        out = call.run(tokens, chunk, prefix)
    outputs, grads = [out], [grad[:, own]]
    if past is not None and chunk.end <= past[0].shape[-2]:
        for new, total in zip(prefix.new, past[2:], strict=True):
            if new.requires_grad:
                outputs.append(new)
                grads.append(total[..., own, :].to(new.dtype))
    inputs = [*([tokens] if needs_x else []), *leaves, *call.parameters]
    found = list(torch.autograd.grad(outputs, inputs, grads, allow_unused=True))
    grad_tokens = found.pop(0) if needs_x else None
    for index in range(len(leaves)):
        past[2 + index][..., before, :] += found[index]
    return grad_tokens, found[len(leaves) :]


def stream_layers(model: nn.Module, num_chunks: int = 3, *, verify: bool = True) -> PatchHandle:
    """
    Run every decoder layer in chunks of tokens, and its backward a chunk at a time: StreamBP, exactly the same
    gradients.

    A layer keeps its input only, as with checkpointing, which it replaces for these layers; its backward holds the
    activations of `1 / num_chunks` of the tokens, and keys and values of all. For output `Z` in chunks,
    `dL/dW = sum_i (dZ_i/dW)^T dL/dZ_i`. The parameters are inputs of the autograd Function, so that DDP, FSDP2, any
    loss and any trainer keep working. StreamBP, https://arxiv.org/abs/2506.03077.

    Args:
        model (`torch.nn.Module`): Decoder of transformers whose layers have a causal `self_attn` and return their
            hidden states (Llama, Mistral, Qwen, Gemma, OLMo, ...), plain or wrapped by PEFT. Attention: `sdpa`,
            `eager`, flash or `hf_effi_varlen`; sliding windows, packed and padded rows as the model has them.
        num_chunks (`int`, *optional*, defaults to 3): Chunks of a sequence, at least 1; StreamBP's own advice is 3.
        verify (`bool`, *optional*, defaults to `True`): Whether to compare loss and gradients on a few tokens, with
            and without; `False` for a model whose weights are sharded already, on your own account.

    Returns:
        [`PatchHandle`]: `handle.revert()`, or the end of a `with` block, undoes it.

    Raises:
        ValueError: a bad `num_chunks`.
        RefusedError: no such layer; weights that ZeRO-3 shards; a model that draws random numbers
            in its layers (dropout) or whose loss or gradients would be others, a router's loss among them, with the
            measured difference; at the call, in
            training: a filled cache, sequence parallelism, attention weights or router logits asked for, or a
            per-token argument that is not known here.

    Example:
    ```python
    with stream_layers(model, num_chunks=4):
        Trainer(model, args, train_dataset=rows).train()
    ```
    """
    if not isinstance(num_chunks, int) or isinstance(num_chunks, bool) or num_chunks < 1:
        raise ValueError(f"num_chunks={num_chunks!r} must be an integer of at least 1.")
    _check_whole(model)
    found = {name: module for name, module in model.named_modules() if _is_decoder_layer(module)}
    if not found:
        raise RefusedError(
            f"{type(model).__name__} has no decoder layer that can be streamed: none of its modules has a causal "
            "`self_attn` with a config."
        )
    _patched(found, num_chunks).revert()  # where another patch has a layer, that is said first
    may_draw = _check_equal(model, found, num_chunks) if verify else False
    return _patched(found, num_chunks, may_draw)


def _patched(layers: dict[str, nn.Module], num_chunks: int, may_draw: bool = True) -> PatchHandle:
    handle = PatchHandle("stream_layers")
    for name, layer in layers.items():
        options = {"num_chunks": num_chunks, "may_draw": may_draw}
        forward = MethodType(functools.partial(_streamed_forward, **options), layer)
        handle.replace(name, layer, "forward", forward)
    return handle


def _check_equal(model: nn.Module, layers: dict[str, nn.Module], num_chunks: int) -> bool:
    """
    Compare a step on a few tokens, one row of them padded, with and without the patch.

    Returns:
        `bool`: Whether the layers draw random numbers that make no difference, as for a rate of 0.
    """
    chunks = min(num_chunks, _MOST_CHUNKS)
    length = max(12, 2 * chunks)

    def step(model: nn.Module, streamed: bool) -> Results:
        tokens = tiny_tokens(model, 2, length)
        mask = torch.ones_like(tokens)
        mask[1, length - 3 :] = 0
        patch = _patched(layers, chunks) if streamed else contextlib.nullcontext()
        with short_reach(model, length // 2), patch:
            return loss_and_gradients(model, tokens, mask)

    implementations = {layer.self_attn.config._attn_implementation for layer in layers.values()}
    if "flex_attention" in implementations:
        raise RefusedError(
            "stream_layers: flex_attention's block masks cannot be cut into chunks. Use sdpa or flash attention."
        )
    plain, streamed = (functools.partial(step, streamed=value) for value in (False, True))
    drawn = remembered(model, "draws in layers", lambda: draws_random_numbers(model, within=layers.values()))
    if drawn.looked and not drawn.equal:
        raise RefusedError(
            f"stream_layers: the layers draw random numbers, and chunks are computed twice, with other ones: {drawn}. "
            f"Set dropout and noise to 0; settings of that name: {named_draws(model)}."
        )
    found = drawn.worst(remembered(model, ("stream_layers", chunks), lambda: compare(model, plain, streamed)))
    if not found.equal:
        raise RefusedError(
            f"stream_layers would not give what {type(model).__name__} gives without it: {found}. Leave it out"
            f"{'' if found.looked else ', patch before the weights are sharded, or pass verify=False'}."
        )
    return bool(drawn.drawn)


def _is_decoder_layer(module: nn.Module) -> bool:
    attention = getattr(module, "self_attn", None)
    return hasattr(attention, "config") and getattr(attention, "is_causal", False) is True


def _streamed_forward(
    layer: nn.Module, hidden_states: Tensor, *positional: Any, num_chunks: int, may_draw: bool, **arguments: Any
) -> Any:
    if positional:  # some models call their layers so
        names = list(inspect.signature(type(layer).forward).parameters)[2:]
        arguments = {**dict(zip(names, positional, strict=False)), **arguments}
    if not (layer.training and torch.is_grad_enabled()):
        return type(layer).forward(layer, hidden_states, **arguments)
    _check_call(layer, arguments)
    call = _Call(layer, arguments, hidden_states, num_chunks, may_draw)
    return _StreamedLayer.apply(hidden_states, call, *call.parameters)


def _check_whole(module: nn.Module) -> None:
    if sharded_by_zero3(module.parameters()):
        raise RefusedError(
            "StreamLayer: the gradients of a layer's weights are collected outside of the modules that own them, "
            "where ZeRO-3 has shards only. Use ZeRO-2, FSDP2 or DDP, or leave stream_layers out."
        )


def _check_call(layer: Any, arguments: dict[str, Any]) -> None:
    name, cache = given_cache(arguments)
    if cache is not None and cache.get_seq_length(layer.self_attn.layer_idx):
        raise RefusedError(f"StreamLayer: the cache holds keys already. In training pass no {name}.")
    _check_whole(layer)
    if arguments.get(LAYOUT) is not None:
        raise RefusedError("StreamLayer: each rank has a part of the sequence already. Use one of the two.")
    if arguments.get("encoder_hidden_states") is not None:
        raise RefusedError(
            f"StreamLayer: {type(layer).__name__} attends to an encoder's states as well, which chunks are not made "
            "for."
        )
    if arguments.get("output_attentions"):
        raise RefusedError("StreamLayer: output_attentions=True is not possible in training: weights come in chunks.")
    if recorded := recorded_outputs() - {"hidden_states"}:
        raise RefusedError(
            f"StreamLayer: {', '.join(sorted(recorded))} are recorded inside of the layers, which run in chunks and "
            "without a "
            "graph there. Do not ask for them in training; for a router's loss, set output_router_logits=False."
        )


def _with_boundaries(arguments: dict[str, Any], batch: int) -> dict[str, Any]:
    """
    Add the boundaries of packed segments where the positions alone tell them.

    Flash and varlen kernels find them there only while queries and keys are equally many, which they are not in a
    chunk.
    """
    positions = arguments.get("position_ids")
    if positions is None or arguments.get("cu_seq_lens_q") is not None or arguments.get("attention_mask") is not None:
        return arguments
    jumps = (positions.diff(dim=-1) != 1).nonzero()
    if not len(jumps):
        return arguments
    if batch > 1:
        raise RefusedError(
            "StreamLayer: packed segments in more than one row. Pack into one row, or use sdpa attention."
        )
    cuts = [0, *(jumps[:, 1] + 1).tolist(), positions.shape[-1]]
    return {**arguments, "cu_seq_lens_q": torch.tensor(cuts, dtype=torch.int32, device=positions.device)}


def _cut(arguments: dict[str, Any], start: int, end: int) -> _Chunk:
    """Return the chunk `[start, end)` with its part of every argument."""
    mine, first_key = {}, 0
    if arguments.get("cu_seq_lens_q") is not None:
        mine, first_key = _cut_packing(arguments["cu_seq_lens_q"], start, end)
    for name, value in arguments.items():
        if name in (*_PACKING, *CACHE_ARGUMENTS, "attention_mask"):
            continue
        if name in _PER_TOKEN and value is not None:
            mine[name] = value[:, start:end] if isinstance(value, Tensor) else tuple(t[:, start:end] for t in value)
        elif isinstance(value, Tensor) and value.dim():
            raise RefusedError(f"StreamLayer: {name} {tuple(value.shape)} is not an argument it can cut into chunks.")
        else:
            mine[name] = value
    return _Chunk(start, end, first_key, mine)


def _cut_packing(cu_seq_lens: Tensor, start: int, end: int) -> tuple[dict[str, Any], int]:
    queries, keys, first_key = chunk_segments(cu_seq_lens.tolist(), start, end)
    tensors = [torch.tensor(cu, dtype=cu_seq_lens.dtype, device=cu_seq_lens.device) for cu in (queries, keys)]
    longest = [max(after - before for before, after in zip(cu, cu[1:], strict=False)) for cu in (queries, keys)]
    return dict(zip(_PACKING, (*tensors, *longest), strict=True)), first_key


def _cut_mask(mask: Any, chunk: _Chunk, implementation: str, device: torch.device) -> Tensor | None:
    rows, keys = slice(chunk.start, chunk.end), slice(chunk.first_key, chunk.end)
    if isinstance(mask, Tensor) and mask.dim() == 4:
        return mask[..., rows, keys]
    kernel = "flash" in implementation or "varlen" in implementation
    if isinstance(mask, Tensor) and mask.dim() == 2 and kernel:
        return mask[:, keys]
    before = chunk.start - chunk.first_key
    if mask is None and (kernel or (implementation == "sdpa" and not before)):
        return None
    if mask is None and implementation == "sdpa":
        # torch's `is_causal` would align the first query with the first key.
        size = chunk.end - chunk.start
        return torch.ones(1, 1, size, before + size, dtype=torch.bool, device=device).tril(before)
    raise RefusedError(
        f"StreamLayer: attn_implementation={implementation!r} with a mask of type {type(mask).__name__} cannot be cut "
        "into chunks. Use sdpa, flash attention, or eager with its 4-D mask."
    )
