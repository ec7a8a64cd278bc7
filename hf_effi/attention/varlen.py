"""`hf_effi_varlen`: packed, padded and sparse attention for transformers models without the flash-attn package."""

from __future__ import annotations

import functools
import inspect
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from .._compat import CACHE_ARGUMENTS
from ..errors import RefusedError
from ..functional.segment_attention import AttentionPattern, segment_attention
from ..functional.shared_prefix import PrefixSegments
from ..patching import call, is_sharded, looking, probing, tiny_tokens
from ._varlen_probe import PATTERNS_FIELD
from .varlen_masks import LEDGER, VARLEN_ATTENTION, Document, View, varlen_mask

_MAX_HEAD_DIM = 256


class _Segments(NamedTuple):
    """Documents of a batch in flat order; `index_q`, `index_k` pick the real tokens, `None` where all are."""

    bounds_q: torch.Tensor
    bounds_k: torch.Tensor
    max_q: int
    max_k: int
    index_q: torch.Tensor | None = None
    index_k: torch.Tensor | None = None


def _unknown_prefix(*call: Any, **options: Any) -> torch.Tensor:
    raise ValueError("A shared prefix: call hf_effi.attention.shared_prefix.check_shared_prefix(model) first.")


_prefix_attention: Callable[..., torch.Tensor] = _unknown_prefix


def set_prefix_attention(function: Callable[..., torch.Tensor]) -> None:
    """Let `function` compute rows with a shared prefix: it merges by a kernel, and kernels import this module."""
    global _prefix_attention
    _prefix_attention = function


def register_varlen_attention() -> str:
    """
    Make `attn_implementation="hf_effi_varlen"` known to transformers, and return that name.

    On CUDA it is torch's own variable-length flash attention (`torch.nn.attention.varlen`, bf16 or fp16); elsewhere
    one SDPA call a document. Documents never see each other: their bounds come from `cu_seq_lens_q`, else from the 2-D
    padding mask together with `position_ids` that start again. No mask of `length x length` is built.

    Example:
    ```python
    name = register_varlen_attention()
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation=name, dtype="bfloat16")
    SFTTrainer(model, SFTConfig("out", packing=True), train_dataset=rows).train()
    ```
    """
    AttentionInterface.register(VARLEN_ATTENTION, varlen_attention_forward)
    AttentionMaskInterface.register(VARLEN_ATTENTION, varlen_mask)
    return VARLEN_ATTENTION


def check_varlen_attention(model: torch.nn.Module) -> None:
    """
    Check that the layers of a model call `hf_effi_varlen`, by one forward over a few tokens that leaves no trace.

    Some classes of transformers compute their attention themselves, whatever the name in their config. Documents that
    share a row would see each other there, without a word. The Effi trainers call this; beside a stock one, call it
    once.

    Args:
        model (`torch.nn.Module`): A model loaded with `attn_implementation="hf_effi_varlen"`, or told by
            `set_attn_implementation`; not sharded yet.

    Raises:
        RefusedError: the class kept another attention, or never calls the one that it was given; weights are
            sharded.

    Example:
    ```python
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation=register_varlen_attention())
    check_varlen_attention(model)
    ```
    """
    kind = type(model).__name__
    configs = [module.config for module in model.modules() if hasattr(getattr(module, "config", None), "model_type")]
    names = sorted({str(getattr(config, "_attn_implementation", None)) for config in configs})
    if VARLEN_ATTENTION not in names:
        raise RefusedError(
            f"{kind} computes its attention by {' and '.join(names) or 'itself'}, not by {VARLEN_ATTENTION}: "
            "transformers takes "
            "no other for classes that compute it in their own code. Leave packing and attention patterns out."
        )
    if is_sharded(model):
        raise RefusedError(
            f"the weights of {kind} are sharded, so that it cannot be tried whether its layers call "
            f"{VARLEN_ATTENTION}. Check before the model is wrapped."
        )
    before = LEDGER.calls
    try:
        with looking(model, None, training=False, with_graph=False):
            call(model, tiny_tokens(model, 1, 4))
    except Exception as error:  # whatever a forward of somebody's model says
        raise RefusedError(
            f"{kind} does not run on four tokens, so that it cannot be tried whether its layers call "
            f"{VARLEN_ATTENTION}: {type(error).__name__}: {error}"
        ) from error
    if LEDGER.calls == before:
        raise RefusedError(
            f"{kind} was given {VARLEN_ATTENTION} and computes its attention in its own code, which never calls it. "
            "Documents that share a row would see each other. Use attn_implementation='eager', rows of their own, "
            "and no patterns."
        )


