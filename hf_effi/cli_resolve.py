"""
What a configuration names (model, data, rewards, packages): whether it is there, without loading or importing any of
it.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import glob
import importlib.machinery
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ._compat import OPTIONAL_PACKAGES
from ._untrusted import one_line, shorten

#: reward functions that TRL's script knows by a name without a dot -> package that they need
_REWARDS = {
    "accuracy_reward": "math_verify",
    "reasoning_accuracy_reward": "math_verify",
    "think_format_reward": None,
    "get_soft_overlong_punishment": None,
}
#: import name -> what installs it, of packages that are no extra of ours
_INSTALLS = {
    "vllm": "'trl[vllm]'",
    "flash_attn": "flash-attn",
    "comet_ml": "comet-ml",
    "galore_torch": "galore-torch",
    "lomo_optim": "lomo-optim",
}
_TRACKERS = (
    "wandb",
    "trackio",
    "mlflow",
    "comet_ml",
    "swanlab",
    "clearml",
    "neptune",
    "dvclive",
    "codecarbon",
    "tensorboard",
)
_REPOSITORY = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")
#: a folder with more entries is not looked through for data
_MOST_ENTRIES = 10_000
#: seconds that the Hub has for an answer
_PATIENCE = 10.0

Found = tuple[list[str], list[str]]


def missing_of(parsed: Any, kind: str) -> list[str]:
    """Return one sentence for each of model, data and reward that neither the file nor the command line gives."""
    script, model, data = parsed[0], parsed[2], parsed[3]
    missing = []
    if not model.model_name_or_path:
        missing.append("no model: give model_name_or_path in the file or on the command line.")
    if not script.dataset_name and not data.datasets:
        missing.append("no data: give dataset_name (or datasets) in the file or on the command line.")
    if kind == "grpo" and not script.reward_funcs and not script.reward_model_name_or_path:
        missing.append(
            "no reward: give reward_funcs (or reward_model_name_or_path) in the file or on the command line."
        )
    return missing


def resolve(parsed: Any, kind: str) -> Found:
    """
    Look for everything that a configuration names.

    Returns:
        `tuple[list[str], list[str]]`: What the run would refuse, one sentence each, and what could not be looked up
            from
        here (no connection, an address).
    """
    script, training, model, data = parsed[:4]
    problems = missing_of(parsed, kind)
    notes: list[str] = []
    for key, name, revision in _models(script, model, kind):
        _add(problems, notes, _find_repository(key, name, revision, "model"))
    for found in _find_data(script, training, data):
        _add(problems, notes, found)
    if kind == "grpo":
        problems += [problem for name in script.reward_funcs or () if (problem := _find_reward(str(name)))]
    problems += _find_packages(script, training, model)
    return problems, notes


def _add(problems: list[str], notes: list[str], found: Found) -> None:
    problems += found[0]
    notes += found[1]


# --- models ----------------------------------------------------------------------------------------------------------


def _models(script: Any, model: Any, kind: str) -> Iterator[tuple[str, str, str | None]]:
    if model.model_name_or_path:
        yield "model_name_or_path", str(model.model_name_or_path), model.model_revision
    if kind == "grpo" and script.reward_model_name_or_path:
        yield "reward_model_name_or_path", str(script.reward_model_name_or_path), None


def _find_repository(key: str, name: str, revision: str | None, kind: str) -> Found:
    """Look for a model's folder, its copy in the cache, or its repository; of a dataset for the last two."""
    path = Path(name)
    if os.path.isdir(name) and kind == "model":  # a path of thousands of letters is none, and no error
        if any((path / file).is_file() for file in ("config.json", "adapter_config.json")):
            return [], []
        return [f"{key}: the folder {shorten(name)} has no config.json, so there is no model in it."], []
    if not _REPOSITORY.fullmatch(name) or name.startswith((".", "/")):
        return [f"{key}: {shorten(name)} is neither a folder here nor the name of a repository (`user/name`)."], []
    from huggingface_hub import constants, try_to_load_from_cache

    if kind == "model" and isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
        return [], []
    if constants.HF_HUB_OFFLINE:  # whether there is a copy of a dataset is for `datasets` to say
        return [], [] if kind == "dataset" else [_no_copy(key, name)]
    return _ask_the_hub(key, name, revision, kind)


def _no_copy(key: str, name: str) -> str:
    return f"{key}: {name!r} has no copy here, and HF_HUB_OFFLINE=1 forbids to ask the Hub for it."


def _ask_the_hub(key: str, name: str, revision: str | None, kind: str) -> Found:
    from huggingface_hub import HfApi, errors

    try:
        HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=_PATIENCE)
    except errors.GatedRepoError:
        return [f"{key}: {name!r} is gated: accept its terms on the Hub, and log in with `hf auth login`."], []
    except errors.RevisionNotFoundError:
        return [f"{key}: {name!r} has no revision {shorten(revision)}."], []
    except errors.RepositoryNotFoundError:
        reason = "there is no such folder here and no such repository on the Hub, or it is private: `hf auth login`."
        return [f"{key}: {name!r}: {reason}"], []
    except Exception as error:  # no connection, a timeout, an answer that is none
        return [], [f"{key}: {name!r} could not be looked up on the Hub: {one_line(type(error).__name__)}."]
    return [], []


