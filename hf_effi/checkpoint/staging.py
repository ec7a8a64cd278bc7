"""
Copies in host memory of what a save would write, in buffers that are reused from one save to the next.

A fresh copy of a large state costs more in page faults than in copying: reused buffers are what makes it cheap.
"""

from __future__ import annotations

import copy
import mmap
import os
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from .copies import Copies

Kind = Literal["torch", "safetensors"]


@dataclass
class StagedFile:
    """
    A file that is still to be written.

    Args:
        path (`Path`): Where.
        kind (`str`): By `torch.save`, or as safetensors.
        content: What a writer is given, with every tensor replaced by its copy.
        metadata (`dict`, *optional*): Of a safetensors file.
        memory (`str`, *optional*): Name of the memory that the copies are in; that of the file by default.
    """

    path: Path
    kind: Kind
    content: Any
    metadata: dict[str, str] | None = None
    memory: str = ""

    def __post_init__(self) -> None:
        self.memory = self.memory or self.path.name

    def write(self) -> None:
        """Write the file. There is nothing to tell to another process."""
        write_file(self.path, self.kind, self.content, self.metadata)

    def finish(self, parts: list[Any]) -> None:
        """Nothing is left to do once others have written."""


def memory_name(path: Path, checkpoint: Path) -> str:
    """
    Return the name of the memory for the copies of a file: the same for each save, and no other file's of the save.

    An average or a second adapter lies in a folder of the checkpoint, under the name of the model's own file.
    """
    return path.resolve().relative_to(checkpoint.resolve()).as_posix().replace("/", ":")


def write_file(path: Path, kind: Kind, content: Any, metadata: dict[str, str] | None) -> None:
    """Write a state as one file."""
    if kind == "torch":
        torch.save(content, path)
    else:
        from safetensors.torch import save_file

        save_file(content, path, metadata=metadata)


class Buffers(Protocol):
    """Where copies live."""

    def begin(self, name: str, nbytes: int) -> None:
        """Make room for all copies of one file."""

    def room_for(self, name: str, key: Hashable, tensor: torch.Tensor) -> tuple[Any, torch.Tensor]:
        """Return what stands for the copy of a tensor in the content of the file, and where it is to be copied to."""

    def close(self) -> None:
        """Give the memory back."""


class HostBuffers:
    """Copies in the memory of this process, page-locked where there is an accelerator."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, Hashable], torch.Tensor] = {}

    def begin(self, name: str, nbytes: int) -> None:
        """Nothing to do: each tensor has a buffer of its own."""

    def room_for(self, name: str, key: Hashable, tensor: torch.Tensor) -> tuple[Any, torch.Tensor]:
        """Return the buffer of the last save where that fits."""
        buffer = self._held.get((name, key))
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._held[name, key] = buffer
        return buffer, buffer

    def close(self) -> None:
        """Give the memory back."""
        self._held.clear()


@dataclass(frozen=True)
class Place:
    """Where a tensor is in the shared memory of a file: what travels to the process that writes it."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def tensor(self, memory: mmap.mmap) -> torch.Tensor:
        """Return the tensor that is there, without a copy."""
        count = 1
        for size in self.shape:
            count *= size
        if not count:
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.frombuffer(memory, dtype=self.dtype, count=count, offset=self.offset).view(self.shape)


class SharedBuffers:
    """
    Copies in anonymous shared memory of the system, one piece for each file, which another process can map.

    The memory lives as long as one process has it open, so it outlives a trainer that is killed and leaves nothing
    behind in `/dev/shm`.
    """

    #: the start of each tensor, so that every dtype is aligned
    ALIGNMENT = 64

    def __init__(self) -> None:
        self._held: dict[str, tuple[int, mmap.mmap]] = {}
        self._next: dict[str, int] = {}

    def begin(self, name: str, nbytes: int) -> None:
        """Make room for all copies of one file; the memory of the last save is used again where it is large enough."""
        self._next[name] = 0
        if name in self._held and len(self._held[name][1]) >= nbytes:
            return
        self._drop(name)
        number = os.memfd_create(f"hf_effi {name}")
        os.ftruncate(number, max(nbytes, mmap.PAGESIZE))
        self._held[name] = (number, mmap.mmap(number, max(nbytes, mmap.PAGESIZE)))

    def room_for(self, name: str, key: Hashable, tensor: torch.Tensor) -> tuple[Any, torch.Tensor]:
        """Return the next free place."""
        place = Place(self._next[name], tuple(tensor.shape), tensor.dtype)
        self._next[name] += aligned(tensor.nbytes)
        return place, place.tensor(self._held[name][1])

    def descriptor(self, name: str) -> int:
        """Return the file descriptor of a file's memory."""
        return self._held[name][0]

    def close(self) -> None:
        """Give the memory back."""
        for name in list(self._held):
            self._drop(name)

    def _drop(self, name: str) -> None:
        if (held := self._held.pop(name, None)) is not None:
            os.close(held[0])  # the mapping goes with its last tensor


