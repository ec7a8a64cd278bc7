"""Attention of branches over their own tokens and over a prefix that they share: two partial attentions, merged."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import PretrainedConfig

from .._compat import import_module_or_none
from ..errors import RefusedError
from ..functional.partial_attention import partial_attention, partial_attention_backward
from ..functional.segment_attention import AttentionPattern
from ..functional.shared_prefix import PrefixSegments, plan_shared_prefix
from ..patching import (
    Results,
    call,
    compare,
    device_of,
    draws_random_numbers,
    gradients,
    named_draws,
    output_of,
    probing,
    remembered,
    tiny_tokens,
)
from .merge import merge_attention
from .varlen import PATTERNS_FIELD, VARLEN_ATTENTION, in_autocast_dtype, kernel_inputs, set_prefix_attention

_LAYER_TYPES = {"full_attention", "sliding_attention"}


class _Part(NamedTuple):
    """Queries and keys of one attention, in segments."""

    bounds_q: Tensor
    bounds_k: Tensor
    max_q: int
    max_k: int
    causal: bool


def shared_prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cu_seq_lens: Tensor,
    max_length: int,
    prefix: PrefixSegments,
    scale: float | None = None,
) -> Tensor:
    """
    Attend causally within each segment, and from the branches to all of their prefix.

    With `A` the causal attention within the segments and `B` that of branches over their prefix, not causal:
    `lse = log(e^lse_A + e^lse_B)`, `out = e^(lse_A - lse) out_A + e^(lse_B - lse) out_B`. The backward of each part is
    run with the merged `(out, lse)`, which makes the sum exact.
    Grouped attention of Prefix Grouper, https://arxiv.org/abs/2506.05433, without joining keys.

    Args:
        query (`Tensor`): `(tokens, heads, head_dim)`, in the order of [`plan_shared_prefix`].
        key, value (`Tensor`): `(tokens, kv_heads, head_dim)`.
        cu_seq_lens (`Tensor`): Where prefixes, branches and rows on their own begin, and the end.
        max_length (`int`): The longest of them.
        prefix ([`PrefixSegments`]): Which branches attend to which prefix.
        scale (`float`, *optional*): Factor of the scores; `head_dim ** -0.5` by default.

    Returns:
        `Tensor`: `(tokens, heads, head_dim)`.
    """
    own = _Part(cu_seq_lens, cu_seq_lens, max_length, max_length, causal=True)
    shared = _Part(*prefix[:4], causal=False)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _SharedPrefixAttention.apply(query, key, value, own, shared, prefix.num_keys, prefix.num_queries, scale)


def check_shared_prefix(model: Any) -> None:
    """
    Raise where a model would not give the results of separate rows, measured on a few rows that share a prompt.

    Logits and gradients of one flat row are compared with those of the rows one by one, under the attention that the
    model has without this package: of a layer that drops the arguments of its attention, chunked attention, states
    that run along the row, and positions of its own no list is needed.

    Args:
        model (`PreTrainedModel`): Or one that wraps it and has its attributes.

    Raises:
        RefusedError: another attention implementation, one that does not hand arguments to its attention, sparse
            patterns, a router's loss, random numbers in training, or results that differ, with the measured
            difference.
    """
    if not getattr(model, "_supports_attention_backend", False):
        raise RefusedError(
            f"{type(model).__name__} is not a transformers model that hands the arguments of a call to its attention."
        )
    check_config(model.config)
    drawn = remembered(model, "draws", lambda: draws_random_numbers(model))
    if drawn.looked and not drawn.equal:
        raise RefusedError(
            f"Completions of a prompt would share its random numbers: {drawn}. Set dropout and noise to 0; settings "
            f"of that name: {named_draws(model)}."
        )
    found = remembered(model, "shared prefix", lambda: compare(model, _one_by_one, _sharing))
    if not found.equal:
        kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - _LAYER_TYPES
        raise RefusedError(
            f"{type(model).__name__} does not give the results of separate rows where they share a prompt: {found}."
            f"{f' Its layers of type {sorted(kinds)} may carry a state along the row.' if kinds else ''}"
        )


#: prompt and completions of the rows of the check: two share a prompt, one is on its own
_ROWS = (((0, 5), (5, 8)), ((0, 5), (8, 10)), ((10, 13), (13, 17)))


def rows_to_compare(model: Any) -> list[tuple[list[int], list[int]]]:
    """Return prompt and completion of three short rows, of which two share a prompt."""
    ids = tiny_tokens(model, 1, 17)[0].tolist()
    return [(ids[slice(*prompt)], ids[slice(*completion)]) for prompt, completion in _ROWS]


def _one_by_one(model: Any) -> Results:
    """The logits that score each completion, from rows of their own and the attention of transformers."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) == VARLEN_ATTENTION:
            name = "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"
            vars(config)["_attn_implementation_internal"] = name
    device, logits = device_of(model), []
    for prompt, completion in rows_to_compare(model):
        out = output_of(call(model, torch.tensor([prompt + completion], device=device)))
        logits.append(out[0, len(prompt) - 1 : -1])
    scores = torch.cat(logits)
    return {"the logits": scores, **gradients(model, scores)}


