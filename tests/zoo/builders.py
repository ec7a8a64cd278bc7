"""Tiny models of every class that transformers maps to a task, made by shrinking the default of its config."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from ._overrides import LAYERS, OVERRIDES

VOCAB, PAD, BOS, EOS = 97, 0, 1, 2
SEED = 0

#: kind -> transformers' mapping from model types to the names of classes
KINDS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "classifier": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}

#: pattern of a field's name -> its size in a tiny model; the first that fits wins, and no field ever grows
SIZES: tuple[tuple[str, int], ...] = (
    (r".*vocab_size(_per_layer_input)?|unpadded_vocab_size|.*_vocab_size_base", VOCAB),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|max_(source|target)_positions", 64),
    (r"original_max_position_embeddings", 32),
    (r"intermediate_size.*|ffn_dim|.*_ffn_dim|dff|dim_ff|n_inner|d_ff|ffn_hidden_size|d_inner|feed_forward_size", 48),
    (r".*intermediate_size|expert_ffn_hidden_size|prompt_mid_dim", 48),
    (r"hidden_size|d_model|n_embd|emb_dim|embedding_dim|dim|word_embed_proj_dim|lru_width|attention_hidden_size", 32),
    (r".*embedding_size|hidden_size_per_layer_input|router_hidden_size|ple_embed_dim|output_dim|projection_dim", 16),
    (r"linear_num_value_heads|linear_num_heads|mamba_num_heads|mamba_n_heads|n_mamba_heads", 4),
    (r"linear_num_key_heads", 2),
    (r".*attention_heads|n_heads?|num_heads|index(er)?_n_heads|indexer_kv_heads", 4),
    (r"mamba_(d_head|head_?dim)", 16),
    (r"qk_rope_head_dim|qk_nope_head_dim", 4),
    (r".*head_dim|d_head|d_kv|kv_channels|dim_head|attention_head_size", 8),
    (r".*(encoder|decoder|hidden)_layers|n_layers?|num_layers|num_blocks|decoder_layers|num_mem_blocks", 2),
    (r"num_(local_|routed_)?experts|n_routed_experts|moe_num_experts|zero_expert_num", 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|top_k_experts", 2),
    (r".*shared_experts", 1),
    (r"n_groups?|num_expert_group|topk_group|mamba_n_?groups|o_groups", 1),
    (r"q_lora_rank", 16),
    (r".*(lora_rank|_rank|lowrank|dt_rank)|d_rel|time_step_rank", 8),
    (r"sliding_window(_size)?|attention_chunk_size|window_size|local_attention|attention_window_size|rel_extent", 8),
    (r"index_topk|indexer_budget", 8),
    (r"index_block_size|index_topk_blocks|keep_window_size", 4),
    (r".*d_state|state_size|ssm_state_size", 8),
    (r".*chunk_size|chunk_size", 8),
    (r"image_size|audio_chunk_size", 32),
    (r"num_mel_bins", 8),
)
_SIZES = tuple((re.compile(pattern), size) for pattern, size in SIZES)
#: what a field is where the default is None, which a tiny model cannot be derived from
FILLED = {"head_dim": 8, "num_key_value_heads": 2}
_KEY_VALUE_HEADS = re.compile(r".*key_value_heads|num_kv_heads|num_query_groups")
_COUNTS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "num_decoder_layers",
    "decoder_layers",
    "num_blocks",
)
#: chunked feed-forward is an option of its own, off by default
_LEFT = {"chunk_size_feed_forward", "chunk_size_lm_head", "window_size_unused"}
_DROPOUT = re.compile(r".*(dropout|pdrop|dropout_p|dropout_prob|layerdrop|jitter_noise)")
_NO_DROPOUT = re.compile(r"classifier_dropout.*|summary.*")


class CannotBuild(Exception):
    """A class of which no tiny model could be made; the message is the error of transformers."""


@dataclass(frozen=True)
class Family:
    """
    One class of models. Only its names are read until it is built.

    Args:
        kind (`str`): A key of `KINDS`.
        model_type (`str`): The type that transformers maps to the class.
        name (`str`): The class.
    """

    kind: str
    model_type: str
    name: str

    @property
    def model_class(self) -> type[PreTrainedModel]:
        return getattr(transformers, self.name)

    @property
    def config_class(self) -> type[PreTrainedConfig]:
        """The config of the type, or the part of it that the class is made from, as `AutoModel.from_config` does."""
        config_class = CONFIG_MAPPING[self.model_type]
        parts = (getattr(config_class, "sub_configs", None) or {}).values()
        return self.model_class.config_class if self.model_class.config_class in parts else config_class


@dataclass
class Tiny:
    """
    A built model and what it was built from.

    Args:
        family ([`Family`]): Its class.
        model (`PreTrainedModel`): In fp64, in evaluation mode as `from_pretrained` returns it.
        settings (`dict`): What the config was called with.
    """

    family: Family
    model: PreTrainedModel
    settings: dict[str, Any] = field(default_factory=dict)


def families(kind: str) -> list[Family]:
    """Return every class of a kind once for each config class that it is made from, in the order of names."""
    names = KINDS[kind]
    found: dict[tuple[str, str], Family] = {}
    for model_type, classes in names.items():
        for name in classes if isinstance(classes, (tuple, list)) else (classes,):
            if names.get(f"{model_type}_text") != name:  # which has the part of the config that the class is made from
                found.setdefault((name, CONFIG_MAPPING_NAMES[model_type]), Family(kind, model_type, name))
    return [found[key] for key in sorted(found)]


# --- configs -------------------------------------------------------------------------------------------------------


def tiny_settings(config_class: type[PreTrainedConfig], layers: int | None = None) -> dict[str, Any]:
    """
    Return the arguments with which a config is tiny.

    Args:
        config_class (`type`): A config class of transformers.
        layers (`int`, *optional*): At least so many layers.
    """
    overrides = OVERRIDES.get(config_class.model_type, {})
    default = _default(config_class, overrides)
    values = _fields(default)
    settings = {name: size for name, value in values.items() if (size := _size(name, value)) is not None}
    settings |= _heads(values, settings)
    settings |= {name: value for name, value in FILLED.items() if name in values and values[name] is None}
    if "qk_rope_head_dim" in settings and isinstance(values.get("head_dim"), int):
        settings["head_dim"] = settings["qk_rope_head_dim"]  # of the rotated part
    settings |= {name: 0.0 for name, value in values.items() if _is_dropout(name) and value}
    settings |= _tokens(values, settings.get("vocab_size", VOCAB))
    settings |= _layers(config_class, values, layers)
    if isinstance(values.get("rope_parameters"), dict):
        settings["rope_parameters"] = values["rope_parameters"]
    for name, sub_class in (getattr(config_class, "sub_configs", None) or {}).items():
        settings[name] = _nested(getattr(default, name, None), sub_class, layers, name)
        if settings[name] is None:
            del settings[name]
    settings.update({name: _long_enough(name, value, layers or 0) for name, value in overrides.items()})
    return settings


def _long_enough(name: str, value: Any, layers: int) -> Any:
    """Repeat the layers of an override where they are too few."""
    if name in _COUNTS:
        return max(value, layers)
    if name.endswith("_types") or name == "layers_block_type":
        return [value[index % len(value)] for index in range(max(len(value), layers))]
    return value


def _default(config_class: type[PreTrainedConfig], overrides: Mapping[str, Any]) -> PreTrainedConfig:
    try:
        return config_class()
    except Exception:
        return config_class(**overrides)


def _fields(config: PreTrainedConfig) -> dict[str, Any]:
    own = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    reverse = getattr(config, "attribute_map", None) or {}
    return {name: value for name, value in own.items() if name not in reverse}


def _size(name: str, value: Any) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int) or name in _LEFT or _KEY_VALUE_HEADS.fullmatch(name):
        return None
    for pattern, size in _SIZES:
        if pattern.fullmatch(name):
            return size if value > size else None
    return None


def _heads(values: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, int]:
    """
    As many key and value heads as query heads where the default has that, else half of them, or the one there is.
    """
    found = {}
    for name, value in values.items():
        if _KEY_VALUE_HEADS.fullmatch(name) and isinstance(value, int) and not isinstance(value, bool):
            prefix = name.split("num_")[0]
            queries = values.get(f"{prefix}num_attention_heads", values.get("num_attention_heads"))
            mine = settings.get(f"{prefix}num_attention_heads", settings.get("num_attention_heads", 4))
            found[name] = mine if value == queries else min(value, 2)
    return found


def _is_dropout(name: str) -> bool:
    return _DROPOUT.fullmatch(name) is not None


def _tokens(values: Mapping[str, Any], vocab: int) -> dict[str, Any]:
    """Token ids inside of the vocabulary."""
    fixed = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    found: dict[str, Any] = {name: value for name, value in fixed.items() if name in values}
    others = [n for n in values if re.fullmatch(r".*_(token|tokens)_(id|index)|.*_index", n) and n not in fixed]
    for place, name in enumerate(others):
        if isinstance(values[name], int) and values[name] >= vocab:
            found[name] = vocab - 1 - place
    return found


def _layers(config_class: type, values: Mapping[str, Any], at_least: int | None) -> dict[str, Any]:
    """The fewest layers, two at least, that show every entry of the lists that have one entry per layer."""
    count_name = next((name for name in _COUNTS if isinstance(values.get(name), int)), None)
    if count_name is None:
        return {}
    fixed = LAYERS.get(config_class.model_type)
    lists = {
        name: value
        for name, value in values.items()
        if isinstance(value, (list, tuple)) and len(value) == values[count_name] and name != "architectures"
    }
    wanted = max(2, at_least or 0, fixed or 0)
    chosen = _cover(lists, values[count_name], wanted)
    found = {count_name: len(chosen)} | {name: [value[i] for i in chosen] for name, value in lists.items()}
    if isinstance(values.get("per_layer_config"), dict):
        found["per_layer_config"] = _own_of_layers(values, chosen)
    return found


def _own_of_layers(values: Mapping[str, Any], chosen: Sequence[int]) -> dict[int, dict[str, Any]]:
    """What single layers have for themselves, twice as large as in the others where it is larger there."""
    own = {int(index): part for index, part in values["per_layer_config"].items()}
    return {
        place: {
            name: value if (size := _size(name, value)) is None else size * (1 + (value > values.get(name, value)))
            for name, value in own[index].items()
        }
        for place, index in enumerate(chosen)
        if index in own
    }


def _cover(lists: Mapping[str, Sequence[Any]], count: int, wanted: int) -> list[int]:
    seen: set[tuple[str, str]] = set()
    chosen = []
    for index in range(count):
        new = {(name, str(value[index])) for name, value in lists.items()} - seen
        if new:
            chosen.append(index)
            seen |= new
    for index in range(count):
        if len(chosen) >= min(wanted, count):
            break
        if index not in chosen:
            chosen.append(index)
    return sorted(chosen)[:8]


def _nested(value: Any, sub_class: Any, layers: int | None, name: str) -> Any:
    if value is None and sub_class is AutoConfig:
        return None
    if isinstance(value, PreTrainedConfig):
        sub_class = type(value)
    if not isinstance(sub_class, type) or sub_class is AutoConfig:
        return None
    settings = tiny_settings(sub_class, layers)
    if issubclass(sub_class, PreTrainedConfig) and sub_class.model_type:
        settings["model_type"] = sub_class.model_type
    return settings


# --- models --------------------------------------------------------------------------------------------------------


def build(
    family: Family,
    change: Callable[[PreTrainedConfig], None] | None = None,
    *,
    layers: int | None = None,
    attention: str | None = None,
    dtype: torch.dtype = torch.float64,
    over: Mapping[str, Any] | None = None,
) -> Tiny:
    """
    Build one tiny model with random weights that let every path show.

    Args:
        family ([`Family`]): The class.
        change (`Callable`, *optional*): Changes the config before the model is made.
        layers (`int`, *optional*): At least so many.
        attention (`str`, *optional*): `attn_implementation`.
        dtype (`torch.dtype`, *optional*, defaults to fp64): Of the weights.
        over (`dict`, *optional*): Further arguments of the config.

    Raises:
        CannotBuild: with the error of transformers.
    """
    try:
        settings = {**tiny_settings(family.config_class, layers), **(over or {})}
        config = family.config_class(**settings)
        if family.kind == "causal" and getattr(config, "is_decoder", None) is False:
            config.is_decoder = True
        if family.kind == "seq2seq" and getattr(config, "decoder_start_token_id", None) is None:
            config.decoder_start_token_id = BOS
        if change is not None:
            change(config)
        config._attn_implementation = attention or _attention_of(family)
        if family.model_class._can_set_experts_implementation():
            config._experts_implementation = "eager"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            model = family.model_class(config)
            randomize(model)
    except Exception as error:
        raise CannotBuild(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
    return Tiny(family, model.to(dtype).eval(), settings)


def _attention_of(family: Family) -> str:
    return "sdpa" if getattr(family.model_class, "_supports_sdpa", False) else "eager"


def randomize(model: nn.Module) -> None:
    """
    Give every weight a size at which it matters: fresh weights of 0.02 make attention uniform and hide positions.

    Draws from the global generator.
    """
    with torch.no_grad():
        for _name, weight in model.named_parameters():
            if not weight.is_floating_point():
                continue
            noise = torch.randn(weight.shape)
            if weight.dim() >= 2:
                weight.copy_(0.8 * noise / math.sqrt(weight.shape[-1]))
            else:
                weight.add_(0.1 * noise)