def aligned(nbytes: int) -> int:
    """Return a number of bytes, rounded up to the alignment of [`SharedBuffers`]."""
    return -(-nbytes // SharedBuffers.ALIGNMENT) * SharedBuffers.ALIGNMENT


class _NotCopyable(Exception):
    """Something in a state cannot be copied here, so that its file is written at once."""


def stage(
    path: Path,
    kind: Kind,
    content: Any,
    metadata: dict[str, str] | None,
    buffers: Buffers,
    copies: Copies,
    name: str | None = None,
) -> StagedFile:
    """
    Copy a state, so that it can be written later, whatever the run does to it meanwhile.

    Args:
        name (`str`, *optional*): Of the memory for the copies. Two files of one checkpoint must not share it, and two
            folders of one can have files with one name; each save has the same. The name of the file by default.

    Raises:
        _NotCopyable: it holds tensors of a subclass, such as sharded ones, or objects that cannot be copied.
    """
    name = name or path.name
    return StagedFile(path, kind, copied(name, content, buffers, copies), metadata, name)


def copied(name: str, content: Any, buffers: Buffers, copies: Copies) -> Any:
    """
    Return a state with every tensor replaced by its copy, which is whole once `copies` is.

    Args:
        name (`str`): Of the file.
        content: Nested dicts, lists and tuples.
        buffers (`Buffers`): Where the copies live.
        copies (`Copies`): Makes them.

    Raises:
        _NotCopyable: as in [`stage`]. Nothing has been copied then.
    """
    tensors: list[torch.Tensor] = []
    collect(content, tensors)
    buffers.begin(name, sum(aligned(tensor.nbytes) for tensor in tensors))
    found: dict[int, Any] = {}
    rooms: list[tuple[torch.Tensor, torch.Tensor]] = []

    def of(tensor: torch.Tensor, key: Hashable) -> Any:
        if id(tensor) not in found:
            found[id(tensor)], room = buffers.room_for(name, key, tensor)
            rooms.append((room, tensor))
        return found[id(tensor)]

    replaced = mapped(content, of)
    for room, tensor in rooms:
        copies.add(room, tensor)
    return replaced


def collect(content: Any, found: list[torch.Tensor], seen: set[int] | None = None) -> None:
    """
    Add each tensor of a state once to `found`.

    Raises:
        _NotCopyable: one is not a plain dense tensor.
    """
    seen = set() if seen is None else seen
    if isinstance(content, torch.Tensor):
        if type(content) not in (torch.Tensor, torch.nn.Parameter) or content.layout != torch.strided:
            raise _NotCopyable(type(content).__name__)
        if id(content) not in seen:
            seen.add(id(content))
            found.append(content)
    elif isinstance(content, dict):
        for value in content.values():
            collect(value, found, seen)
    elif isinstance(content, (list, tuple)):
        for value in content:
            collect(value, found, seen)


def mapped(content: Any, of: Callable[[torch.Tensor, Hashable], Any], key: tuple[Hashable, ...] = ()) -> Any:
    """
    Return a state with each tensor replaced by `of(tensor, its place in the state)` and everything else copied.

    Raises:
        _NotCopyable: something cannot be copied.
    """
    if isinstance(content, torch.Tensor):
        return of(content, key)
    if isinstance(content, dict):
        pairs = {name: mapped(value, of, (*key, name)) for name, value in content.items()}
        if type(content) is dict:
            return pairs
        made = copy.copy(content)  # of its own class, such as an OrderedDict with attributes
        made.update(pairs)
        return made
    if isinstance(content, (list, tuple)):
        items = [mapped(value, of, (*key, index)) for index, value in enumerate(content)]
        return type(content)(*items) if hasattr(content, "_fields") else type(content)(items)
    try:
        return copy.deepcopy(content)
    except Exception as error:  # whatever a class raises
        raise _NotCopyable(f"{type(content).__name__}: {error}") from error


def nbytes_of(content: Any) -> int:
    """Return the bytes of all tensors in a state."""
    found: list[torch.Tensor] = []
    collect(content, found)
    return sum(tensor.nbytes for tensor in found)
