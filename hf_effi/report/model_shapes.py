"""Which model a config stands for, and how to build it without data."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.core_model_loading import build_glob_alternation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from ..errors import RefusedError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: Attention that runs here as it does in training. Others are traced as fused attention without masks, as
#: FlashAttention.
TRACED_ATTENTION = ("sdpa", "eager")
#: Not in the table of masks, so that transformers builds none and the attention is the fused causal one.
_MASKLESS = "hf_effi_maskless_sdpa"


def load_config(source: str) -> PreTrainedConfig:
    """
    Return a model config from a `config.json`, a folder that has one, or the name of a model on the Hub.

    Raises:
        ValueError: there is none.
    """
    path = Path(source)
    if path.name.endswith(".json") and (path.name != "config.json" or not path.exists()):
        raise ValueError(f"{source!r} is no model config: give a config.json that exists, its folder, or a Hub name.")
    try:
        return AutoConfig.from_pretrained(str(path.parent if path.name.endswith(".json") else source))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{source!r} is no model config: {str(error).splitlines()[0]}") from error


def model_class_of(config: PreTrainedConfig) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """
    Return the class that a config is loaded as for language modelling, and the part of the config that it takes.

    It is the one that `architectures` name, or the first that the auto classes know: causal (encoder-decoder first,
    where the config is of one), image and text to text, encoder-decoder. Classes without an LM head do not count.

    Raises:
        RefusedError: there is none.
    """
    autos = [AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM]
    if getattr(config, "is_encoder_decoder", False):
        autos.insert(0, autos.pop())
    classes = [one for auto in autos if type(config) in auto._model_mapping for one in _classes(auto, type(config))]
    if not classes:
        # The text part of a config of several parts; its class is listed under the whole.
        listed = (one for auto in autos for whole in auto._model_mapping for one in _classes(auto, whole))
        classes = [one for one in listed if getattr(one, "config_class", None) is type(config)]
    if not classes:
        raise RefusedError(
            f"{type(config).__name__} is no config of a causal language model or of an encoder-decoder."
        )
    named = set(getattr(config, "architectures", None) or ())
    chosen = next((one for one in classes if one.__name__ in named), classes[0])
    text = config.get_text_config()
    takes_text = not isinstance(config, chosen.config_class) and isinstance(text, chosen.config_class)
    return chosen, text if takes_text else config


def _classes(auto: Any, config_class: type) -> tuple[type, ...]:
    found = auto._model_mapping[config_class]
    return tuple(found) if isinstance(found, (list, tuple)) else (found,)


def build_on_meta(config: PreTrainedConfig, dtype: str, attention: str | None) -> PreTrainedModel:
    """
    Build the model of a config on the meta device.

    Args:
        config (`PreTrainedConfig`): Stays as it is.
        dtype (`str`): A key of `DTYPES`.
        attention (`str`, *optional*): By default the one of the config, or the one that transformers takes.

    Raises:
        ValueError: an unknown dtype.
        RefusedError: a model that cannot be built.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not known. Known: {', '.join(DTYPES)}.")
    model_class, config = model_class_of(copy.deepcopy(config))  # building a model writes into it
    wanted = {} if attention is None else {"attn_implementation": attention}
    try:
        with torch.device("meta"):
            return _kept_in_fp32(model_class._from_config(config, dtype=DTYPES[dtype], **wanted), DTYPES[dtype])
    except Exception as error:  # of upstream's code for this class, which may raise anything
        raise RefusedError(f"the model of {type(config).__name__} cannot be built: {_first_line(error)}") from error


def _kept_in_fp32(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """
    Convert back what `from_pretrained` leaves in fp32 where 16 bits are asked for, by its own rule: routers, for
    example.
    """
    if patterns := list(model._get_dtype_plan(dtype)):
        kept, *_ = build_glob_alternation(patterns)
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if kept.search(name):
                tensor.data = tensor.data.float()
    return model


def wanted_attention(config: PreTrainedConfig, attention: str | None) -> tuple[str | None, str | None]:
    """
    Return the attention to build with, and the one that it stands for where it is another.

    Args:
        config (`PreTrainedConfig`): A config, or one that a model has been built from.
        attention (`str`, *optional*): As in [`build_on_meta`].
    """
    wanted = attention or getattr(config, "_attn_implementation", None)
    if wanted is None or wanted in TRACED_ATTENTION:
        return wanted, None
    return _MASKLESS, wanted


@contextlib.contextmanager
def maskless_attention() -> Iterator[None]:
    """Have transformers know the attention without masks inside."""
    AttentionInterface.register(_MASKLESS, sdpa_attention_forward)
    try:
        yield
    finally:
        AttentionInterface._global_mapping.pop(_MASKLESS, None)


def plain_token(config: PreTrainedConfig) -> int:
    """Return a token id that means nothing special: no padding, no image."""
    special = set()
    for part in (config, config.get_text_config()):
        for name, value in part.to_dict().items():
            if name.endswith(("token_id", "token_index", "_ids")):
                special |= set(value if isinstance(value, (list, tuple)) else [value])
    return next(token for token in range(len(special) + 1) if token not in special)


def quantization_of(config: PreTrainedConfig) -> str | None:
    """Return the method by which the weights of a checkpoint are quantized, as its config says, or `None`."""
    wanted = getattr(config, "quantization_config", None)
    if wanted is None:
        return None
    found = wanted.get("quant_method") if isinstance(wanted, dict) else getattr(wanted, "quant_method", None)
    return str(getattr(found, "value", found))


def setting(config: PreTrainedConfig, name: str) -> Any:
    """Return a field of a config, or `None` where there is none, or one for each layer."""
    try:
        return getattr(config, name)
    except Exception:  # transformers raises its own kind of error for fields that differ from layer to layer
        return None


def four_bit_linears(model: Any) -> list[torch.nn.Module]:
    """
    Return the layers that transformers stores in 4 bits, by its own rule: not the LM head, nor what is tied to it.
    """
    left = get_keys_to_not_convert(model)
    linear = [(name, m) for name, m in model.named_modules() if isinstance(m, Conv1D) or type(m) is torch.nn.Linear]
    return [module for name, module in linear if should_convert_module(name, left)]


def with_lora(model: Any, rank: int, targets: list[str] | str) -> Any:
    """Wrap a model by PEFT."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=rank, target_modules=targets, task_type="CAUSAL_LM"))


def unwrapped(model: Any) -> Any:
    """Return the model of transformers below PEFT's wrapper."""
    return model.getbase_model() if hasattr(model, "getbase_model") else model


def base_model(model: Any) -> Any:
    """Return the model without its LM head, also below PEFT's wrapper."""
    return unwrapped(model).base_model


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
