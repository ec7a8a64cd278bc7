"""`convert_checkpoint`: from the checkpoint of one process or DDP to that of FSDP2 and back, with the optimizer."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn.modules.module import register_module_parameter_registration_hook

from .._files import save_aside
from .._untrusted import load_json, one_line, shorten
from ..errors import BrokenFileError, RefusedError
from .dcp_files import read_sharded, write_sharded
from .manifest import MANIFEST, read_manifest, verify_checkpoint, write_manifest
from .parameter_order import OPTIMIZER_NAMES, find_names
from .structure import OPTIMIZER_NAME, step_of

Layout = Literal["single", "fsdp2"]

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDED_WEIGHTS, SHARDED_OPTIMIZER = "pytorch_model_fsdp_0", "optimizer_0"
WHOLE_WEIGHTS, WHOLE_OPTIMIZER = "pytorch_model_fsdp.bin", "optimizer.bin"
#: how PEFT calls the model that it wraps, in the names of all its tensors
_OF_PEFT = "base_model.model."


@dataclass
class State:
    """
    Weights and optimizer of a checkpoint, by the names of the parameters.

    Args:
        weights (`dict[str, Tensor]`): Of the model.
        optimizer (`dict`, *optional*): `state`: name -> its state; `param_groups`, each with the names in `params`.
    """

    weights: dict[str, torch.Tensor]
    optimizer: dict[str, Any] | None


def convert_checkpoint(src: str | Path, dst: str | Path, to: Layout) -> Path:
    """
    Convert a checkpoint, so that a run on another layout goes on from it: weights, optimizer, scheduler, random states
    and the state of the Trainer.

    One process does it, on the CPU, without a trainer; it holds weights and optimizer in host memory. Which parameter
    each number in the state of the optimizer stands for is taken from the manifest of a safe checkpoint, or from the
    optimizer. For another checkpoint it is what `Trainer.create_optimizer` makes of the model of `config.json`, which
    is built without its weights; numbers and shapes have to fit, or the checkpoint is refused. Weights that are tied
    are written under each of their names for FSDP2, which expects them so. Nothing is rounded. A checkpoint of FSDP2
    with `FULL_STATE_DICT` is read too.

    Random states are kept by process: on another number of processes they go on from new seeds (see
    [`SafeCheckpointer`]). A checkpoint of sharded FSDP2 has no `config.json`, and so the converted one has none.

    Args:
        src (`str` or `Path`): A `checkpoint-N`.
        dst (`str` or `Path`): The new `checkpoint-N`. Must not exist. It is written aside, with a manifest.
        to (`str`): `"single"`, for one process and DDP: `model.safetensors` and `optimizer.pt`. `"fsdp2"`, for any
            number of processes: `pytorch_model_fsdp_0` and `optimizer_0`.

    Returns:
        `Path`: Of the new checkpoint.

    Raises:
        ValueError: another layout, a `dst` that exists or that names another update, a checkpoint that has the layout.
        BrokenFileError: `src` is not whole.
        RefusedError: an adapter, a checkpoint of DeepSpeed, or an optimizer whose parameters cannot be told apart.

    Example:
    ```python
    convert_checkpoint("out/checkpoint-500", "sharded/checkpoint-500", to="fsdp2")
    ```
    """
    src, dst = Path(src), Path(dst)
    if to not in get_args(Layout):
        raise ValueError(f"to={to!r} is not one of {', '.join(map(repr, get_args(Layout)))}.")
    if dst.exists() or dst.is_symlink():
        raise ValueError(f"{dst} exists already. Name a folder that does not.")
    if step_of(dst) >= 0 and step_of(src) >= 0 and step_of(dst) != step_of(src):
        raise ValueError(f"{dst.name} would hold update {step_of(src)}. Name it {src.name}.")
    if (problem := verify_checkpoint(src).problem) is not None:
        raise BrokenFileError(f"{src} is not whole: {problem}. Take another checkpoint.")
    _refuse_what_is_no_model(src)
    manifest = read_manifest(src) or {}
    if layout_of(src) == to:
        raise ValueError(f"{src} has the layout {to!r} already.")
    state = _read_single(src, manifest) if layout_of(src) == "single" else _read_fsdp(src)
    if any(name.startswith(_OF_PEFT) for name in state.weights):
        raise RefusedError(f"{src} holds an adapter of PEFT. {_ADAPTER}")
    facts = {name: value for name, value in manifest.items() if name not in _OF_THE_FILES}
    step = manifest.get("step", load_json(src / "trainer_state.json").get("global_step"))
    if to == "single" and state.optimizer is not None:
        facts[OPTIMIZER_NAMES] = [group["params"] for group in state.optimizer["param_groups"]]

    def write(part: Path) -> None:
        part.mkdir()
        for path in src.iterdir():
            if path.name not in _REPLACED and not path.match("model-*-of-*.safetensors"):
                copy = shutil.copytree if path.is_dir() else shutil.copy2
                copy(path, part / path.name)
        _write_single(part, state) if to == "single" else _write_fsdp(part, state)
        write_manifest(part, step, "crc32", facts)

    save_aside(dst, write)
    return dst


#: of a manifest, what is said anew
_OF_THE_FILES = ("schema", "step", "versions", "files")
_REPLACED = {
    WEIGHTS, INDEX, OPTIMIZER_NAME, SHARDED_WEIGHTS, SHARDED_OPTIMIZER, WHOLE_WEIGHTS, WHOLE_OPTIMIZER, MANIFEST,
}  # fmt: skip
_ADAPTER = (
    "It is a few MB, and its names depend on how PEFT wraps the model: load it with PeftModel.from_pretrained(..., "
    "is_trainable=True) in the new run, whose optimizer begins anew, or finish the run on the layout that it has."
)


def layout_of(folder: Path) -> Layout | Literal["fsdp2 whole"]:
    """
    Return which layout a checkpoint has, from the files that it holds.

    Raises:
        RefusedError: one that cannot be converted.
    """
    if (folder / SHARDED_WEIGHTS).is_dir():
        return "fsdp2"
    if (folder / WHOLE_WEIGHTS).is_file():
        return "fsdp2 whole"
    if (folder / WEIGHTS).is_file() or (folder / INDEX).is_file():
        return "single"
    raise RefusedError(
        f"{folder} has none of {WEIGHTS}, {SHARDED_WEIGHTS} and {WHOLE_WEIGHTS}. Only checkpoints with weights of a "
        "model in safetensors, or of FSDP2, are converted."
    )


def _refuse_what_is_no_model(folder: Path) -> None:
    if (folder / "adapter_config.json").is_file():
        raise RefusedError(f"{folder} holds an adapter of PEFT. {_ADAPTER}")
    if any(path.is_dir() for path in folder.glob("global_step*")):
        raise RefusedError(
            f"{folder} is of DeepSpeed, whose state only DeepSpeed reads. Use its zero_to_fp32.py or "
            "ds_to_universal.py."
        )


# ---- one process, DDP ----


def _read_single(folder: Path, manifest: Mapping[str, Any]) -> State:
    files = [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        index = load_json(folder / INDEX)
        parts = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(parts, dict):
            raise BrokenFileError(f"{folder / INDEX} has no weight_map. Take another checkpoint.")
        parts = sorted({str(name) for name in parts.values()})
        if outside := [name for name in parts if Path(name).name != name]:
            raise BrokenFileError(f"{folder / INDEX} names {shorten(outside[0])}, which is not in its folder.")
        files = [folder / name for name in parts]
    weights: dict[str, torch.Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            weights |= {name: opened.get_tensor(name) for name in opened.keys()}
    model, why = _model_without_weights(folder, len(weights))
    weights = _under_all_names(weights, model)
    if not (folder / OPTIMIZER_NAME).is_file():
        return State(weights, None)
    try:
        stored = torch.load(folder / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
    except Exception as error:  # a pickle of something else
        raise BrokenFileError(f"{folder / OPTIMIZER_NAME} cannot be read: {one_line(error)}.") from error
    if not isinstance(stored, dict) or not isinstance(stored.get("state"), dict) or "param_groups" not in stored:
        raise BrokenFileError(f"{folder / OPTIMIZER_NAME} is no state of an optimizer of PyTorch.")
    shapes = {name: list(tensor.shape) for name, tensor in weights.items()}
    groups = find_names(stored, shapes, manifest.get(OPTIMIZER_NAMES), model, why)
    numbers = [number for group in stored["param_groups"] for number in group["params"]]
    names = dict(zip(numbers, (name for group in groups for name in group), strict=True))
    state = {names[number]: value for number, value in stored["state"].items()}
    for wrong in _not_sharded(state, shapes):
        raise RefusedError(
            f"The state of the optimizer has {wrong}, which FSDP2 cannot shard as it does the parameter. Only "
            "optimizers with states of the parameter's shape (Adam, SGD, Lion) are converted."
        )
    kept = [{**group, "params": list(found)} for group, found in zip(stored["param_groups"], groups, strict=True)]
    return State(weights, {"state": state, "param_groups": kept})


def _not_sharded(state: Mapping[str, Any], shapes: Mapping[str, list[int]]) -> Iterator[str]:
    for name, values in state.items():
        for key, value in values.items():
            if isinstance(value, torch.Tensor) and value.numel() > 1 and list(value.shape) != shapes[name]:
                yield f"{key} of the shape {list(value.shape)} for {name} of {shapes[name]}"


def _write_single(folder: Path, state: State) -> None:
    save_file(
        {name: tensor.contiguous() for name, tensor in state.weights.items()}, folder / WEIGHTS, {"format": "pt"}
    )
    if state.optimizer is None:
        return
    names = [name for group in state.optimizer["param_groups"] for name in group["params"]]
    numbers = {name: number for number, name in enumerate(names)}
    groups = [
        {
            **{key: value for key, value in group.items() if key != "params"},
            "params": [numbers[name] for name in group["params"]],
        }
        for group in state.optimizer["param_groups"]
    ]
    states = {numbers[name]: state.optimizer["state"][name] for name in names if name in state.optimizer["state"]}
    torch.save({"state": states, "param_groups": groups}, folder / OPTIMIZER_NAME)


def _model_without_weights(folder: Path, tensors: int) -> tuple[torch.nn.Module | None, str]:
    """
    Return the model of `config.json` on the meta device; else `None`, and why there is none.

    Args:
        folder (`Path`): A checkpoint.
        tensors (`int`): How many it holds. A model that has several times as many is not built to its end.
    """
    if not (folder / "config.json").is_file():
        return None, "there is no config.json to build the model from"
    import transformers

    config = load_json(folder / "config.json")
    if not isinstance(config, dict):
        return None, "its config.json is no mapping"
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    cls = getattr(transformers, name, None) if isinstance(name, str) else None
    if config.get("auto_map") or not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        return None, f"the model of its config.json ({name}) is none of transformers, and code of others is not run"
    try:
        with torch.device("meta"), _at_most(4 * tensors + 100):
            config_class: Any = cls.config_class
            return cls._from_config(config_class.from_dict(config)), ""
    except Exception as error:  # whatever a config makes a model raise
        return None, f"the model of its config.json ({name}) cannot be built: {one_line(error)}"


@contextmanager
def _at_most(parameters: int) -> Iterator[None]:
    """Let no more parameters be made in this block: a config of a stranger may ask for a model without end."""
    count = 0

    def counted(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        nonlocal count
        count += 1
        if count > parameters:
            raise ValueError(f"it has more than {parameters} parameters, several times those of the checkpoint")

    hook = register_module_parameter_registration_hook(counted)
    try:
        yield
    finally:
        hook.remove()


def _under_all_names(weights: dict[str, torch.Tensor], model: torch.nn.Module | None) -> dict[str, torch.Tensor]:
    """Return weights with those that are tied under each of their names, in the order of the model."""
    if model is None:
        return weights
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    found = dict(weights)
    for names in groups.values():
        there = [name for name in names if name in weights]
        found |= {name: weights[there[0]] for name in names if there and name not in weights}
    return {name: found[name] for name in (*model.state_dict(), *found) if name in found}


# ---- FSDP2 ----


def _read_fsdp(folder: Path) -> State:
    if (folder / SHARDED_WEIGHTS).is_dir():
        weights = read_sharded(folder / SHARDED_WEIGHTS)["model"]
        there = (folder / SHARDED_OPTIMIZER).is_dir()
        return State(weights, read_sharded(folder / SHARDED_OPTIMIZER)["optimizer"] if there else None)
    whole: list[Any] = []
    for name in (WHOLE_WEIGHTS, WHOLE_OPTIMIZER):
        try:
            path = folder / name
            whole.append(torch.load(path, map_location="cpu", weights_only=True) if path.is_file() else None)
        except Exception as error:  # a pickle of something else
            raise BrokenFileError(f"{path} cannot be read: {one_line(error)}.") from error
    return State(whole[0], whole[1])


def _write_fsdp(folder: Path, state: State) -> None:
    write_sharded(folder / SHARDED_WEIGHTS, {"model": state.weights})
    if state.optimizer is not None:
        write_sharded(folder / SHARDED_OPTIMIZER, {"optimizer": state.optimizer})
