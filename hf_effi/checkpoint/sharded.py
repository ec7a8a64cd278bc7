"""
Sharded states, as FSDP saves them: planned by all processes together, copied, and written by each in the background.

The folder is that of `torch.distributed.checkpoint`: a file of each process, and `.metadata`, which is written last.
"""

from __future__ import annotations

import dataclasses
import io
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, SavePlan, SavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult

from .._files import sync
from .copies import Copies
from .staging import Buffers, _NotCopyable, collect, copied

#: Gives a value of this process to all, and returns those of all, by rank.
Agree = Callable[[Any], list[Any]]


class _Prepared(DefaultSavePlanner):
    """Hands over copies, where a planner would look the tensors up."""

    def __init__(self, data: dict[MetadataIndex, Any]) -> None:
        super().__init__()
        self._data = data

    def resolve_data(self, write_item: Any) -> Any:
        found = self._data[write_item.index]
        return io.BytesIO(found) if isinstance(found, bytes) else found


@dataclasses.dataclass
class StagedShards:
    """
    What this process still has to write of a sharded state.

    Args:
        path (`Path`): The folder.
        plan (`SavePlan`): What of it this process writes.
        content (`list`): The copy of a tensor, or bytes, for each item of the plan.
        metadata (`Metadata`, *optional*): What all processes write together; on the first process only.
    """

    path: Path
    plan: SavePlan
    content: list[Any]
    metadata: Metadata | None = None

    @property
    def memory(self) -> str:
        """Name of the memory that the copies are in."""
        return self.path.name

    def write(self) -> list[dict[str, Any]]:
        """Write the file of this process, and return what is where in it."""
        # With nothing to copy ahead, the writer makes no stream on a device.
        writer = FileSystemWriter(self.path, sync_files=False, per_thread_copy_ahead=0)
        indices = [item.index for item in self.plan.items]
        future = writer.write_data(self.plan, _Prepared(dict(zip(indices, self.content, strict=True))))
        future.wait()
        return [_entry(result) for result in future.value()]

    def finish(self, parts: list[list[dict[str, Any]]]) -> None:
        """Write `.metadata`, on the first process, once all have written their files."""
        if self.metadata is None:
            raise ValueError("finish() is for the first process, which has the metadata.")
        results = [[_result(entry) for entry in part] for part in parts]
        FileSystemWriter(self.path).finish(dataclasses.replace(self.metadata), results)
        sync(self.path)


def _entry(result: WriteResult) -> dict[str, Any]:
    index, where = result.index, result.storage_data
    return {
        "name": index.fqn,
        "offset": None if index.offset is None else list(index.offset),
        "index": index.index,
        "file": where.relative_path,
        "start": where.offset,
        "bytes": where.length,
    }


def _result(entry: dict[str, Any]) -> WriteResult:
    offset = None if entry["offset"] is None else torch.Size(entry["offset"])
    where = _StorageInfo(entry["file"], entry["start"], entry["bytes"])
    return WriteResult(MetadataIndex(entry["name"], offset, entry["index"]), entry["bytes"], where)


@dataclasses.dataclass
class _Made:
    local: SavePlan
    final: SavePlan
    metadata: Metadata | None


class Plans:
    """
    Who writes what of a sharded state. Planned once; again only where the part of a process has changed.

    Args:
        agree (`Callable`): Gives a value of this process to all, and returns those of all, by rank.
        rank (`int`): Of this process.
    """

    def __init__(self, agree: Agree, rank: int) -> None:
        self._agree, self._rank = agree, rank
        self._made: dict[str, _Made] = {}
        #: how often all processes have planned together
        self.planned = 0

    def stage(
        self,
        state: dict[str, Any],
        folder: Path,
        planner: SavePlanner,
        fits: Callable[[str, int], bool],
        buffers: Buffers,
        copies: Copies,
    ) -> StagedShards | None:
        """
        Plan with the other processes and copy what this one has to write. All processes call it together.

        Args:
            state (`dict`): As `torch.distributed.checkpoint.save` takes it.
            folder (`Path`): Where it goes.
            planner (`SavePlanner`): A fresh one.
            fits (`Callable[[str, int], bool]`): Whether copies of so many bytes, on this machine, have room.
            buffers, copies: Where the copies live, and who makes them.

        Returns:
            [`StagedShards`], or `None` on all processes where one has no room or cannot copy what it has.

        Raises:
            OSError: on all processes, where the plan of one failed.
        """
        writer, name = FileSystemWriter(folder), folder.name
        local, nbytes, problem, copyable = SavePlan([]), 0, None, True
        try:
            planner.set_up_planner(state, writer.storage_meta(), self._rank == 0)
            local = writer.prepare_local_plan(planner.create_local_plan())
            tensors: list[torch.Tensor] = []
            try:
                collect([planner.resolve_data(item) for item in local.items if item.tensor_data is not None], tensors)
            except _NotCopyable:
                copyable = False
            nbytes = sum(tensor.nbytes for tensor in tensors)
        except Exception as error:  # the others have to know
            problem = f"{type(error).__name__}: {error}"
        made = self._made.get(name)
        host = socket.gethostname()
        told = self._agree((problem, copyable, host, nbytes, made is not None and made.local == local))
        for rank, (text, *_) in enumerate(told):
            if text is not None:
                raise OSError(f"process {rank} could not plan {name}: {text}")
        here = sum(size for _, _, where, size, _ in told if where == host)
        has_room = fits(name, here)
        if not all(row[1] for row in told) or not all(self._agree(has_room)):
            return None
        if made is None or not all(row[-1] for row in told):
            made = self._made[name] = self._together(local, writer, planner)
        content: list[Any] = []
        for item in made.final.items:
            found = planner.resolve_data(item)
            content.append(found.getvalue() if isinstance(found, io.BytesIO) else found)
        return StagedShards(folder, made.final, copied(name, content, buffers, copies), made.metadata)

    def _together(self, local: SavePlan, writer: FileSystemWriter, planner: SavePlanner) -> _Made:
        self.planned += 1
        plans = self._agree(local)
        answer: tuple[list[SavePlan] | None, str | None] = (None, None)
        metadata: Metadata | None = None
        if self._rank == 0:
            try:
                whole, metadata = planner.create_global_plan(plans)
                answer = (writer.prepare_global_plan(whole), None)
            except Exception as error:  # the others have to know
                answer = (None, f"{type(error).__name__}: {error}")
        finals, problem = self._agree(answer)[0]
        if finals is None:
            raise OSError(f"{writer.path} could not be planned: {problem}")
        return _Made(local, planner.finish_plan(finals[self._rank]), metadata)
