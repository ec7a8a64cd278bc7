"""Which settings each class is tried with: a covering design in which every pair of levels comes together once."""

from __future__ import annotations

import copy
import itertools
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig

#: axis -> its level
Row = dict[str, str]

#: the first level of an axis is the plain one; where a pair asks for nothing else, that one is taken
BATCH_AXES: dict[str, tuple[str, ...]] = {
    "padding": ("none", "left", "right"),
    "packing": ("no", "yes"),
    "lora": ("no", "yes"),
    "checkpointing": ("no", "yes"),
}
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
#: axes whose other levels most features refuse, so that they hide what else a row has: no row has two of them
HIDING = ("dropout", "router", "rope")

_DROPOUT_KINDS = {
    "attention": re.compile(r"attention_dropout|attn_pdrop|attn_dropout|attention_probs_dropout_prob"),
    "residual": re.compile(r"resid_pdrop|resid_dropout|residual_dropout|hidden_dropout|hidden_dropout_prob|dropout"),
    "embedding": re.compile(r"embd_pdrop|emb_pdrop|embed_dropout|embedding_dropout"),
    "other": re.compile(r"activation_dropout|mlp_dropout|ffn_dropout|router_jitter_noise|input_jitter_noise"),
}


def covering_design(
    axes: Mapping[str, Sequence[str]], seed: int = 0, allowed: Callable[[Row], bool] = lambda row: True
) -> list[Row]:
    """
    Return rows in which every allowed pair of levels of two axes comes together at least once.

    Greedy: each row begins with a pair that is still missing and takes, axis by axis, the level with the most missing
    pairs; without any, the first level. The first row has the first level everywhere.

    Args:
        axes (`Mapping[str, Sequence[str]]`): The levels of each axis, the plain one first.
        seed (`int`, *optional*, defaults to 0): Of the order in which axes are filled.
        allowed (`Callable`, *optional*): Whether a row, which may lack axes, can be.

    Example:
    ```python
    >>> rows = covering_design({"a": ["0", "1"], "b": ["0", "1"], "c": ["0", "1"]})
    >>> len(rows), rows[0]
    (4, {'a': '0', 'b': '0', 'c': '0'})

    ```
    """
    rng = random.Random(seed)
    missing = set(pairs(axes, allowed))
    rows = [{name: levels[0] for name, levels in axes.items()}]
    missing -= set(_pairs_of(rows[0]))
    while missing:
        row = _new_row(axes, missing, rng, allowed)
        rows.append(row)
        missing -= set(_pairs_of(row))
    return rows


def pairs(axes: Mapping[str, Sequence[str]], allowed: Callable[[Row], bool]) -> Iterator[tuple[Any, Any]]:
    """Yield every pair of levels of two axes that is allowed."""
    for (a, first), (b, second) in itertools.combinations(sorted(axes.items()), 2):
        for one, two in itertools.product(first, second):
            if allowed({a: one, b: two}):
                yield (a, one), (b, two)


def _pairs_of(row: Row) -> Iterator[tuple[Any, Any]]:
    return itertools.combinations(sorted(row.items()), 2)


def _new_row(
    axes: Mapping[str, Sequence[str]], missing: set[Any], rng: random.Random, allowed: Callable[[Row], bool]
) -> Row:
    row: Row = dict(min(missing))
    others = [name for name in axes if name not in row]
    rng.shuffle(others)
    for name in others:
        gains = []
        for place, level in enumerate(axes[name]):
            if allowed({**row, name: level}):
                gain = sum(tuple(sorted([(name, level), item])) in missing for item in row.items())
                gains.append((-gain, place, level))
        row[name] = min(gains)[2]
    return {name: row[name] for name in axes}


def compatible(row: Row) -> bool:
    """A packed row has no padding, and at most one axis has a level that most features refuse."""
    if row.get("packing", "no") == "yes" and row.get("padding", "none") != "none":
        return False
    return sum(row.get(name, _PLAIN[name]) != _PLAIN[name] for name in HIDING) < 2


_SOFTCAPS = ("attn_logit_softcapping", "final_logit_softcapping")
_PLAIN = {"dropout": "none", "router": "no", "rope": "default"}


