"""The recipe of a run: everything needed to set up the same trainer again, as JSON, and back."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from .._run_record import REDACTED, redact
from ..callbacks.run_record import describe_data, describe_model, methods_of, methods_of_parts, schedule_of
from ..errors import RecipeError
from ._worker import describe_failure
from .admitted import ARGUMENTS, CONFIGS, TRAINERS, _NotAdmittedError, check_size, check_value, find, public_path
from .objects import _NotPlainError, from_plain, to_plain

RECIPE_FILE = "effi_recipe.json"
SCHEMA = 1
#: A card holds the recipe between this line and the end of the code block after it.
RECIPE_MARK = "<!-- hf_effi recipe -->"

#: constructor argument of a trainer, kept under the same name -> argument of its config that makes it
_OBJECTS = {
    "train_sampler": None,
    "prompt_selector": None,
    "group_filter": "difficulty_range",
    "rollout_pruner": "prune_rate",
    "advantage_transform": None,
    "rollout_allocator": None,
    "screening": None,
    "hybrid_gate": None,
    "rollout_noise": None,
    "rollout_reuse": None,
    "batch_transform": None,
    "sequence_length": None,
    "local_updates": None,
}
#: a recipe is a page or two; what is longer is none
_LARGEST_RECIPE, _LARGEST_CARD = 2**20, 2**24
#: what an own section of a card begins and ends with; a recipe is looked for inside only
SECTION_BEGIN, SECTION_END = "<!-- hf_effi section -->", "<!-- end of hf_effi section -->"
#: argument -> the one it was computed from; giving both is an error or says the same twice
_DERIVED = {"generation_batch_size": "steps_per_generation"}


def recipe_of(trainer: Any) -> dict[str, Any]:
    """
    Return the recipe of a trainer as JSON data: classes, exact arguments, method objects, model, data, methods.

    Args:
        trainer (`Trainer`): Any; best after its `train()`, when schedule and methods are known.

    Returns:
        `dict`: `not_carried` names what is not in it, with the reason.
    """
    missing: dict[str, str] = {}
    arguments = _arguments_of(trainer.args, missing)
    objects: dict[str, Any] = {}

    def carry(name: str, value: Any) -> None:
        try:
            objects[name] = _readable(value)
        except _NotPlainError as error:
            missing[name] = f"it holds {error}"

    for name, made_by in _OBJECTS.items():
        value = getattr(trainer, name, None)
        if value is not None and not (made_by and getattr(trainer.args, made_by, None)):
            carry(name, value)
    # With the side columns, which the trainer does not count among its rewards, as its weights do.
    given = getattr(getattr(trainer, "_side_columns", None), "given", ())
    if rewards := [*given] or getattr(trainer, "reward_funcs", None):
        carry("reward_funcs", rewards)
    if adapters := getattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config", None):
        carry("peft_config", next(iter(adapters.values())))
    for callback in own_callbacks(trainer):
        name = f"callbacks: {type(callback).__name__}"
        try:
            objects.setdefault("callbacks", []).append(_readable(callback))
        except _NotPlainError as error:
            missing[name] = f"it holds {error}"
    model = trainer.accelerator.unwrap_model(trainer.model)
    schedule = schedule_of(trainer.args, trainer.state, trainer.lr_scheduler)
    parts = [*own_callbacks(trainer), *(getattr(trainer, name, None) for name in _OBJECTS)]
    methods = {*methods_of(trainer.args, trainer.state, schedule), *methods_of_parts(parts)}
    return redact(
        {
            "schema": SCHEMA,
            "trainer": _path_of(type(trainer), TRAINERS, missing, "trainer"),
            "arguments_class": _path_of(type(trainer.args), CONFIGS, missing, "arguments"),
            "arguments": arguments,
            "objects": objects,
            "schedule": schedule,
            "methods": sorted(methods - {"run_record"}),
            "model": describe_model(model),
            "data": describe_data(trainer.train_dataset),
            "not_carried": missing,
        }
    )


def _readable(value: Any) -> Any:
    """
    Return a value as data that [`from_card`] takes back.

    Raises:
        _NotPlainError: it is no data, or larger or deeper than a recipe that is read may be.
    """
    plain = to_plain(value)
    try:
        check_size(plain, depth=3)  # recipe, objects, callbacks
    except _NotAdmittedError as error:
        raise _NotPlainError(f"too much: {error}") from None
    return plain


def own_callbacks(trainer: Any) -> list[TrainerCallback]:
    """
    Return the trainer's callbacks that are methods of this package.

    Without those that only observe or publish, and the one that the arguments make (`lr_schedule`).
    """
    return [
        callback
        for callback in trainer.callback_handler.callbacks
        if type(callback).__module__.startswith("hf_effi.") and getattr(callback, "in_recipe", True)
    ]


def _path_of(cls: type, table: Mapping[str, Any], missing: dict[str, str], name: str) -> str:
    """Return `module:name` of the class, or of its nearest base that a card may name."""
    for base in cls.__mro__:
        if (path := public_path(base, table)) is None:
            continue
        if base is not cls:
            missing[name] = f"{cls.__name__} is your own class; its base {base.__name__} stands for it"
        return path
    raise RecipeError(f"{cls!r} has no base that a card may name: {', '.join(n for t in table.values() for n in t)}.")


def _arguments_of(args: Any, missing: dict[str, str]) -> dict[str, Any]:
    """Return every argument by name. Of the output folder only its name: the path to it is nobody's business."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(args):
        if not field.init:
            continue
        value = getattr(args, field.name)
        if hasattr(value, "to_dict") and not dataclasses.is_dataclass(type(value)):
            value = value.to_dict()
        elif dataclasses.is_dataclass(value):
            value = dataclasses.asdict(value)
        try:
            found[field.name] = to_plain(value)
        except _NotPlainError as error:
            missing[f"arguments: {field.name}"] = f"it holds {error}"
    for name in ("output_dir", "logging_dir"):
        if found.get(name):
            found[name] = Path(found[name]).name
    return found


