"""The checkpoints of a run on disk: listed, searched for the newest whole one, rotated, repaired after a crash."""

from __future__ import annotations

import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ._locks import lock, locked_elsewhere
from .manifest import CheckpointReport, Level, verify_checkpoint
from .ranks import LOCK, locks_in
from .structure import step_of

logger = logging.getLogger(__name__)

#: How the names of folders in progress begin. With a dot, no reader of `checkpoint-*` sees them, ours or another's.
ASIDE = ".hf_effi-tmp-"
TRASH = ".hf_effi-trash-"
#: where a checkpoint is kept while another one of the same step takes its name
REPLACED = "replaced"


@dataclass(frozen=True)
class Resumable:
    """
    What a search for a checkpoint to go on from has found.

    Args:
        path (`Path`, *optional*): The newest whole checkpoint; `None` where there is none.
        skipped (`list[CheckpointReport]`): Newer ones that are not whole, each with what is wrong with it.
    """

    path: Path | None
    skipped: list[CheckpointReport] = field(default_factory=list)

    def __str__(self) -> str:
        found = "no whole checkpoint" if self.path is None else str(self.path)
        left_out = "; ".join(f"{report.path.name}: {report.problem}" for report in self.skipped)
        return found + (f" (not whole, and skipped: {left_out})" if left_out else "")


def checkpoints_in(run_dir: str | Path) -> list[Path]:
    """Return the `checkpoint-N` folders of a run, by step, the oldest first."""
    folder = Path(run_dir)
    if not folder.is_dir():
        return []
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir() and step_of(path) >= 0]
    return sorted(found, key=step_of)


def list_checkpoints(run_dir: str | Path, level: Level = "size") -> list[CheckpointReport]:
    """
    Return a report of each checkpoint of a run, the oldest first.

    Args:
        run_dir (`str` or `Path`): The `output_dir` of a run; one that does not exist has none.
        level (`str`, *optional*, defaults to `"size"`): As in [`verify_checkpoint`].
    """
    return [verify_checkpoint(path, level) for path in checkpoints_in(run_dir)]


def find_resumable(run_dir: str | Path, level: Level = "content") -> Resumable:
    """
    Return the newest whole checkpoint of a run, with those that were skipped. Nothing on the disk is changed.

    Args:
        run_dir (`str` or `Path`): The `output_dir` of a run.
        level (`str`, *optional*, defaults to `"content"`): As in [`verify_checkpoint`]. `"size"` does not find a
            flipped bit.

    Example:
    ```python
    found = find_resumable("out")
    trainer.train(resume_from_checkpoint=found.path and str(found.path))
    ```
    """
    skipped: list[CheckpointReport] = []
    for path in reversed(checkpoints_in(run_dir)):
        report = verify_checkpoint(path, level)
        if report.whole:
            return Resumable(path, skipped)
        skipped.append(report)
    return Resumable(None, skipped)


def rotate(run_dir: Path, limit: int | None, keep: Sequence[Path | None] = ()) -> list[Path]:
    """
    Delete the oldest checkpoints until `limit` are left, and return which were deleted.

    As in a Trainer the newest one and those of `keep` stay. Beyond that the newest *whole* one stays, and what is not
    whole does not count: `limit=1` leaves one checkpoint that can be resumed, if there was one. A checkpoint that goes
    is renamed first, so that no half of it is ever found under its name.

    Args:
        run_dir (`Path`): The folder of the run.
        limit (`int`, *optional*): `save_total_limit`; nothing is deleted without it, or with 0 or less.
        keep (`Sequence`): Checkpoints that stay, such as the best one.
    """
    if limit is None or limit <= 0:
        return []
    reports = list_checkpoints(run_dir)
    whole = [report.path for report in reports if report.whole]
    protected = {path.resolve() for path in (*keep, *whole[-1:]) if path is not None}
    protected |= {reports[-1].path.resolve()} if reports else set()
    broken = [report.path for report in reports if not report.whole]
    excess = len(whole) - max(limit, len([path for path in whole if path.resolve() in protected]))
    removed = []
    # What is not whole goes only where whole ones are left in its place.
    for path in [*(broken if len(whole) >= limit else []), *whole]:
        if path.resolve() in protected or (path in whole and excess <= 0):
            continue
        excess -= path in whole
        remove(path)
        removed.append(path)
    return removed


def remove(path: Path) -> None:
    """Delete a folder so that nobody finds half of it: under another name, which begins with a dot."""
    trash = path.with_name(f"{TRASH}{uuid.uuid4().hex[:8]}")
    try:
        path.rename(trash)
    except FileNotFoundError:
        return
    shutil.rmtree(trash, ignore_errors=True)


def repair_run_dir(run_dir: str | Path, wait_seconds: float = 600.0) -> list[str]:
    """
    Put a folder in order after a crash, and return what was done, one sentence each.

    A checkpoint that was complete and had not got its name yet gets it; one that had just been moved out of the way
    for a newer one of the same step gets its name back; what was not complete is deleted, and so is what a rotation
    had begun to delete. A checkpoint under its own name is never touched.

    Args:
        run_dir (`str` or `Path`): The `output_dir` of a run that no Trainer is writing to.
        wait_seconds (`float`, *optional*, defaults to 600): How long to wait for the writer of a trainer that was
            killed, which may still be finishing a checkpoint.

    Raises:
        TimeoutError: somebody is still writing after that time.

    Example:
    ```python
    repair_run_dir("out")
    ```
    """
    run_dir, done = Path(run_dir), list[str]()
    if not run_dir.is_dir():
        return done
    for aside in sorted(run_dir.glob(f"{ASIDE}*")):
        with _nobody_writes(aside, wait_seconds):
            for made in sorted(aside.glob("checkpoint-*")) if aside.is_dir() else ():
                final = run_dir / made.name
                if verify_checkpoint(made).whole and verify_checkpoint(made).sealed and not final.exists():
                    os.rename(made, final)
                    done.append(f"{made.name} was complete and got its name.")
                else:
                    done.append(f"{made.name} was being written and not complete: deleted.")
            old = aside / REPLACED
            for kept in sorted(old.glob("checkpoint-*")) if old.is_dir() else ():
                if not (run_dir / kept.name).exists():
                    os.rename(kept, run_dir / kept.name)
                    done.append(f"{kept.name} had been moved out of the way and got its name back.")
            shutil.rmtree(aside, ignore_errors=True)
    for trash in sorted(run_dir.glob(f"{TRASH}*")):
        shutil.rmtree(trash, ignore_errors=True)
        done.append(f"{trash.name} was being deleted: done.")
    return done


@contextmanager
def _nobody_writes(aside: Path, wait_seconds: float) -> Iterator[None]:
    end, told = time.monotonic() + wait_seconds, False
    while any(locked_elsewhere(path) for path in locks_in(aside)):
        if time.monotonic() > end:
            raise TimeoutError(
                f"Somebody has been writing to {aside} for {wait_seconds:.0f} seconds. If it is another run, give "
                "this one an output_dir of its own; if it is a writer that hangs, end that process."
            )
        if not told:
            logger.warning(f"A writer is finishing a checkpoint in {aside}: waiting for it.")
            told = True
        time.sleep(0.2)
    with lock(aside / LOCK) if aside.is_dir() else _nothing():
        yield


@contextmanager
def _nothing() -> Iterator[None]:
    yield
