"""Folders of weights: read one tensor at a time, compared by name, written again in the same files."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .._files import CHECKPOINT_PREFIXES, save_aside
from .._untrusted import load_json, one_line, shorten
from ..errors import BrokenFileError, MismatchError, RefusedError

#: what a merge says of itself, in the folder that it makes
DESCRIPTION = "average.json"
_ADAPTER, _MODEL = "adapter_model.safetensors", "model.safetensors"
_INDEX = "model.safetensors.index.json"
#: what `from_pretrained` reads beside the weights
_COPIED = (".json", ".txt", ".jinja", ".model", ".py")
_MORE_TEMPLATES = "additional_chat_templates"
#: what two adapters of one run have in common; sets are compared without their order
_SAME_ADAPTER = (
    "peft_type",
    "base_model_name_or_path",
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "target_parameters",
    "modules_to_save",
    "layers_to_transform",
    "use_rslora",
    "use_dora",
    "bias",
    "fan_in_fan_out",
)


class WeightFolder(Mapping[str, Tensor]):
    """
    The weights of a folder as a mapping that reads a tensor when it is asked for.

    Whole models in one file or in shards with an index, and PEFT adapters. Names and shapes come from the headers, in
    milliseconds. Nothing of the folder is run.

    Args:
        folder (`str` or `Path`): As `save_pretrained` writes it, with safetensors.

    Raises:
        NotADirectoryError: there is no such folder.
        RefusedError: it has no weights in safetensors, or quantized ones.
        BrokenFileError: a file that is missing or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder)
        if not self.path.is_dir():
            raise NotADirectoryError(
                f"There is no folder {str(self.path)!r}. Name a local one that holds a model or an adapter; "
                "`hf download` brings one from the Hub."
            )
        self.adapter = _config(self.path / "adapter_config.json")
        self.config = _config(self.path / "config.json")
        self._indexed: set[str] = set()
        self.files = self._weight_files()
        if self.adapter is None and (self.config or {}).get("quantization_config") is not None:
            raise RefusedError(
                f"{self.path} holds quantized weights, which cannot be averaged. Dequantize the model and save it, or "
                "merge the adapters that were trained on it."
            )
        self._where: dict[str, str] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._open: dict[str, Any] = {}
        for name in self.files:
            for key in (opened := self._file(name)).keys():
                self._where[key] = name
                self._shapes[key] = tuple(opened.get_slice(key).get_shape())
        if missing := sorted(self._indexed - set(self._where)):
            raise BrokenFileError(f"{self.path} lacks tensors that {_INDEX} names: {shorten(missing)}.")

    def _weight_files(self) -> list[str]:
        if (self.path / _ADAPTER).is_file():
            return [_ADAPTER]
        if (self.path / _MODEL).is_file():  # which `from_pretrained` takes first, too
            return [_MODEL]
        if (self.path / _INDEX).is_file():
            index = load_json(self.path / _INDEX)
            shards = index.get("weight_map") if isinstance(index, dict) else None
            if (
                not shards
                or not isinstance(shards, dict)
                or not all(isinstance(name, str) and Path(name).name == name for name in shards.values())
            ):
                raise BrokenFileError(f"{self.path / _INDEX} is damaged: it names no files of this folder.")
            self._indexed = set(shards)
            return sorted(set(shards.values()))
        raise RefusedError(
            f"{self.path} has no {_MODEL}, {_INDEX} or {_ADAPTER}. Save whole weights as safetensors in every "
            "checkpoint (FSDP: state_dict_type FULL_STATE_DICT; DeepSpeed: stage3_gather_16bit_weights_on_model_save)."
        )

    def _file(self, name: str) -> Any:
        if name not in self._open:
            try:
                self._open[name] = safe_open(self.path / name, framework="pt").__enter__()
            except (SafetensorError, OSError) as error:
                raise BrokenFileError(
                    f"{shorten(name)} in {self.path} cannot be read ({one_line(error, 120)})."
                ) from None
        return self._open[name]

    def __getitem__(self, name: str) -> Tensor:
        return self._file(self._where[name]).get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    # A mapping compares its values, which would load every tensor.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, from the header of its file."""
        return self._shapes[name]

    def in_file(self, name: str) -> list[str]:
        """Return the tensors of one of `files`."""
        return [key for key, where in self._where.items() if where == name]


