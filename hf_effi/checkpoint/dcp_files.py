"""The folders of `torch.distributed.checkpoint`, read and written by one process. Nothing in them is run."""

from __future__ import annotations

import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from .._untrusted import one_line, shorten
from ..errors import BrokenFileError

#: what a `.metadata` is made of
_PLAIN = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib", "PureWindowsPath"),
    ("pathlib._local", "PosixPath"),
    ("pathlib._local", "WindowsPath"),
    ("collections", "OrderedDict"),
} | {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    )
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = getattr(torch, name, None) if module == "torch" else None
        if isinstance(found, (torch.dtype, torch.memory_format, torch.layout)):
            return found
        if (module, name) not in _PLAIN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no description of tensors has")
        return super().find_class(module, name)


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata: Metadata = _Unpickler(io.BytesIO((Path(self.path) / ".metadata").read_bytes())).load()
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, map_location="cpu", weights_only=True)


def read_sharded(folder: Path) -> dict[str, Any]:
    """
    Return a sharded state, brought together from all its shards.

    Args:
        folder (`Path`): With a `.metadata` and the files that it names.

    Returns:
        `dict`: Nested as it was saved.

    Raises:
        BrokenFileError: it is damaged, or holds something else than tensors and plain values.
    """
    reader = _Reader(folder)
    try:
        metadata = reader.read_metadata()
        for where in metadata.storage_data.values():
            if Path(where.relative_path).name != where.relative_path or not (folder / where.relative_path).is_file():
                raise ValueError(f"it names {shorten(where.relative_path, 80)}, which is no file in it")
        flat = {
            name: torch.empty(tuple(entry.size), dtype=entry.properties.dtype)
            if isinstance(entry, TensorStorageMetadata)
            else None
            for name, entry in metadata.state_dict_metadata.items()
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is no process group
            planner = _Planner(flatten_state_dict=False, flatten_sharded_tensors=False)
            dcp.load(flat, storage_reader=reader, planner=planner, no_dist=True)
    except Exception as error:  # a torn file, a pickle of something else
        raise BrokenFileError(f"{folder} cannot be read: {one_line(error)}. Take another checkpoint.") from error
    nested: dict[Any, Any] = {}
    for name, value in flat.items():
        *path, last = metadata.planner_data[name]
        inner = nested
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return _with_lists(nested)


def _with_lists(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    inner = {name: _with_lists(item) for name, item in value.items()}
    if inner and all(isinstance(name, int) for name in inner) and sorted(inner) == list(range(len(inner))):
        return [inner[index] for index in range(len(inner))]
    return inner


def write_sharded(folder: Path, state: dict[str, Any]) -> None:
    """
    Write a state as one process writes a sharded one; any number of processes can load it.

    Args:
        folder (`Path`): Made here.
        state (`dict`): Nested dicts and lists of tensors and plain values.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group
        dcp.save(
            state,
            storage_writer=dcp.FileSystemWriter(folder),
            planner=dcp.DefaultSavePlanner(),
            no_dist=True,
        )
