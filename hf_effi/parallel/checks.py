"""What sequence parallelism needs of a model, and what it can tell about DeepSpeed's own."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import RefusedError
from .groups import check_heads

_SUPPORTED_LAYERS = {"full_attention", "sliding_attention"}
#: RoPE variants whose frequencies depend on the longest position in the forward, which differs between shards.
_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}


def attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the attention layers of a transformers model by name: what has a layer index and a causality flag."""
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "layer_idx") and hasattr(module, "is_causal")
    }


def implementation_of(model: nn.Module) -> str:
    """Return the name of the attention backend of a model."""
    config: Any = model.config
    return config.get_text_config()._attn_implementation


def check_model(model: nn.Module, size: int) -> None:
    """
    Refuse a model on which sequence parallelism would not be exact, before any training.

    Args:
        model (`nn.Module`): A causal language model or sequence classifier of transformers; PEFT's wrapper is fine.
        size (`int`): Ranks a sequence is split over.

    Raises:
        RefusedError: the reason and, where there is one, the fix.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise RefusedError(f"{type(model).__name__} is not a transformers model; it has no config.")
    text = config.get_text_config()
    _check_kind(model, config, text)
    _check_layers(model, text)
    heads = text.num_attention_heads
    check_heads(size, heads, getattr(text, "num_key_value_heads", None) or heads)


def _check_kind(model: nn.Module, config: Any, text: Any) -> None:
    if text is not config or getattr(config, "is_encoder_decoder", False):
        raise RefusedError(
            f"{type(model).__name__} is multimodal or an encoder-decoder; only decoder-only text models can run."
        )
    if any(
        getattr(peft, "is_prompt_learning", False) for peft in (getattr(model, "peft_config", None) or {}).values()
    ):
        raise RefusedError(
            "PEFT prompt learning adds virtual tokens behind the split. Use LoRA or another adapter of weights."
        )
    if getattr(text, "output_router_logits", False):
        raise RefusedError(
            "output_router_logits=True: the router's balancing loss needs the tokens of all ranks. Set "
            "model.config.output_router_logits=False."
        )
    rope: dict[str, Any] = getattr(text, "rope_parameters", None) or {}
    kinds: set[Any] = {rope.get("rope_type")} | {
        part.get("rope_type") for part in rope.values() if isinstance(part, dict)
    }
    if found := kinds & _LENGTH_DEPENDENT_ROPE:
        raise RefusedError(
            f"rope_type={sorted(found)[0]!r} depends on the longest position in a forward, and each rank sees only "
            "its own. Use 'linear', 'yarn' or 'llama3'."
        )


def _check_layers(model: nn.Module, text: Any) -> None:
    kinds = {str(kind) for kind in getattr(text, "layer_types", None) or ()}
    if other := sorted(kinds - _SUPPORTED_LAYERS):
        raise RefusedError(
            f"The model has layers of type {', '.join(other)}: recurrent, linear and chunked attention carries state "
            "along the sequence, which sequence parallelism does not pass between ranks."
        )
    layers = attention_layers(model)
    if len(layers) != text.num_hidden_layers:
        raise RefusedError(
            f"{type(model).__name__} has {text.num_hidden_layers} layers, of which {len(layers)} are attention that "
            "transformers can redirect; the others (recurrent, or attention of their own) would see one shard only."
        )
    implementation = implementation_of(model)
    if implementation not in ALL_ATTENTION_FUNCTIONS:
        raise RefusedError(
            f"attn_implementation={implementation!r} does not go through transformers' attention interface. Load the "
            "model with attn_implementation='sdpa', 'flash_attention_2' or 'flex_attention'."
        )
    if not getattr(model, "_supports_attention_backend", True):
        raise RefusedError(
            f"{type(model).__name__} implements its attention itself instead of through transformers' interface."
        )


def check_deepspeed(parallelism: Any, deepspeed_plugin: Any, packed: bool) -> str | None:
    """
    Say what is wrong with a run of DeepSpeed's own Ulysses (`ParallelismConfig(sp_size=P)`).

    Args:
        parallelism (`accelerate.ParallelismConfig`, *optional*): `accelerator.parallelism_config`.
        deepspeed_plugin (`accelerate.DeepSpeedPlugin`, *optional*): `accelerator.state.deepspeed_plugin`.
        packed (`bool`): Whether batches are packed or padding-free.

    Returns:
        `str`, *optional*: A warning, for what trains on but not as configured.

    Raises:
        RefusedError: for what stops at the first batch.
    """
    if parallelism is None or deepspeed_plugin is None or not parallelism.sp_enabled:
        return None
    size, stage = parallelism.sp_size, deepspeed_plugin.zero_stage
    if packed:
        raise RefusedError(
            f"DeepSpeed's sequence parallelism (sp_size={size}) cannot take packed or padding-free batches: its "
            "UlyssesSPDataLoaderAdapter reads dimension 1 of every tensor, and cu_seq_lens_q has one dimension "
            "(IndexError at the first batch). Set packing=False and padding_free=False, or use "
            f"sequence_parallel_size={size} instead of sp_size={size}, which keeps packed documents apart."
        )
    if stage == 0:
        return (
            f"DeepSpeed ZeRO-0 with sp_size={size} is reported to crash at the first optimizer step (DeepSpeed issue "
            f"7833). Use ZeRO-3, or sequence_parallel_size={size} instead of sp_size={size}."
        )
    if stage in (1, 2):
        return (
            f"DeepSpeed ZeRO-{stage} with sp_size={size} multiplies every gradient by {size}: the differentiable "
            f"gather of the loss adds {size} copies, and ZeRO-{stage} divides by the data-parallel ranks only. Adam "
            f"hides it, but grad_norm is {size} times too large and max_grad_norm clips {size} times too early. Use "
            f"ZeRO-3, or set max_grad_norm to {size} times the value you want, or use sequence_parallel_size={size} "
            "instead."
        )
    return None