@dataclass(frozen=True)
class Recipe:
    """
    A run read back: what is needed to set up the same trainer.

    Args:
        trainer_class (`type`): For example `EffiGRPOTrainer`.
        args (`TrainingArguments`): The arguments, of the class that the run used.
        objects (`dict`): Further keyword arguments of the trainer that could be rebuilt: callbacks, sampler, adapter,
            reward functions.
        missing (`dict[str, str]`): What has to be passed by hand, with the reason.
        data (`dict`): The recipe as it was stored, with `model`, `data`, `schedule` and `methods`.

    Example:
    ```python
    recipe = from_card("me/my-run", output_dir="again")
    print(recipe.missing)
    trainer = recipe.make_trainer(model="Qwen/Qwen3-0.6B", train_dataset=rows, reward_funcs=[exact_match])
    ```
    """

    trainer_class: type
    args: Any
    objects: dict[str, Any]
    missing: dict[str, str]
    data: dict[str, Any]

    def make_trainer(self, *args: Any, callbacks: list[Any] | None = None, **kwargs: Any) -> Any:
        """Return the trainer. What is given here wins over the recipe; callbacks are added to its own."""
        objects = {name: value for name, value in self.objects.items() if name != "callbacks"}
        together = [*self.objects.get("callbacks", []), *(callbacks or [])]
        return self.trainer_class(*args, **{**objects, "args": self.args, "callbacks": together, **kwargs})


def from_card(
    source: str | Path, *, token: str | None = None, revision: str | None = None, **overrides: Any
) -> Recipe:
    """
    Read the recipe of a run back from its model card.

    A card comes from the Internet: what it may name is an allow-list (`docs/card_and_report.md`), by class, by
    argument and by kind of value. Nothing of it loads a model, imports code, opens a file or connects; the rest is in
    `missing`.

    Args:
        source (`str` or `Path`): A card, a folder with one, an `effi_recipe.json`, or a repository on the Hub.
        token (`str`, *optional*): Read token of a private repository.
        revision (`str`, *optional*): Branch or commit of the repository.
        overrides: Arguments that replace the recipe's, such as `output_dir="again"`.

    Returns:
        [`Recipe`]: `missing` names what it could not rebuild.

    Raises:
        RecipeError: no recipe there, or an argument that the class does not have.

    Example:
    ```python
    trainer = from_card("out", output_dir="again").make_trainer(model, train_dataset=rows)
    ```
    """
    data = read_recipe(source, token=token, revision=revision)
    _check_form(data, source)
    missing = {str(name)[:200]: str(reason)[:500] for name, reason in data["not_carried"].items()}
    args = _make_arguments(data, overrides, missing)
    objects: dict[str, Any] = {}
    for name, plain in data["objects"].items():
        if name not in _OBJECTS and name not in ("callbacks", "reward_funcs", "peft_config"):
            missing[str(name)[:200]] = "it is no argument that a card may set"
            continue
        several = name == "callbacks" and isinstance(plain, list)
        for label, item in [(f"callbacks: {_class_in(p)}", p) for p in plain] if several else [(name, plain)]:
            try:
                value = from_plain(item)
                _check_role(name, value)
            except _NotAdmittedError as error:
                missing[label] = str(error)
                continue
            if several:
                objects.setdefault(name, []).append(value)
            else:
                objects[name] = value
    return Recipe(_find(data["trainer"], TRAINERS), args, objects, missing, data)