def _config(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    config = load_json(path)
    if not isinstance(config, dict):
        raise BrokenFileError(f"{path} is damaged: it holds no mapping.")
    return config


def _plain(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, list) else value


def check_alike(folders: Sequence[WeightFolder], *, more_rows: Sequence[WeightFolder] = ()) -> None:
    """
    Refuse folders whose adapters or tensors differ, by the name of what differs. Nothing is loaded.

    Args:
        folders (`Sequence[WeightFolder]`): At least one; the last one is what the others are compared with.
        more_rows (`Sequence[WeightFolder]`): Of `folders`, those whose tensors may have more rows than the others'.

    Raises:
        MismatchError: with the folder, the name and both values.
    """
    last = folders[-1]
    for folder in folders[:-1]:
        if (folder.adapter is None) != (last.adapter is None):
            raise MismatchError(f"Of {folder.path} and {last.path}, one holds an adapter and the other a whole model.")
        for name in _SAME_ADAPTER if folder.adapter and last.adapter else ():
            one, other = (_plain((each.adapter or {}).get(name)) for each in (folder, last))
            if one != other:
                raise MismatchError(
                    f"The adapters differ in {name}: {shorten(one)} in {folder.path} and {shorten(other)} in "
                    f"{last.path}. Merge adapters of one configuration."
                )
        if names := sorted(set(folder) ^ set(last)):
            raise MismatchError(
                f"{folder.path} and {last.path} hold other tensors: {shorten(names)}. Merge checkpoints of one model."
            )
        for name in last:
            one, other = folder.shape(name), last.shape(name)
            rows = (folder in more_rows and one[:1] > other[:1]) or (last in more_rows and other[:1] > one[:1])
            if one != other and not (rows and one[1:] == other[1:]):
                raise MismatchError(
                    f"{name} has shape {list(one)} in {folder.path} and {list(other)} in {last.path}. Merge "
                    "checkpoints of one model."
                )


def check_target(output_dir: str | Path) -> Path:
    """Return where a merge goes; raise `ValueError` where something is there already."""
    target = Path(output_dir)
    if target.exists():
        raise ValueError(f"output_dir={str(target)!r} exists already. Choose another folder for the result.")
    return target


def write_weights(
    target: Path,
    layout: WeightFolder,
    tensor: Callable[[str], Tensor],
    *,
    finish: Callable[[Path], Any] = lambda made: None,
) -> None:
    """
    Write a folder in the files of another one, one weight file in memory at a time, aside and then renamed.

    Configuration, tokenizer and templates are copied; what belongs to a run (its state, optimizer, records) is not.

    Args:
        target (`Path`): Must not exist.
        layout ([`WeightFolder`]): Whose files, names and other small files the result has.
        tensor (`Callable[[str], Tensor]`): Gives the new tensor of a name.
        finish (`Callable[[Path], Any]`): Called with the folder in progress at the end, to change other files.
    """

    def write(made: Path) -> None:
        made.mkdir()
        for path in layout.path.iterdir():
            if path.suffix in _COPIED and path.is_file() and not _of_the_run(path.name):
                shutil.copy(path, made / path.name)
            elif path.name == _MORE_TEMPLATES and path.is_dir():
                shutil.copytree(path, made / path.name)
        for name in layout.files:
            state = {key: tensor(key).contiguous() for key in layout.in_file(name)}
            save_file(state, made / name, {"format": "pt"})
        finish(made)

    save_aside(target, write)


def _of_the_run(name: str) -> bool:
    return name in ("trainer_state.json", DESCRIPTION) or name.startswith((*CHECKPOINT_PREFIXES, "training_args"))