def set_attention_patterns(model: Any, patterns: Sequence[AttentionPattern | None]) -> None:
    """
    Give each layer of a model its attention pattern, and switch the model to `hf_effi_varlen`, which reads them.

    The patterns are stored in the config and so in every checkpoint; a model loaded from one needs
    `attn_implementation="hf_effi_varlen"` again.

    Args:
        model (`PreTrainedModel`): The model.
        patterns (`Sequence[AttentionPattern or None]`): One a layer; `None` is what the model does anyway.

    Raises:
        ValueError: not one pattern per layer.
    """
    layers = model.config.get_text_config().num_hidden_layers
    if len(patterns) != layers:
        raise ValueError(f"{len(patterns)} patterns for {layers} layers: give one per layer.")
    model.set_attn_implementation(register_varlen_attention())
    stored = [None if pattern is None else pattern.as_dict() for pattern in patterns]
    setattr(model.config.get_text_config(), PATTERNS_FIELD, stored)


def varlen_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    position_ids: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """
    Attention function of transformers' interface: `(batch, heads, length, head_dim)` in, `(batch, length, heads,
    head_dim)` out. With the arguments of [`PrefixSegments`], branches also attend to the prefix that they share.

    Raises:
        RefusedError: dropout, soft-capped logits, learned sinks, a 4-D mask, attention weights as an output; on CUDA
            fp32, or heads wider than 256; a shared prefix with a window that is too short or a sparse pattern.
        ValueError: a shared prefix with a KV cache, padding or several rows, or boundaries that do not fit the tokens.
    """
    if probing():
        LEDGER.calls += 1
    _refuse(module, attention_mask, dropout, kwargs)
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    pattern = _pattern_of(module, sliding_window)
    batch, _, length, _ = query.shape
    prefix = PrefixSegments.from_kwargs(kwargs)
    if prefix is not None:
        name = type(module).__name__
        if attention_mask is not None:
            raise ValueError(f"{name}: rows that share a prompt have no padding, got an attention mask with zeros.")
        out = _prefix_attention(
            name,
            query,
            key,
            value,
            cu_seq_lens=cu_seq_lens_q,
            max_length=max_length_q,
            prefix=prefix,
            causal=causal,
            pattern=pattern,
            scale=scaling,
        )
        own = _Segments(cu_seq_lens_q, cu_seq_lens_q, 0, 0)
        _check_masks(
            module, View(bool(causal), sliding_window), own, batch=batch, length_q=length, length_k=key.shape[2]
        )
        _check_reach(name, prefix)
        return out, None
    if cu_seq_lens_q is not None:
        segments = _given_segments(batch * length, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
    else:
        segments = _find_segments(
            batch, length, key.shape[2], attention_mask=attention_mask, position_ids=position_ids, device=query.device
        )
    _check_masks(
        module, View(bool(causal), sliding_window), segments, batch=batch, length_q=length, length_k=key.shape[2]
    )
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
    if segments.index_q is not None:
        q, k, v = q[segments.index_q], k[segments.index_k], v[segments.index_k]
    out = _attend(q, k, v, segments, scaling=scaling, causal=causal, pattern=pattern)
    if segments.index_q is not None:
        padded = out.new_zeros(batch * length, *out.shape[1:])
        out = padded.index_copy(0, segments.index_q, out)
    return out.unflatten(0, (batch, length)), None


def _refuse(module: Any, attention_mask: torch.Tensor | None, dropout: float, kwargs: dict[str, Any]) -> None:
    name = type(module).__name__
    if dropout:
        raise RefusedError(f"{name}: {VARLEN_ATTENTION} has no dropout, got {dropout}. Set attention_dropout=0.")
    for argument, what in (("softcap", "soft-capped logits"), ("s_aux", "learned attention sinks")):
        if kwargs.get(argument) is not None:
            raise RefusedError(f"{name}: {VARLEN_ATTENTION} has no {what}. Use attn_implementation='eager'.")
    for argument in _arguments_of_others(type(module)):
        if kwargs.get(argument) is not None:
            raise RefusedError(
                f"{name}: {VARLEN_ATTENTION} does not read {argument}, which the attention of this model is given. "
                "Use attn_implementation='sdpa' or 'eager'."
            )
    if kwargs.get("output_attentions"):
        raise RefusedError(f"{name}: attention weights are never formed. Use attn_implementation='eager'.")
    if attention_mask is not None and attention_mask.dim() != 2:
        raise RefusedError(
            f"{name}: got an attention mask of shape {tuple(attention_mask.shape)}; {VARLEN_ATTENTION} takes a "
            "padding mask of shape (batch, length). Use attn_implementation='sdpa'."
        )


#: what this attention reads, and what says nothing about the result
_READ = {"module", "query", "key", "value", "attention_mask", "dropout", "scaling", "is_causal", "sliding_window"}


@functools.cache
def _arguments_of_others(attention: type) -> tuple[str, ...]:
    """
    Return the arguments of SDPA and of the model's own eager attention that are not read here, such as a position
    bias.
    """
    functions = [sdpa_attention_forward]
    functions.append(getattr(sys.modules.get(attention.__module__), "eager_attention_forward", None))
    names = {
        name
        for function in functions
        if function is not None
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD
    }
    return tuple(sorted(names - _READ - set(CACHE_ARGUMENTS)))


def _check_masks(module: Any, view: View, segments: _Segments, *, batch: int, length_q: int, length_k: int) -> None:
    """Refuse a model whose masks say other than its layers are computed here; see [`MaskLedger`]."""
    if torch.compiler.is_compiling() or segments.bounds_k.numel() < 2:  # or nothing but padding
        return

    def longest() -> Document:
        bounds = segments.bounds_k
        which = int(bounds.diff().argmax())
        begin, end = int(bounds[which]), int(bounds[which + 1])
        places = torch.arange(begin, max(end, begin + 1), device=bounds.device)
        places = places if segments.index_k is None else segments.index_k[places]
        return Document(int(places[0]) // length_k, places % length_k)

    layouts = (
        ["plain"] + ["packed"] * (segments.bounds_q.numel() - 1 > batch) + ["padded"] * (segments.index_q is not None)
    )
    if problem := LEDGER.said(layouts):
        raise RefusedError(f"The model {problem}. Use attn_implementation='sdpa' or 'eager', and rows of their own.")
    two_sided = not getattr(getattr(module, "config", None), "is_encoder_decoder", False)
    if problem := LEDGER.problem(view, (length_q, length_k), longest, one_kind=two_sided):
        raise RefusedError(
            f"{type(module).__name__} {problem}: {VARLEN_ATTENTION} would compute something else here. Use "
            "attn_implementation='sdpa' or 'eager'."
        )


def _check_reach(name: str, prefix: PrefixSegments) -> None:
    """
    Refuse a window or chunk that ends within a prompt and its completion: it would have to be found across segments.
    """
    reach = LEDGER.reach()
    if reach is not None and reach < prefix.longest_context:
        raise RefusedError(
            f"{name} sees a window of {reach} tokens, and the longest prompt with its completion has "
            f"{prefix.longest_context}. Leave out longer rows, or do not share prompts."
        )


def _pattern_of(module: Any, sliding_window: int | None) -> AttentionPattern | None:
    patterns = getattr(getattr(module, "config", None), PATTERNS_FIELD, None)
    stored = patterns[module.layer_idx] if patterns is not None else None
    if stored is not None:
        return AttentionPattern(**stored)
    return None if sliding_window is None else AttentionPattern(window=sliding_window)


def _given_segments(tokens: int, bounds_q: Any, bounds_k: Any, max_q: int | None, max_k: int | None) -> _Segments:
    bounds_k = bounds_q if bounds_k is None else bounds_k
    max_q = int(bounds_q.diff().max()) if max_q is None else int(max_q)
    max_k = int(bounds_k.diff().max()) if max_k is None else int(max_k)
    if bounds_q.device.type == "cpu" and int(bounds_q[-1]) != tokens:
        raise ValueError(f"cu_seq_lens_q ends at {int(bounds_q[-1])}, but the batch has {tokens} tokens.")
    return _Segments(bounds_q, bounds_k, max_q, max_k)


#: The last segments found, with weak references to what they were found from: all layers of a forward pass, and their
#: recomputation, ask for the same ones, and each search waits for the device.
_last_found: tuple[Any, ...] | None = None


def _find_segments(
    batch: int,
    length_q: int,
    length_k: int,
    *,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    device: torch.device,
) -> _Segments:
    global _last_found
    sources = [t for t in (attention_mask, position_ids) if t is not None]
    key = (batch, length_q, length_k, device, *((id(t), None if t.is_inference() else t._version) for t in sources))
    if _last_found is not None:
        last_key, alive, segments = _last_found
        if last_key == key and all(reference() is not None for reference in alive):
            return segments
    if length_q == length_k:
        segments = _documents(batch, length_q, attention_mask, position_ids, device)
    else:
        segments = _rows(batch, length_q, length_k, attention_mask, device)
    _last_found = (key, [weakref.ref(t) for t in sources], segments)
    return segments


def _documents(
    batch: int,
    length: int,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    device: torch.device,
) -> _Segments:
    """A document begins with each row, and where positions do not go on by one."""
    row = torch.arange(batch, device=device).repeat_interleave(length)
    index = None
    if attention_mask is not None:
        index = attention_mask.flatten().nonzero().squeeze(1)
        row = row[index]
    begins = row.diff(prepend=row.new_full((1,), -1)) != 0
    if position_ids is not None and position_ids.shape[-1] == length and position_ids.dim() == 2:
        positions = position_ids.expand(batch, length).flatten()
        positions = positions if index is None else positions[index]
        begins |= positions.diff(prepend=positions[:1] - 1) != 1
    bounds = torch.cat([begins.nonzero().squeeze(1), row.new_tensor([row.numel()])]).to(torch.int32)
    longest = int(bounds.diff().max()) if bounds.numel() > 1 else 0
    return _Segments(bounds, bounds, longest, longest, index, index)


def _rows(
    batch: int, length_q: int, length_k: int, attention_mask: torch.Tensor | None, device: torch.device
) -> _Segments:
    """Decoding: each row is one document, whose queries are its last tokens."""
    if attention_mask is None:
        steps = torch.arange(batch + 1, dtype=torch.int32, device=device)
        return _Segments(steps * length_q, steps * length_k, length_q, length_k)
    if attention_mask.shape[1] != length_k:
        raise RefusedError(
            f"the padding mask has {attention_mask.shape[1]} columns for {length_k} keys: {VARLEN_ATTENTION} cannot "
            "read a static cache. Use a dynamic one, the default."
        )
    masks = attention_mask[:, -length_q:], attention_mask
    counts = [mask.sum(dim=1, dtype=torch.int32) for mask in masks]
    bounds = [torch.nn.functional.pad(count.cumsum(0, dtype=torch.int32), (1, 0)) for count in counts]
    indices = [mask.flatten().nonzero().squeeze(1) for mask in masks]
    return _Segments(*bounds, *(int(count.max()) for count in counts), *indices)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segments: _Segments,
    *,
    scaling: float | None,
    causal: bool,
    pattern: AttentionPattern | None,
) -> torch.Tensor:
    plain_window = pattern is None or not (pattern.sink or pattern.stride)
    if q.is_cuda and plain_window and not probing():
        window = (
            (-1, -1) if not causal else (-1 if pattern is None or pattern.window is None else pattern.window - 1, 0)
        )
        return _kernel(q, k, v, segments, scaling=scaling, window=window)
    bounds = segments.bounds_q.tolist(), segments.bounds_k.tolist()
    return segment_attention(q, k, v, *bounds, scale=scaling, causal=causal, pattern=pattern)


def _kernel(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segments: _Segments,
    *,
    scaling: float | None,
    window: tuple[int, int],
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = kernel_inputs(q, k, v)
    kwargs = _kernel_arguments(inspect.signature(varlen_attn).parameters, window, q.shape[1] // k.shape[1])
    if "enable_gqa" not in kwargs and q.shape[1] != k.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    # int32 and on the device is what the kernel reads; collators make the bounds on the CPU.
    bounds = (b.to(q.device, torch.int32) for b in (segments.bounds_q, segments.bounds_k))
    return varlen_attn(q, k, v, *bounds, segments.max_q, segments.max_k, scale=scaling, **kwargs)


def kernel_inputs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the tensors in the dtype of autocast, if torch's kernel takes them."""
    q, k, v = in_autocast_dtype(q, k, v)
    if q.dtype not in (torch.bfloat16, torch.float16):
        raise RefusedError(
            f"torch's variable-length attention takes bf16 and fp16, got {q.dtype}. Train with bf16=True, or load the "
            "model with dtype='bfloat16'."
        )
    if q.shape[-1] > _MAX_HEAD_DIM or v.shape[-1] != q.shape[-1]:
        raise RefusedError(
            f"torch's variable-length attention takes heads of one width up to {_MAX_HEAD_DIM}, got {q.shape[-1]} for "
            f"queries and {v.shape[-1]} for values. Use attn_implementation='sdpa'."
        )
    return q, k, v


def in_autocast_dtype(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the tensors as autocast gives them to attention: all in its dtype, but for double precision."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def _kernel_arguments(known: Iterable[str], window: tuple[int, int], groups: int) -> dict[str, Any]:
    """Return the keyword arguments of this torch's `varlen_attn` for a window and grouped queries."""
    known = set(known)
    if "window_size" in known:
        arguments: dict[str, Any] = {"window_size": window}
    elif window[0] == -1:
        arguments = {"is_causal": window[1] == 0}
    else:
        raise RefusedError(
            f"varlen_attn of torch {torch.__version__} has no sliding window. Update torch, or use "
            "attn_implementation='sdpa'."
        )
    if groups > 1 and "enable_gqa" in known:
        arguments["enable_gqa"] = True
    return arguments