# --- data ------------------------------------------------------------------------------------------------------------


def _find_data(script: Any, training: Any, data: Any) -> Iterator[Found]:
    if data.datasets:
        for number, part in enumerate(data.datasets):
            if not hasattr(part, "data_files"):
                yield [f"datasets[{number}]: {shorten(part)} must be a mapping with `path`."], []
                continue
            files = {"data_dir": part.data_dir, "data_files": part.data_files}
            yield _find_dataset(f"datasets[{number}]", part.path, part.name, [part.split], files)
    elif script.dataset_name:
        splits = [script.dataset_train_split]
        if str(getattr(training.eval_strategy, "value", training.eval_strategy)) != "no":
            splits.append(script.dataset_test_split)
        yield _find_dataset("dataset_name", script.dataset_name, script.dataset_config, splits, {})


def _find_dataset(key: str, path: Any, name: str | None, splits: list[str], files: dict[str, Any]) -> Found:
    if not isinstance(path, str) or not path:
        return [f"{key}: {shorten(path)} is no name of a dataset."], []
    if "://" in path or any("://" in text for text in _texts(files)):
        return [], [f"{key}: {shorten(path)} is read from an address, which is not looked up here."]
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    generic = path in _PACKAGED_DATASETS_MODULES
    if not os.path.exists(path) and not generic:
        found = _find_repository(key, path, None, "dataset")
        return found if any(found) else _ask_datasets(key, path, name, splits, files)
    if generic and (absent := _absent_files(files)):
        return [f"{key}: there is no file {shorten(absent)}."], []
    places = [path] if not generic else [text for text in _texts(files) if os.path.isdir(text)]
    for place in places:
        if _is_large(place):
            return [], [
                f"{key}: {shorten(place)} has more than {_MOST_ENTRIES:,} entries, and is not looked through here."
            ]
    return _ask_datasets(key, path, name, splits, files)


def _ask_datasets(key: str, path: str, name: str | None, splits: list[str], files: dict[str, Any]) -> Found:
    """Let `datasets` find the files, the configuration and the splits, without reading a row."""
    import datasets
    from huggingface_hub import constants

    try:
        builder = datasets.load_dataset_builder(path, name, **{k: v for k, v in files.items() if v is not None})
        known = {str(split) for split in builder.info.splits or builder.config.data_files or ()}
    except ConnectionError:
        return [], [
            _no_copy(key, path) if constants.HF_HUB_OFFLINE else f"{key}: {path!r} could not be looked up on the Hub."
        ]
    except Exception as error:  # what `datasets` says of a folder without data, or a configuration that it has not
        return [f"{key}: {shorten(path)}: {one_line(error, 200).rstrip('.')}."], []
    wanted = [re.split(r"[\[+]", str(split))[0] for split in splits]
    absent = [split for split in wanted if known and split not in known and split != "all"]
    return [
        f"{key}: {shorten(path)} has no split {split!r}; it has {', '.join(sorted(known))}." for split in absent
    ], []


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
        yield from _texts(inner)


def _absent_files(files: dict[str, Any]) -> str | None:
    """Return the first file or pattern of a generic dataset that is not there."""
    patterns = [os.path.join(files.get("data_dir") or "", pattern) for pattern in _texts(files.get("data_files"))]
    return next((pattern for pattern in patterns if not any(glob.iglob(pattern, recursive=True))), None)


def _is_large(folder: str) -> bool:
    entries = 0
    for _, folders, names in os.walk(folder):
        entries += len(folders) + len(names)
        if entries > _MOST_ENTRIES:
            return True
    return False


# --- rewards ---------------------------------------------------------------------------------------------------------


def _find_reward(name: str) -> str | None:
    """Return what is wrong with the name of a reward function. Nothing is imported: a file may be somebody else's."""
    if name in _REWARDS:
        package = _REWARDS[name]
        return None if package is None or _is_installed(package) else f"reward_funcs: {name} needs {_install(package)}"
    module, _, attribute = name.rpartition(".")
    if not module or not all(part.isidentifier() for part in name.split(".")):
        near = difflib.get_close_matches(name[:60], _REWARDS, n=1, cutoff=0.6)
        advice = f"Did you mean {near[0]}?" if near else f"TRL has {', '.join(_REWARDS)}; or give module.function."
        return f"reward_funcs: {shorten(name)} is no reward function. {advice}"
    spec = _spec_of(module)
    if spec is None:
        return (
            f"reward_funcs: there is no module {shorten(module)}. Give module.function of a module that is installed, "
            "or in this folder."
        )
    names = _names_in(spec)
    if names is None:
        return None
    if attribute in names:
        return _not_a_function(module, attribute, names)
    near = difflib.get_close_matches(attribute[:60], names, n=1, cutoff=0.6)
    return f"reward_funcs: the module {module} has no {attribute!r}." + (f" Did you mean {near[0]}?" if near else "")


