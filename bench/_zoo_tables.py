"""
The tables of `docs/zoo.md` from `bench/results/zoo.json`: one symbol a cell, and a letter for each reason to refuse.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from hf_effi.report.result_card import markdown_table

#: mark -> symbol; what is refused shows the letter of its reason
SYMBOLS = {"equal": "●", "partly": "◐", "n/a": "·", "neither": "**✗**"}
KINDS = {
    "causal": "Causal language models",
    "seq2seq": "Encoder-decoders",
    "masked": "Masked language models",
    "classifier": "Sequence classifiers",
}
#: reasons of a feature that have a letter of their own; further ones share the last
_LETTERS = "abcdefghijklmnopqrst"
_OTHER = "z"
_NAME = re.compile(r"\b(?:[A-Z][a-z0-9]*){2,}[A-Za-z0-9]*\b")
_PATH = re.compile(r"\b[a-z_]+(?:\.[a-z0-9_]+){2,}\b")
_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")
#: columns of the model tables, in this order; short, so that the table fits
COLUMNS = {
    "trim": "trim",
    "sort": "sort",
    "skip": "skip",
    "varlen": "varlen",
    "shared prefix": "prefix",
    "sequence parallelism": "seq. par.",
    "ChunkFlow": "Chunk- Flow",
    "streamed layers": "stream",
    "tiled MLP": "tiled MLP",
    "tiled loss": "tiled loss",
    "offload": "off- load",
    "layer modes": "layer modes",
    "random-LTD off": "LTD off",
    "fused LoRA": "fused LoRA",
    "kernel patch": "patch",
    "LM head": "LM head",
    "memory planner": "plan",
}


def gist(reason: str) -> str:
    """
    Return what reasons of several models have in common: without class names, module paths and figures.

    Example:
    ```python
    >>> gist("LlamaForCausalLM has 2 layers, off by 1.5e-01 in model.layers.0.mlp: leave it out.")
    'the model has N layers, off by N in a module: leave it out.'

    ```
    """
    text = _NUMBER.sub("N", _PATH.sub("a module", _NAME.sub("the model", reason)))
    return " ".join(text.split())


def _letters(rows: Iterable[Mapping[str, Any]], feature: str) -> dict[str, tuple[str, str, int]]:
    """Return `gist -> (letter, an example, how often)`; rare ones share a letter."""
    found: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for row in rows:
        cell = row["cells"].get(feature)
        if cell is not None and cell["mark"] in ("refused", "partly") and "why" in cell:
            key = gist(cell["why"])[:60]
            found[key] += cell["mark"] == "refused"
            examples.setdefault(key, cell["why"])
    named = [key for key, count in sorted(found.items(), key=lambda item: (-item[1], item[0])) if count]
    letters = [*_LETTERS, *[_OTHER] * len(named)]
    return {key: (letter, examples[key], found[key]) for key, letter in zip(named, letters, strict=False)}


def _classes(result: Mapping[str, Any], kind: str | None = None) -> list[Mapping[str, Any]]:
    rows = [row for row in result["rows"] if "cells" in row]
    return [row for row in rows if kind in (None, row["kind"])]


def models_table(result: Mapping[str, Any]) -> str:
    """Return one table a kind of models: classes by features."""
    parts = []
    everything = _classes(result)
    letters = {feature: _letters(everything, feature) for feature in COLUMNS}
    for kind, title in KINDS.items():
        rows = _classes(result, kind)
        used = [f for f in COLUMNS if any(f in row["cells"] for row in rows)]
        names = Counter(row["class"] for row in rows)
        lines = [
            [row["class"] + (f" ({row['model_type']})" if names[row["class"]] > 1 else "")]
            + [_symbol(row["cells"].get(feature), letters[feature]) for feature in used]
            for row in rows
        ]
        table = markdown_table(["class", *(COLUMNS[f] for f in used)], lines, numbers=False)
        parts.append(f'### {title}\n\n<div class="zoo" markdown="1">\n\n{table}\n\n</div>')
    return "\n\n".join(parts)


def _symbol(cell: Mapping[str, Any] | None, letters: Mapping[str, tuple[str, str, int]]) -> str:
    if cell is None:
        return ""
    if cell["mark"] == "refused":
        return letters[gist(cell["why"])[:60]][0]
    return SYMBOLS[cell["mark"]]


def reasons_table(result: Mapping[str, Any]) -> str:
    """Return what each letter of each feature stands for, with the message as one class gets it."""
    rows = _classes(result)
    lines = []
    for feature in COLUMNS:
        found = _letters(rows, feature)
        own = [(letter, example, count) for letter, example, count in found.values() if letter != _OTHER]
        lines += [[feature, letter, str(count), escape(example, quote=False)] for letter, example, count in own]
        if others := [count for letter, _, count in found.values() if letter == _OTHER]:
            lines.append([feature, _OTHER, str(sum(others)), f"{len(others)} further reasons"])
    return markdown_table(["feature", "", "classes", "message, as one class gets it"], lines, numbers=False)


def settings_table(result: Mapping[str, Any]) -> str:
    """Return one row per setting: whether the features were equal with it, refused it, or both."""
    rows = [row for row in result["rows"] if "counts" in row]
    lines = [
        [f"{row['axis']}: {row['level']}", *(_share(row["counts"].get(feature, (0, 0))) for feature in COLUMNS)]
        for row in rows
    ]
    return (
        f'<div class="zoo" '
        f'markdown="1">\n\n{markdown_table(["setting", *COLUMNS.values()], lines, numbers=False)}\n\n</div>'
    )


def _share(counts: Sequence[int]) -> str:
    equal, refused = counts
    if not equal + refused:
        return ""
    return SYMBOLS["equal"] if not refused else "○" if not equal else f"{100 * equal / (equal + refused):.0f}"


def missing_table(result: Mapping[str, Any]) -> str:
    """Return the classes that could not be built, each with its error."""
    rows = [row for row in result["rows"] if "error" in row]
    return markdown_table(
        ["class", "kind", "error of transformers"],
        [[row["class"], KINDS[row["kind"]].lower(), escape(row["error"], quote=False)] for row in rows],
        numbers=False,
    )


VIEWS = {
    "models": models_table,
    "settings": settings_table,
    "reasons": reasons_table,
    "missing": missing_table,
}
