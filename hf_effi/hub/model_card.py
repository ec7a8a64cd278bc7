"""The section of the model card: how the model was trained, what was dropped, and how to run it again."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .._run_record import REDACTED, redact
from ..functional.text_plot import text_plot
from ..methods import METHODS, Method
from .recipe import RECIPE_FILE, RECIPE_MARK

_BEGIN, _END = "<!-- hf_effi section -->", "<!-- end of hf_effi section -->"
_PLOT_COLUMNS = 60


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = True) -> str:
    """
    Return a Markdown table; the first column is left-aligned, the others right where they are numbers, else left.

    Example:
    ```python
    >>> print(markdown_table(["arm", "steps"], [["stock", "50"]]))
    | arm | steps |
    | :--- | ---: |
    | stock | 50 |
    ```
    """
    lines = [header, [":---", *["---:" if numbers else ":---"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def json_block(data: Any) -> str:
    """Return data as a block of JSON that no value in it can end early."""
    return "```json\n" + json.dumps(data, indent=2).replace("`", "\\u0060") + "\n```"


def bibtex(methods: Sequence[Method]) -> str:
    """Return one BibTeX entry for each method that has an arXiv paper; methods of one paper share it."""
    entries = {}
    for method in methods:
        if method.paper_id:
            entries[method.paper_id] = (
                f"@misc{{{method.key},\n  title = {{{method.paper}}},\n  year = {{20{method.paper_id[:2]}}},\n"
                f"  eprint = {{{method.paper_id}}},\n  archivePrefix = {{arXiv}},\n"
                f"  url = {{https://arxiv.org/abs/{method.paper_id}}}\n}}"
            )
    return "\n\n".join(entries.values())


def training_section(recipe: Mapping[str, Any], run: Mapping[str, Any] | None, repo_id: str) -> str:
    """
    Return the section as Markdown.

    Args:
        recipe (`dict`): From [`~hf_effi.hub.recipe.recipe_of`].
        run (`dict`, *optional*): The record of the run, from [`read_run`]; what it tells is left out without it.
        repo_id (`str`): Where the card will be; for the snippet that runs it again.
    """
    methods = [method for method in METHODS if method.key in recipe["methods"]]
    parts = [
        "## Training recipe (hf_effi)",
        _method_list(methods),
        *(_of_the_run(run) if run else []),
        "### Run it again",
        _snippet(recipe, repo_id),
        f"{RECIPE_MARK}\n<details><summary>The exact recipe: trainer, arguments, method objects</summary>",
        json_block(recipe),
        "</details>",
    ]
    if citations := bibtex(methods):
        parts += ["### Citations of the methods", f"```bibtex\n{citations}\n```"]
    return "\n\n".join(part for part in parts if part)


def _method_list(methods: Sequence[Method]) -> str:
    if not methods:
        return "No method of hf_effi was switched on; the recipe below is exact all the same."
    return "\n".join(f"- **{method.title}**: {method.summary}" for method in methods)


def _of_the_run(run: Mapping[str, Any]) -> list[str]:
    return [_learning_rate(run), _statistics(run["totals"]), _environment(run)]


def _learning_rate(run: Mapping[str, Any]) -> str:
    points = [(e["step"], e["learning_rate"]) for e in run["log_history"] if _is_number(e.get("learning_rate"))]
    if len(points) < 2:
        return ""
    first, last = points[0][0], points[-1][0]
    columns, values, index = min(_PLOT_COLUMNS, last - first + 1), [], 0
    for column in range(columns):
        step = first + column * (last - first) / max(1, columns - 1)
        while index + 1 < len(points) and points[index + 1][0] <= step:
            index += 1
        values.append(points[index][1])
    plot = text_plot(values, 6, top=max(max(values), 1e-30), label="{:8.1e}")
    return f"### Learning rate\n\n```text\n{plot}\n          step {first} to {last}\n```"


def _statistics(totals: Mapping[str, Any]) -> str:
    rows: list[tuple[str, str]] = []
    counts, tokens = totals.get("rows", {}), totals.get("tokens", {})
    generated = counts.get("generated")
    if generated:
        rows.append(("completions generated", f"{generated:,}"))
        rows.append(("completions trained on", f"{counts.get('trained', 0):,}"))
    for reason, count in totals.get("drops", {}).items():
        if not count:
            continue
        share = f" ({100 * count / generated:.1f} %)" if generated else ""
        rows.append((f"dropped: {reason.replace('_', ' ')}", f"{count:,}{share}"))
    if tokens.get("forwarded"):
        rows.append(("tokens forwarded", f"{tokens['forwarded']:,}"))
    if ratio := totals.get("tokens_forwarded_per_real_token"):
        rows.append(("tokens forwarded per real token", f"{ratio:.2f}"))
    if totals.get("seconds"):
        rows.append(("wall-clock of the training process", f"{sum(totals['seconds'].values()):,.0f} s"))
    for where, peak in totals.get("peak_memory_bytes", {}).items():
        rows.append((f"peak memory, {where}", f"{peak / 2**30:.2f} GiB"))
    return "### What the run did\n\n" + markdown_table(["measure", "value"], rows) if rows else ""


def _environment(run: Mapping[str, Any]) -> str:
    machine = ", ".join(f"{name} {value}" for name, value in run.get("machine", {}).items())
    versions = ", ".join(f"{name} {value}" for name, value in run.get("versions", {}).items())
    processes = f", processes {run['processes']}" if run.get("processes") else ""
    return f"Hardware: {machine}{processes}.\n\nVersions: {versions}."


def _snippet(recipe: Mapping[str, Any], repo_id: str) -> str:
    rewards = "reward_funcs" in recipe["not_carried"]
    needed = "train_dataset=dataset" + (", reward_funcs=rewards" if rewards else "")
    model = recipe["model"]["name"] or "model"
    code = (
        "from hf_effi import from_card\n\n"
        f'recipe = from_card("{repo_id}", output_dir="again")\n'
        "print(recipe.missing)  # what has to be passed by hand, and why\n"
        f"recipe.make_trainer({json.dumps(model) if recipe['model']['name'] else model}, {needed}).train()"
    )
    return f"```python\n{code}\n```"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def add_section(
    card_path: Path,
    recipe: Mapping[str, Any],
    run: Mapping[str, Any] | None,
    repo_id: str,
    secrets: Sequence[str] = (),
) -> None:
    """
    Put tags and section into the card, in place of an older section, and the recipe beside it as `effi_recipe.json`.

    Args:
        secrets (`Sequence[str]`, *optional*): Values that must not be in it, on top of what looks like a secret.
    """
    from huggingface_hub import ModelCard

    card = ModelCard.load(card_path) if card_path.exists() else ModelCard("---\nlibrary_name: transformers\n---\n")
    tags = card.data.tags or []
    card.data.tags = list(dict.fromkeys([*([tags] if isinstance(tags, str) else tags), "hf_effi", *recipe["methods"]]))
    section = f"{_BEGIN}\n{_hide(training_section(recipe, run, repo_id), secrets)}\n{_END}"
    old = re.search(re.escape(_BEGIN) + ".*?" + re.escape(_END), card.text, re.DOTALL)
    text = card.text.replace(old.group(0), section) if old else f"{card.text.rstrip()}\n\n{section}\n"
    # `card.text = ...` would drop the front matter of a card that has an unusual one; the content keeps it.
    card_path.write_text(_hide(f"---\n{card.data}\n---\n{text}", secrets), encoding="utf-8")
    recipe_text = _hide(json.dumps(recipe, indent=2), secrets)
    (card_path.parent / RECIPE_FILE).write_text(recipe_text + "\n", encoding="utf-8")


def _hide(text: str, secrets: Sequence[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, REDACTED)
    return redact(text)