def _sharing(model: Any) -> Results:
    """The same from one flat row."""
    rows, device = rows_to_compare(model), device_of(model)
    layout = plan_shared_prefix([prompt for prompt, _ in rows], [len(completion) for _, completion in rows])
    inputs = layout.model_inputs([prompt + completion for prompt, completion in rows])
    del inputs["labels"]
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    out = output_of(call(model, **inputs))[0]
    index = layout.completion_index().to(device)
    scores = torch.cat([out[where[where >= 0]] for where in index])
    return {"the logits": scores, **gradients(model, scores)}


def check_config(config: PretrainedConfig) -> None:
    """Do what [`check_shared_prefix`] does, as far as the config says: what may be changed between two batches."""
    text = config.get_text_config()
    if text._attn_implementation != VARLEN_ATTENTION:
        raise RefusedError(
            f"attn_implementation={text._attn_implementation!r} would not see the shared prompt: call "
            "model.set_attn_implementation(register_varlen_attention())."
        )
    if any(getattr(text, PATTERNS_FIELD, None) or ()):
        raise RefusedError("The model has sparse attention patterns, which a shared prefix does not follow.")
    if getattr(text, "output_router_logits", False):
        raise RefusedError("output_router_logits=True: a shared prompt would count once in the router's loss.")


def _forward(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cu_seq_lens: Tensor | None,
    max_length: int | None,
    prefix: PrefixSegments,
    causal: bool,
    pattern: AttentionPattern | None,
    scale: float | None,
) -> Tensor:
    """Take `(1, heads, length, head_dim)` and return `(1, length, heads, head_dim)`; part of `hf_effi_varlen`."""
    if cu_seq_lens is None:
        raise ValueError(f"{name}: a shared prefix without cu_seq_lens_q, which says where branches begin.")
    _check_call(name, query, key, cu_seq_lens, prefix)
    _check_layer(name, causal, pattern, prefix)
    query, key, value = (t[0].transpose(0, 1) for t in (query, key, value))
    query, key, value = (kernel_inputs if _on_kernel(query) else in_autocast_dtype)(query, key, value)
    longest = int(cu_seq_lens.diff().max()) if max_length is None else int(max_length)
    return shared_prefix_attention(
        query, key, value, cu_seq_lens=cu_seq_lens, max_length=longest, prefix=prefix, scale=scale
    )[None]


def _check_call(name: str, query: Tensor, key: Tensor, cu_seq_lens: Tensor, prefix: PrefixSegments) -> None:
    rows, _, tokens, _ = query.shape
    if rows != 1:
        raise ValueError(f"{name}: rows that share a prompt come as one flat row, got a batch of {rows}.")
    if tokens != key.shape[2]:
        raise ValueError(
            f"{name}: {tokens} queries and {key.shape[2]} keys. Shared prompts are for training and scoring: call the "
            "model without a cache."
        )
    laid_out = prefix.num_keys + prefix.num_queries
    if cu_seq_lens.device.type == "cpu":
        laid_out = max(laid_out, int(cu_seq_lens[-1]))
    if laid_out > tokens:
        raise ValueError(f"{name}: {laid_out} tokens were laid out, and the row has {tokens}. Was it cut?")


def _check_layer(name: str, causal: bool, pattern: AttentionPattern | None, prefix: PrefixSegments) -> None:
    if not causal:
        raise RefusedError(f"{name} attends in both directions, so a prompt depends on its completion.")
    if pattern is not None and (pattern.sink or pattern.stride):
        raise RefusedError(f"{name} has a sparse pattern, which a shared prefix does not follow. Use full attention.")
    if pattern is not None and pattern.window is not None and pattern.window < prefix.longest_context:
        raise RefusedError(
            f"{name} sees a window of {pattern.window} tokens, and the longest prompt with its completion has "
            f"{prefix.longest_context}. Leave out longer rows, or do not share prompts."
        )