def _class_in(plain: Any) -> str:
    return str(plain.get("class", "?") if isinstance(plain, dict) else type(plain).__name__)[:200]


def _check_role(name: str, value: Any) -> None:
    """A callback in the place of a sampler would fail far from here."""
    if name == "callbacks" and not isinstance(value, TrainerCallback):
        raise _NotAdmittedError(f"{type(value).__name__} is no callback")
    if name != "callbacks" and isinstance(value, TrainerCallback):
        raise _NotAdmittedError(f"{type(value).__name__} is a callback and no {name}")


def _check_form(data: Mapping[str, Any], source: Any) -> None:
    """One sentence for whatever is not a recipe of this schema."""
    if data.get("schema") != SCHEMA:
        schema = repr(data.get("schema"))[:80]
        raise RecipeError(f"{source} has a recipe of schema {schema}; this version reads {SCHEMA}.")
    for name, kind in (
        ("arguments", dict),
        ("objects", dict),
        ("not_carried", dict),
        ("trainer", str),
        ("arguments_class", str),
    ):
        if not isinstance(data.get(name), kind):
            raise RecipeError(f"The recipe of {source} is damaged: its {name!r} is {type(data.get(name)).__name__}.")
    try:
        check_size({name: data[name] for name in ("arguments", "objects", "not_carried")})
    except _NotAdmittedError as error:
        raise RecipeError(f"The recipe of {source} is not read: {error}.") from None


def read_recipe(source: str | Path, *, token: str | None = None, revision: str | None = None) -> dict[str, Any]:
    """
    Return the recipe in a card, a folder, a recipe file or a repository, as data.

    Args:
        source (`str` or `Path`): A card, a folder with one, an `effi_recipe.json`, or a repository on the Hub.
        token (`str`, *optional*): Read token of a private repository.
        revision (`str`, *optional*): Branch or commit of the repository.

    Raises:
        RecipeError: no recipe there, or one that cannot be read.
    """
    path = Path(source)
    if path.is_dir():
        files = [file for name in ("README.md", RECIPE_FILE) if (file := path / name).exists()]
        if not files:  # never the Hub's: a folder of this machine was meant
            raise RecipeError(f"{source} has neither a README.md nor an {RECIPE_FILE}. Is it the run's output_dir?")
        path = next((file for file in files if _recipe_in(file) is not None), files[0])
    elif not path.exists():
        if path.is_absolute() or str(source).count("/") > 1 or path.suffix in (".md", ".json"):
            raise RecipeError(
                f"{source} does not exist. Pass a card, its folder, or a repository such as 'me/my-run'."
            )
        path = _download_card(str(source), token, revision)
    found = _recipe_in(path)
    if found is None:
        raise RecipeError(f"{source} has no hf_effi recipe. Effi trainers and HubCallback write one.")
    return found


def _download_card(repo_id: str, token: str | None, revision: str | None) -> Path:
    from huggingface_hub import errors, hf_hub_download

    try:
        return Path(hf_hub_download(repo_id, "README.md", token=token, revision=revision))
    except errors.RevisionNotFoundError:
        raise RecipeError(f"{repo_id!r} has no revision {revision!r}.") from None
    except errors.RemoteEntryNotFoundError:
        raise RecipeError(f"{repo_id!r} has no README.md, and so no recipe.") from None
    except Exception as error:  # no connection, no right to read, no such repository, no valid name
        failure = describe_failure(error, token)
        if failure["status"] in (401, 403, 404):
            reason = "there is no such repository on the Hub, or it is private: pass token=..., or `hf auth login`."
        else:
            reason = f"the Hub gave none. {failure['error']}"
        # A chain would show what the server said, unredacted.
        raise RecipeError(f"No card at {repo_id!r}: it is no folder here, and {reason}") from None


