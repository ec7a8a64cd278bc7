"""
From a folder in progress to a checkpoint: write what is still in memory, force everything to the disk, seal, rename.

Each moment at which a process can end leaves the older checkpoints as they were:

1. `write`, `sync`: files of the folder in progress. Its name begins with a dot; nobody takes it for a checkpoint.
   Where each process writes a part, the leader waits for the reports of the others, and writes `.metadata` then.
2. `seal`: the manifest, written last into the folder in progress.
3. `replace`: only where a checkpoint of this step exists already, it moves aside. [`repair_run_dir`] knows both.
4. `rename`: one step of the file system. From here on the new checkpoint is the newest.
5. `clean`, `rotate`: what is deleted gets a name with a dot first.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .._files import sync
from ._locks import take
from .folders import ASIDE, REPLACED, rotate
from .manifest import Digest, files_in, write_manifest
from .ranks import LOCK, join, report, reports_of
from .staging import StagedFile

if TYPE_CHECKING:  # whoever saves no shards imports nothing of them
    from .sharded import StagedShards

Phase = Literal["write", "sync", "seal", "replace", "rename", "clean", "rotate"]


@dataclass
class Commit:
    """
    One checkpoint on its way to the disk.

    Args:
        run_dir (`Path`): Folder of the run.
        step (`int`): The update it holds.
        leader (`bool`): Whether this process seals and renames; the others only write files.
        rank (`int`): Of this process, where others write too.
        others (`tuple[int, ...]`): Of the processes that the leader waits for.
        patience (`float`): How many seconds it waits for them while nobody writes a byte.
        digest (`str`): Of the manifest.
        facts (`dict`): For the manifest.
        limit (`int`, *optional*): `save_total_limit`.
        best (`Path`, *optional*): The best checkpoint, which a rotation leaves.
        writes (`list`): What is still in memory.
        token (`str`): Tells this folder in progress from those of other starts of the run, whose writers may be alive.
        held (`int`, *optional*): Descriptor of the lock of the folder in progress, from `begin` to the end.
        at (`Callable[[str], None]`): Is told each phase before it begins.
    """

    run_dir: Path
    step: int
    leader: bool = True
    rank: int = 0
    others: tuple[int, ...] = ()
    patience: float = 240.0
    digest: Digest = "crc32"
    facts: dict[str, Any] = field(default_factory=dict)
    limit: int | None = None
    best: Path | None = None
    writes: list[StagedFile | StagedShards] = field(default_factory=list)
    token: str = "0"
    held: int | None = None
    at: Callable[[Phase], None] = lambda phase: None

    @property
    def aside(self) -> Path:
        """The folder in progress, which holds the checkpoint under its own name."""
        return self.run_dir / f"{ASIDE}{self.step}-{self.token}"

    @property
    def made(self) -> Path:
        """Where the checkpoint is written."""
        return self.aside / f"checkpoint-{self.step}"

    @property
    def final(self) -> Path:
        """Where the checkpoint is found once it is whole."""
        return self.run_dir / f"checkpoint-{self.step}"

    def begin(self) -> None:
        """Make an empty folder in progress and lock it. The leader calls it before anybody writes."""
        shutil.rmtree(self.aside, ignore_errors=True)
        self.made.mkdir(parents=True)
        self.held = take(self.aside / LOCK)

    def join(self) -> None:
        """Take part in a folder in progress that the leader has begun. A process calls it before it writes."""
        self.held = join(self.aside, self.rank)

    def finish(self) -> None:
        """
        Write what is in memory and force it to the disk; the leader also seals, renames and rotates, once all other
        processes have written their files.

        Raises:
            OSError: the disk did not take it, or another process did not write its part. The older checkpoints are as
                they were, and the folder in progress is gone. What else writing a file raises is passed on, after the
                same.
        """
        try:
            self.at("write")
            told = {file.path.name: file.write() for file in self.writes}
            parts = {name: part for name, part in told.items() if part is not None}
            self.sync_files()
            if not self.leader:
                report(self.aside, self.rank, parts)
                return self.release()
            self._bring_together(parts)
            self._seal()
            self._clean()
        except BaseException as error:
            self.abandon(error)
            raise
        self.release()

    def _bring_together(self, parts: dict[str, Any]) -> None:
        others = reports_of(self.aside, self.others, self.patience)
        for file in self.writes:
            if (own := parts.get(file.path.name)) is not None:
                file.finish([own, *(told[file.path.name] for told in others)])

    def release(self) -> None:
        """Give the lock back, or this process's part in it."""
        held, self.held = self.held, None
        if held is not None:
            os.close(held)

    def abandon(self, error: BaseException | None = None) -> None:
        """Delete the folder in progress, or, where another process leads, tell it that it waits in vain."""
        if self.leader:
            shutil.rmtree(self.aside, ignore_errors=True)
        elif error is not None and self.aside.is_dir():
            with suppress(OSError):
                report(self.aside, self.rank, {}, f"{type(error).__name__}: {error}")
        self.release()

    def sync_files(self) -> None:
        """Force every file of the folder in progress to the disk, and the names in it."""
        self.at("sync")
        for path in files_in(self.made):
            try:
                sync(path)
            except FileNotFoundError:
                # Another process has given the file its name since; it forces to the disk what it writes.
                if self.leader:
                    raise
        for folder in (self.made, *(path for path in self.made.rglob("*") if path.is_dir())):
            sync(folder)

    def _seal(self) -> None:
        self.at("seal")
        self._take_along()
        write_manifest(self.made, self.step, self.digest, self.facts)
        sync(self.made)
        replaced = self.aside / REPLACED / self.final.name
        try:
            if self.final.exists():
                self.at("replace")
                replaced.parent.mkdir()
                os.rename(self.final, replaced)
            self.at("rename")
            os.rename(self.made, self.final)
        except BaseException:
            if replaced.exists() and not self.final.exists():
                os.rename(replaced, self.final)
            raise
        sync(self.run_dir)

    def _take_along(self) -> None:
        """
        Take what somebody has put under the checkpoint's name before it was there, such as a callback's `on_save`.
        """
        if not self.final.is_dir() or (self.final / "trainer_state.json").exists():
            return
        for path in sorted(files_in(self.final)):
            target = self.made / path.relative_to(self.final)
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                os.rename(path, target)
                sync(target)

    def _clean(self) -> None:
        self.at("clean")
        shutil.rmtree(self.aside, ignore_errors=True)
        self.at("rotate")
        rotate(self.run_dir, self.limit, (self.best, self.final))
