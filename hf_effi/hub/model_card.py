"""The section of the model card: how the model was trained, what was dropped, and how to run it again."""

from __future__ import annotations

import functools
import json
import logging
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from .._files import save_bytes, save_text
from .._plots import draw_picture
from .._run_record import REDACTED, redact
from .._text_plot import text_plot
from .._untrusted import check_yaml, is_number, one_line, read_text
from ..errors import BrokenFileError, MissingPackageError
from ..methods import METHODS, Method
from .recipe import RECIPE_FILE, RECIPE_MARK, SECTION_BEGIN, SECTION_END

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

_PLOT_COLUMNS = 60
_LARGEST_CARD = 2**24
#: The plot of the learning rate, beside the card.
PICTURE = "effi_learning_rate.png"
logger = logging.getLogger(__name__)


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
    """Return data as a block of JSON: no value in it can end the block early, or hold a mark of a section."""
    text = json.dumps(data, indent=2)
    for character in "`<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return f"```json\n{text}\n```"


def plain(value: Any, limit: int = 200) -> str:
    """
    Return a value as text of one line in which nothing is Markdown or HTML.

    Example:
    ```python
    >>> print(plain("a\\n# <b>b</b> [c](d)"))
    a \\# \\<b\\>b\\</b\\> \\[c\\](d)
    ```
    """
    special = r"([\\`*\[\]<>#~$&!]|(?<!\w)_|_(?!\w))"  # an underscore inside of a word is only that
    return re.sub(special, r"\\\1", one_line(value, limit))


def code(value: Any, limit: int = 400) -> str:
    """
    Return a value as inline code that it cannot leave.

    Example:
    ```python
    >>> print(code("cosine(warmup_steps=5)"), code("a`b``c"))
    `cosine(warmup_steps=5)` ``` a`b``c ```
    ```
    """
    text = one_line(value, limit).replace("<!--", "<! --")
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence, pad = "`" * (longest + 1), " " if longest else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def bibtex(methods: Sequence[Method]) -> str:
    """
    Return one BibTeX entry for each arXiv paper of the methods; methods of one paper share it.

    Example:
    ```python
    >>> from hf_effi.methods import find_method
    >>> print(bibtex([find_method("weight_averaging")]))
    @misc{kaddour2022stop,
      title = {{Stop Wasting My Time! Saving Days of ImageNet and BERT Training with Latest Weight Averaging}},
      author = {Kaddour, Jean},
      year = {2022},
      eprint = {2209.14981},
      archivePrefix = {arXiv},
      url = {https://arxiv.org/abs/2209.14981}
    }
    ```
    """
    papers = {method.paper_id: method for method in methods if method.paper_id}
    return "\n\n".join(_entry(method) for method in papers.values())


def _entry(method: Method) -> str:
    year = f"20{method.paper_id[:2]}"
    surname = method.authors.partition(",")[0] or method.key
    first_word = re.split(r"[\s:,-]", method.paper)[0]
    key = unicodedata.normalize("NFKD", f"{surname}{year}{first_word}").encode("ascii", "ignore").decode().lower()
    fields = {
        "title": f"{{{method.paper}}}",  # the inner braces keep its capitals
        "author": method.authors,
        "year": year,
        "eprint": method.paper_id,
        "archivePrefix": "arXiv",
        "url": f"https://arxiv.org/abs/{method.paper_id}",
    }
    lines = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items() if value)
    return f"@misc{{{re.sub('[^a-z0-9]', '', key)},\n{lines}\n}}"