def _recipe_in(path: Path) -> dict[str, Any] | None:
    if path.stat().st_size > _LARGEST_CARD:
        raise RecipeError(f"{path} has {path.stat().st_size:,} bytes; a card has at most {_LARGEST_CARD:,}.")
    text = path.read_text(encoding="utf-8", errors="replace")
    if path.suffix != ".json":
        found = _block_in(text)
        if found is None:
            return None
        text = found
    if len(text) > _LARGEST_RECIPE:
        raise RecipeError(f"The recipe in {path} has {len(text):,} characters; at most {_LARGEST_RECIPE:,} are read.")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise RecipeError(f"The recipe in {path} is not JSON: {reason}.") from None
    return found if isinstance(found, dict) else None


def _block_in(text: str) -> str | None:
    """
    Return the JSON behind the last mark of our section.

    Values of a card can hold a mark of their own, before ours; the section is written last, and its recipe last in it.
    """
    begin = text.rfind(SECTION_BEGIN)
    section = text[begin:] if begin >= 0 else text
    if begin >= 0 and (end := section.find(SECTION_END)) >= 0:
        section = section[:end]
    mark = section.rfind(RECIPE_MARK)
    if mark < 0:
        return None
    start = section.find("```json\n", mark)
    stop = section.find("\n```", start) if start >= 0 else -1
    return section[start + len("```json\n") : stop] if stop >= 0 else None


def _find(path: Any, table: Mapping[str, Any]) -> Any:
    try:
        return find(path, table)
    except _NotAdmittedError as error:
        raise RecipeError(f"{error}.") from None


def _make_arguments(data: Mapping[str, Any], overrides: Mapping[str, Any], missing: dict[str, str]) -> Any:
    """Pass on what differs from the defaults of the installed version; equal values need no passing."""
    cls = _find(data["arguments_class"], CONFIGS)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    if unknown := sorted(set(overrides) - set(fields)):
        raise RecipeError(f"{cls.__name__} has no argument {', '.join(unknown)}.")
    kwargs: dict[str, Any] = {}
    for name, value in data["arguments"].items():
        label = f"arguments: {str(name)[:200]}"
        if name not in fields:
            missing[label] = "the installed version does not have it"
            continue
        default = fields[name].default
        if fields[name].default_factory is not dataclasses.MISSING:
            default = fields[name].default_factory()
        if value == _plain(default) or name in overrides or name == "output_dir":
            continue
        if name not in ARGUMENTS and not value:
            continue  # switched off, which is what a new config is without it
        if name not in ARGUMENTS or value == REDACTED:
            missing[label] = "it is left to you"
            continue
        try:
            check_value(name, value, ARGUMENTS[name])
        except _NotAdmittedError as error:
            missing[label] = str(error)
            continue
        kwargs[name] = float(value) if value in ("inf", "-inf", "nan") else value
    for derived, origin in _DERIVED.items():
        if {derived, origin} <= set(data["arguments"]):
            kwargs.pop(derived, None)
    missing.pop("arguments: output_dir", None)
    if "output_dir" not in overrides:
        kwargs["output_dir"] = _new_folder(data["arguments"].get("output_dir"))
    try:
        return cls(**{**kwargs, **overrides})
    except Exception as error:  # what the class says of a combination that it does not take
        raise RecipeError(f"{cls.__name__} does not take the recipe's arguments: {str(error)[:500]}") from None


def _new_folder(stored: Any) -> str:
    """
    Return the last part of the stored folder's name, in the working directory.

    Raises:
        RecipeError: there are files in it: another run's checkpoints could be rotated away.
    """
    name = re.split(r"[/\\]", str(stored))[-1] if isinstance(stored, str) else ""
    if not re.fullmatch(r"[\w][\w.+ -]{0,199}", name):
        name = "out"
    if Path(name).exists() and (not Path(name).is_dir() or any(Path(name).iterdir())):
        raise RecipeError(
            f"The recipe's output_dir is {name!r}, and there is something of that name here. Pass from_card(..., "
            "output_dir=...) with a folder of your choice."
        )
    return name


def _plain(value: Any) -> Any:
    try:
        return to_plain(value)
    except _NotPlainError:
        return value