def _spec_of(module: str) -> Any:
    """Find a module on the path, and in this folder, as the run will; packages on the way are not imported."""
    path: list[str] | None = [os.getcwd(), *sys.path]
    spec = None
    for depth, part in enumerate(module.split(".")):
        spec = importlib.machinery.PathFinder.find_spec(part, path)
        if spec is None and depth == 0:
            with contextlib.suppress(ValueError):  # `__main__` has no spec
                spec = importlib.util.find_spec(part)  # built in, or installed as a link with a finder of its own
        if spec is None:
            return None
        path = list(spec.submodule_search_locations or ())
    return spec


def _names_in(spec: Any) -> set[str] | dict[str, str] | None:
    """Return the names that a module defines, read from its source; `None` where that does not tell them all."""
    if not spec.origin or not spec.origin.endswith(".py"):
        return None
    try:
        tree = ast.parse(Path(spec.origin).read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return None
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names.update((alias.asname or alias.name).split(".")[0] for alias in node.names)
    if offered := _offered(tree):  # the face of a room of hf_effi
        return offered
    # A module may make names as it is asked for them, take them all from another, or write them into its globals.
    return None if names & {"*", "__getattr__"} or b"globals()" in Path(spec.origin).read_bytes() else names


def _offered(tree: ast.Module) -> dict[str, str]:
    """Return what a face of hf_effi offers by its table `_PUBLIC`, name -> module; empty for another file."""
    assigned = [node for node in tree.body if isinstance(node, ast.Assign)]
    made = {ast.unparse(node.value.func) for node in assigned if isinstance(node.value, ast.Call)}
    for node in assigned if "face" in made else ():
        if ast.unparse(node.targets[0]) == "_PUBLIC":
            table: dict[str, str] = ast.literal_eval(node.value)
            return table
    return {}


def _not_a_function(module: str, attribute: str, names: Any) -> str | None:
    """Return what is wrong with a name of a face that is a class: it would be called with completions."""
    if not isinstance(names, dict):
        return None
    home = _spec_of(names[attribute])
    tree = ast.parse(Path(home.origin).read_bytes())
    if not any(isinstance(node, ast.ClassDef) and node.name == attribute for node in tree.body):
        return None
    object_name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", attribute).lower()
    ready = f" Did you mean {module}.{object_name}?" if object_name in names else ""
    return (
        f"reward_funcs: {module}.{attribute} is a class, which needs its arguments.{ready} Make an object of it in a "
        "module of yours, and name that."
    )


# --- packages --------------------------------------------------------------------------------------------------------


def _find_packages(script: Any, training: Any, model: Any) -> list[str]:
    """Return one sentence for each package that the configuration needs and this environment has not."""
    return [
        f"{key} needs {_install(package)}"
        for key, package in _needed(script, training, model)
        if not _is_installed(package)
    ]


def _needed(script: Any, training: Any, model: Any) -> Iterator[tuple[str, str]]:
    kernels = getattr(training, "kernel_patch", None)
    sources = list(kernels.values()) if isinstance(kernels, dict) else [kernels]
    if "liger" in sources:
        yield "kernel_patch", "liger_kernel"
    if any(isinstance(source, str) and "/" in source for source in sources):
        yield "kernel_patch", "kernels"
    for key, package in (("use_liger_kernel", "liger_kernel"), ("use_vllm", "vllm"), ("deepspeed", "deepspeed")):
        if getattr(training, key, None):
            yield key, package
    for key in ("load_in_4bit", "load_in_8bit"):
        if getattr(model, key, False):
            yield key, "bitsandbytes"
    optimizer = str(getattr(training.optim, "value", training.optim))
    for part, package in (("bnb", "bitsandbytes"), ("8bit", "bitsandbytes"), ("galore", "galore_torch"), ("lomo",
        "lomo_optim"),
                          ("schedule_free", "schedulefree"), ("apollo", "apollo_torch")):  # fmt: skip
        if part in optimizer:
            yield f"optim: {optimizer}", package
            break
    reports = training.report_to if isinstance(training.report_to, (list, tuple)) else [training.report_to]
    yield from ((f"report_to: {name}", str(name)) for name in reports if name in _TRACKERS)


def _is_installed(package: str) -> bool:
    if package == "tensorboard":
        return any(importlib.util.find_spec(name) for name in ("tensorboard", "tensorboardX"))
    return importlib.util.find_spec(package) is not None


def _install(package: str) -> str:
    if package in OPTIONAL_PACKAGES:
        distribution, extra = OPTIONAL_PACKAGES[package]
        return f"`{distribution}`, which is not installed. Run `pip install 'hf_effi[{extra}]'`."
    return f"`{package}`, which is not installed. Run `pip install {_INSTALLS.get(package, package)}`."