class _SharedPrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        segments: _Part,
        shared: _Part,
        num_keys: int,
        num_queries: int,
        scale: float,
    ) -> Tensor:
        attend, _ = _operators(query)
        prefixes, branches = slice(0, num_keys), slice(num_keys, num_keys + num_queries)
        own = attend(query, key, value, segments, scale)
        of_prefix = attend(query[branches], key[prefixes], value[prefixes], shared, scale)
        merged = merge_attention(*(part[branches] for part in own), *of_prefix)
        # Not in place: selective checkpointing keeps what the operator returned.
        out, lse = (
            torch.cat([part[:num_keys], both, part[branches.stop :]]) for part, both in zip(own, merged, strict=True)
        )
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.segments, ctx.shared, ctx.slices, ctx.scale = segments, shared, (prefixes, branches), scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        _, attend_backward = _operators(query)
        prefixes, branches = ctx.slices
        grads = attend_backward(grad, query, key, value, out, lse, part=ctx.segments, scale=ctx.scale)
        of_branches = (t[branches] for t in (grad, query))
        of_prefixes = (t[prefixes] for t in (key, value))
        results = out[branches], lse[branches]
        more = attend_backward(*of_branches, *of_prefixes, *results, part=ctx.shared, scale=ctx.scale)
        for total, part, where in zip(grads, more, (branches, prefixes, prefixes), strict=True):
            total[where] += part
        return *grads, None, None, None, None, None


def _operators(query: Tensor) -> tuple[Any, Any]:
    """Return the two directions of a part: torch's packed kernels on CUDA, a call per segment elsewhere."""
    return (_kernel, _kernel_backward) if _on_kernel(query) else (_by_segment, _by_segment_backward)


def _on_kernel(query: Tensor) -> bool:
    """Torch's kernels take half precision only, which a probe does not use."""
    return query.is_cuda and not probing()


def _by_segment(query: Tensor, key: Tensor, value: Tensor, part: _Part, scale: float) -> tuple[Tensor, Tensor]:
    bounds = part.bounds_q.tolist(), part.bounds_k.tolist()
    return partial_attention(query, key, value, *bounds, scale=scale, causal=part.causal)


def _by_segment_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *, part: _Part, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    bounds = part.bounds_q.tolist(), part.bounds_k.tolist()
    return partial_attention_backward(grad, query, key, value, out, lse, *bounds, scale=scale, causal=part.causal)


def _kernel(query: Tensor, key: Tensor, value: Tensor, part: _Part, scale: float) -> tuple[Tensor, Tensor]:
    """Torch's operator keeps `lse` as `(heads, tokens)`."""
    forward, _ = varlen_operators()
    options = {"enable_gqa": query.shape[1] != key.shape[1], **_options(part, scale)}
    out, lse, _ = forward(query, key, value, *_kernel_bounds(part, query.device), part.causal, **options)
    return out, lse.t().contiguous()


def _kernel_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *, part: _Part, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    _, backward = varlen_operators()
    statistics = out, lse.t().contiguous()
    bounds = _kernel_bounds(part, query.device)
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=query.device)
    options = _options(part, scale)
    return backward(grad.contiguous(), query, key, value, *statistics, *bounds, part.causal, no_dropout, **options)


def _options(part: _Part, scale: float) -> dict[str, Any]:
    return {"scale": scale, "window_size": [-1, 0 if part.causal else -1]}


def _kernel_bounds(part: _Part, device: torch.device) -> tuple[Tensor, Tensor, int, int]:
    bounds = (bounds.to(device, torch.int32) for bounds in (part.bounds_q, part.bounds_k))
    return *bounds, part.max_q, part.max_k


@functools.cache
def varlen_operators() -> tuple[Any, Any]:
    """
    Return torch's variable-length attention and its backward, which take and return the log-sum-exp.

    Raises:
        RefusedError: this torch has none, or one without grouped queries or a scale.
    """
    import_module_or_none("torch.nn.attention.varlen")  # registers them
    found = [getattr(torch.ops.torch_attn, name, None) for name in ("_varlen_attn", "_varlen_attn_backward")]
    needed = {"scale", "window_size", "enable_gqa"}, {"scale", "window_size"}
    if not all(op and names <= _argument_names(op) for op, names in zip(found, needed, strict=True)):
        raise RefusedError(
            f"torch {torch.__version__} has no variable-length attention with scale, window and grouped queries, "
            "which sharing prompts needs on a GPU. Update torch."
        )
    return tuple(found)


def _argument_names(operator: Any) -> set[str]:
    return {argument.name for argument in operator.default._schema.arguments}


set_prefix_attention(_forward)