# --- what each config has ----------------------------------------------------------------------------------------


def axes_of(config: PreTrainedConfig, kind: str = "causal") -> dict[str, tuple[str, ...]]:
    """Return the axes that a class can be tried on, by the fields of its tiny config."""
    text = config.get_text_config()
    axes = dict(BATCH_AXES)
    if kind != "causal":
        del axes["packing"]
    if isinstance(heads := vars(text).get("num_key_value_heads"), int) and heads > 1:
        axes["heads"] = ("several", "one")
    if _can_window(text):
        axes["window"] = ("as it is", "8")
    if any(hasattr(text, name) for name in _SOFTCAPS):
        axes["softcap"] = ("off", "on") if _can_be_none(text) else ("always",)
    if isinstance(getattr(config, "tie_word_embeddings", None), bool) and kind == "causal":
        axes["tied"] = ("no", "yes")
    if kinds := [kind for kind in _DROPOUT_KINDS if _dropout_fields(text, kind)]:
        axes["dropout"] = ("none", *kinds)
    if hasattr(text, "output_router_logits"):
        axes["router"] = ("no", "yes")
    rope = getattr(text, "rope_parameters", None)
    if isinstance(rope, dict) and "rope_type" in rope:
        axes["rope"] = ROPE_TYPES
    return axes


def _can_be_none(text: PreTrainedConfig) -> bool:
    """Some configs take a number only."""
    text = copy.deepcopy(text)
    try:
        for name in _SOFTCAPS:
            if hasattr(text, name):
                setattr(text, name, None)
    except Exception:
        return False
    return True


def _can_window(text: PreTrainedConfig) -> bool:
    kinds = set(getattr(text, "layer_types", None) or ())
    return hasattr(text, "sliding_window") and kinds <= {"full_attention", "sliding_attention"}


def _dropout_fields(text: PreTrainedConfig, kind: str) -> list[str]:
    return [n for n, v in vars(text).items() if _DROPOUT_KINDS[kind].fullmatch(n) and isinstance(v, (int, float))]


def change_config(config: PreTrainedConfig, row: Row) -> None:
    """Give a tiny config the levels of a row."""
    text = config.get_text_config()
    if row.get("heads") == "one":
        text.num_key_value_heads = 1
    if row.get("window") == "8":
        text.sliding_window = 8
        if hasattr(text, "use_sliding_window"):
            text.use_sliding_window = True
        if getattr(text, "layer_types", None):
            text.layer_types = ["sliding_attention", *text.layer_types[1:]]
    if row.get("softcap", "always") != "always":
        for name in _SOFTCAPS:
            if hasattr(text, name):
                setattr(text, name, 5.0 if row["softcap"] == "on" else None)
    if "tied" in row:
        config.tie_word_embeddings = text.tie_word_embeddings = row["tied"] == "yes"
    if row.get("dropout", "none") != "none":
        for name in _dropout_fields(text, row["dropout"]):
            setattr(text, name, 0.3)
    if row.get("router") == "yes":
        text.output_router_logits = True
        if hasattr(text, "router_aux_loss_coef"):
            text.router_aux_loss_coef = 0.5
    if row.get("rope", "default") != "default":
        text.rope_parameters = {**text.rope_parameters, **_rope(text, row["rope"])}
        if row["rope"] in ("dynamic", "longrope"):
            text.max_position_embeddings = 8 if row["rope"] == "dynamic" else 32


def _rope(text: PreTrainedConfig, kind: str) -> dict[str, Any]:
    """Parameters under which rows of 16 tokens are longer than what the model was made for."""
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    size = int(head_dim * text.rope_parameters.get("partial_rotary_factor", 1.0)) // 2
    own: dict[str, dict[str, Any]] = {
        "linear": {"factor": 4.0},
        "dynamic": {"factor": 4.0, "original_max_position_embeddings": 8},
        "yarn": {"factor": 4.0, "original_max_position_embeddings": 8},
        "llama3": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8,
        },
        "longrope": {
            "short_factor": [1.0] * size,
            "long_factor": [4.0 + index for index in range(size)],
            "original_max_position_embeddings": 8,
            "factor": 4.0,
        },
    }
    return {"rope_type": kind, **own[kind]}