def training_section(
    recipe: Mapping[str, Any], run: Mapping[str, Any], repo_id: str, picture: str | None = None
) -> str:
    """
    Return the section as Markdown.

    Args:
        recipe (`dict`): From [`~hf_effi.hub.recipe.recipe_of`].
        run (`dict`): The record of the run, from [`read_run`], or as much of one as there is.
        repo_id (`str`): Where the card will be; for the snippet that runs it again.
        picture (`str`, *optional*): File beside the card with the plot of the learning rate; drawn with characters
            without it.
    """
    methods = [method for method in METHODS if method.key in recipe["methods"]]
    parts = [
        "## Training recipe (hf_effi)",
        _method_list(methods),
        _learning_rate(recipe["schedule"], run, picture),
        _statistics(run.get("totals", {})),
        _environment(run),
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


def _learning_rate(schedule: Mapping[str, Any], run: Mapping[str, Any], picture: str | None) -> str:
    points = learning_rates(run)
    if len(points) < 2:
        return ""
    first, last = points[0][0], points[-1][0]
    plot = f"![Learning rate, step {first} to {last}]({picture})" if picture else _text_curve(points)
    return f"### Learning rate\n\n{_schedule_words(schedule)}\n\n{plot}"


def learning_rates(run: Mapping[str, Any]) -> list[tuple[int, float]]:
    """Return (step, learning rate) of each log entry that has both."""
    found = [(entry.get("step"), entry.get("learning_rate")) for entry in run["log_history"]]
    return [(step, rate) for step, rate in found if is_number(step) and is_number(rate)]


def _schedule_words(schedule: Mapping[str, Any]) -> str:
    """Name the schedule with its plain arguments; tables and schedules inside of it are in the recipe."""
    name = schedule.get("kind") or schedule.get("lr_scheduler_type")
    arguments = schedule.get("params") or {k: v for k, v in schedule.items() if k not in ("kind", "lr_scheduler_type")}
    words = ", ".join(
        f"{key}={value}" for key, value in arguments.items() if isinstance(value, (bool, int, float, str))
    )
    return f"Schedule: {code(f'{name}({words})')}."


def _text_curve(points: Sequence[tuple[int, float]]) -> str:
    first, last = points[0][0], points[-1][0]
    columns, values, index = min(_PLOT_COLUMNS, last - first + 1), [], 0
    for column in range(columns):
        step = first + column * (last - first) / max(1, columns - 1)
        while index + 1 < len(points) and points[index + 1][0] <= step:
            index += 1
        values.append(points[index][1])
    plot = text_plot(values, 6, top=max(max(values), 1e-30), label="{:8.1e}")
    return f"```text\n{plot}\n          step {first} to {last}\n```"


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
        rows.append((plain(f"dropped: {reason.replace('_', ' ')}"), f"{count:,}{share}"))
    if tokens.get("forwarded"):
        rows.append(("tokens forwarded", f"{tokens['forwarded']:,}"))
    if ratio := totals.get("tokens_forwarded_per_real_token"):
        rows.append(("tokens forwarded per real token", f"{ratio:.2f}"))
    if totals.get("seconds"):
        rows.append(("wall-clock of the training process", f"{sum(totals['seconds'].values()):,.0f} s"))
    for where, peak in totals.get("peak_memory_bytes", {}).items():
        rows.append((plain(f"peak memory, {where}"), f"{peak / 2**30:.2f} GiB"))
    return "### What the run did\n\n" + markdown_table(["measure", "value"], rows) if rows else ""


def _environment(run: Mapping[str, Any]) -> str:
    machine = ", ".join(plain(f"{name} {value}") for name, value in run.get("machine", {}).items())
    versions = ", ".join(plain(f"{name} {value}") for name, value in run.get("versions", {}).items())
    processes = f", processes {run['processes']}" if run.get("processes") else ""
    return f"Hardware: {machine}{processes}.\n\nVersions: {versions}."


def _snippet(recipe: Mapping[str, Any], repo_id: str) -> str:
    name, cls = recipe["model"]["name"], recipe["model"]["class"]
    needed = ["train_dataset=dataset"]
    if "reward_funcs" in recipe["not_carried"]:
        needed.append("reward_funcs=rewards")
    lines = ["from hf_effi import from_card"]
    if name and not _loads_models(recipe["trainer"]):
        cls = cls if cls.isidentifier() and not cls.startswith("Peft") else "AutoModelForCausalLM"
        lines += [f"from transformers import {cls}", "", f"model = {cls}.from_pretrained({in_code(name)})"]
    if not name:
        needed.append("processing_class=tokenizer")
    model = in_code(name) if name and _loads_models(recipe["trainer"]) else "model"
    lines += [
        "",
        f'recipe = from_card({in_code(repo_id)}, output_dir="again")',
        "print(recipe.missing)  # what has to be passed by hand, and why",
        f"recipe.make_trainer({model}, {', '.join(needed)}).train()",
    ]
    return "```python\n" + "\n".join(lines) + "\n```"


def in_code(text: str) -> str:
    """Return a text as a literal of Python that holds no backtick and no mark of a section."""
    literal = json.dumps(one_line(text))
    for character in "`<":
        literal = literal.replace(character, f"\\u{ord(character):04x}")
    return literal


def _loads_models(trainer: str) -> bool:
    """Whether a trainer takes the name of a model: TRL's do, and load its tokenizer too."""
    return trainer.startswith("trl.") or trainer.endswith((":EffiGRPOTrainer", ":EffiSFTTrainer"))


def add_section(
    card_path: Path,
    recipe: Mapping[str, Any],
    run: Mapping[str, Any],
    repo_id: str,
    secrets: Sequence[str] = (),
) -> None:
    """
    Put tags and section into the card, in place of an older section, and recipe and plot beside it.

    Args:
        secrets (`Sequence[str]`, *optional*): Values that must not be in it, on top of what looks like a secret.
    """
    card = _load_card(card_path)
    tags = [card.data.tags] if isinstance(card.data.tags, str) else card.data.tags
    kept = [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else []
    card.data.tags = list(dict.fromkeys([*kept, "hf_effi", *recipe["methods"]]))
    picture = _write_picture(card_path.parent / PICTURE, run)
    section = f"{SECTION_BEGIN}\n{_hide(training_section(recipe, run, repo_id, picture), secrets)}\n{SECTION_END}"
    text = _with_section(card.text, section)
    # `card.text = ...` would drop the front matter of a card that has an unusual one; the content keeps it.
    save_text(card_path, _hide(f"---\n{card.data}\n---\n{text}", secrets))
    recipe_text = _hide(json.dumps(recipe, indent=2), secrets)
    save_text(card_path.parent / RECIPE_FILE, recipe_text + "\n")


def _load_card(path: Path) -> ModelCard:
    """
    Return the card that is there, or a new one. Its front matter may be a stranger's: upstream copies it whole.

    Raises:
        BrokenFileError: the card or its front matter is too large, nested too deeply, or no YAML.
    """
    from huggingface_hub.repocard import REGEX_YAML_BLOCK, ModelCard

    if not path.exists():
        return ModelCard("---\nlibrary_name: transformers\n---\n")
    try:
        text = read_text(path, _LARGEST_CARD)
        found = REGEX_YAML_BLOCK.search(text)  # what upstream takes for the front matter
        check_yaml(found[2] if found else "", f"The front matter of {path}")
        return ModelCard(text)
    except (ValueError, yaml.YAMLError) as error:
        if isinstance(error, BrokenFileError):
            raise
        raise BrokenFileError(f"The front matter of {path} is not that of a card: {one_line(error, 200)}.") from None


def _with_section(text: str, section: str) -> str:
    """Put the section in place of an older one, or at the end. Ours is the last: no value in it holds a mark."""
    begin = text.rfind(SECTION_BEGIN)
    end = text.find(SECTION_END, begin)
    if begin < 0 or end < begin:
        return f"{text.rstrip()}\n\n{section}\n"
    return text[:begin] + section + text[end + len(SECTION_END) :]


def _write_picture(path: Path, run: Mapping[str, Any]) -> str | None:
    """Write the plot of the learning rate and return its file name; `None`, with a line in the log, without one."""
    points = learning_rates(run)
    if len(points) < 2:
        return None
    try:
        save_bytes(path, draw_picture(*zip(*points, strict=True), "optimizer steps", "learning rate"))
    except MissingPackageError as error:
        _warn_once(f"The model card shows the learning rate as text. {error}")
        return None
    except Exception as error:  # a picture is no reason to be without a card
        _warn_once(f"The model card shows the learning rate as text, as its plot failed: {error}.")
        return None
    return path.name


@functools.cache
def _warn_once(text: str) -> None:
    logger.warning(text)


def _hide(text: str, secrets: Sequence[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, REDACTED)
    return redact(text)
