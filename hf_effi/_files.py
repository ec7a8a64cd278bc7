"""
What a run leaves on the disk: written aside, forced to the disk, renamed into place.

A reader sees the old file or the new one, each whole, whatever ends the process in between. A name beside the target
that starts with `_` is not uploaded by any Trainer.
"""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import uuid
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from .errors import BrokenFileError

#: How the names of our files in a checkpoint begin. They continue a training and are no part of the model.
CHECKPOINT_PREFIXES = ("effi_", "hf_effi_")


def save_aside(path: str | Path, write: Callable[[Path], Any]) -> None:
    """
    Write a file or a folder under another name beside `path`, force it to the disk, and rename it.

    Missing parents are made. What stood at `path` stays until the new one is whole, and stays for good where `write`
    fails; a symbolic link is replaced, not followed.

    Args:
        path (`str` or `Path`): Where it goes.
        write (`Callable[[Path], Any]`): Writes a file, or makes a folder, at the path that it is given. That has the
            ending of `path`.

    Example:
    ```python
    save_aside("out/state.json", lambda part: part.write_text("{}"))
    ```
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"_{uuid.uuid4().hex[:8]}_{path.name}")
    try:
        write(part)
        for file in [part, *part.rglob("*")] if part.is_dir() else [part]:
            sync(file)
        if path.is_dir() and not path.is_symlink():
            old = part.with_name(f"{part.name}_old")
            path.rename(old)  # a folder cannot be replaced in one step
            part.rename(path)
            _remove(old)
        else:
            os.replace(part, path)
    finally:
        _remove(part)
    sync(path.parent)


def save_text(path: str | Path, text: str) -> None:
    """[`save_aside`] of a text, as UTF-8."""
    save_aside(path, lambda part: part.write_text(text, encoding="utf-8"))


def save_bytes(path: str | Path, content: bytes) -> None:
    """[`save_aside`] of bytes."""
    save_aside(path, lambda part: part.write_bytes(content))


def save_json(path: str | Path, value: Any, **options: Any) -> None:
    """[`save_aside`] of a value as JSON; `options` are those of `json.dumps`."""
    save_text(path, json.dumps(value, **options) + "\n")


def append_text(path: str | Path, text: str) -> None:
    """
    Append a text to a file of our own, as UTF-8. A symbolic link in its place is not followed.

    Raises:
        OSError: `path` is a link, or the disk does not take it.
    """
    no_link = getattr(os, "O_NOFOLLOW", 0)  # Windows makes a link for administrators only
    number = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | no_link, 0o666)
    with open(number, "a", encoding="utf-8") as file:
        file.write(text)


def drop_link(path: str | Path) -> None:
    """Remove a symbolic link, so that what is written at `path` does not go where somebody else pointed it."""
    if Path(path).is_symlink():
        Path(path).unlink()


def state_bytes(state: Any, whose: str) -> bytes:
    """
    Return a state as `torch.save` writes it, having checked that a checkpoint can give it back.

    Args:
        state: Tensors, numbers, strings, `None`, and lists, tuples and dicts of them.
        whose (`str`): Names the state in the error.

    Raises:
        ValueError: it holds something else, which a resume would refuse to load.
    """
    import torch

    buffer = io.BytesIO()
    try:
        torch.save(state, buffer)
        torch.load(io.BytesIO(buffer.getvalue()), map_location="cpu", weights_only=True)
    except Exception as error:  # pickle raises what it likes
        raise ValueError(
            f"The state of {whose} cannot be stored in a checkpoint: {_first_line(error)} Return tensors, "
            "numbers, strings, None, and lists, tuples and dicts of them (array.tolist() or torch.from_numpy(array) "
            "in place of a numpy array)."
        ) from error
    return buffer.getvalue()


#: Takes a state that could be written later, while a checkpoint is made whose files go to the disk in the background.
#: Returns whether it did.
later: ContextVar[Callable[[Path, Any], bool] | None] = ContextVar("later", default=None)


def save_state(path: str | Path, state: Any) -> None:
    """[`save_aside`] of a state by `torch.save`, without a check: for tensors that are large and known."""
    import torch

    if (take := later.get()) is not None and take(Path(path), state):
        return
    save_aside(path, lambda part: torch.save(state, part))


def load_state(path: str | Path, map_location: Any = "cpu") -> Any:
    """
    Return what [`save_state`] or [`state_bytes`] stored. Nothing in the file is run.

    Raises:
        BrokenFileError: there is no such file, or it is damaged.
    """
    import torch

    # A process of several that train on the CPU has the device cpu:0, which torch knows no way to load to.
    map_location = "cpu" if getattr(map_location, "type", None) == "cpu" else map_location
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except FileNotFoundError:
        raise missing_file(path) from None
    except Exception as error:  # a torn archive, a pickle of something else
        raise BrokenFileError(
            f"{path} is damaged or not a state of hf_effi ({_first_line(error)}). Resume from another checkpoint."
        ) from error


def load_json(path: str | Path) -> Any:
    """
    Return what [`save_json`] stored.

    Raises:
        BrokenFileError: there is no such file, or it is damaged.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise missing_file(path) from None
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else _first_line(error)
        raise BrokenFileError(f"{path} is damaged ({reason}). Resume from another checkpoint.") from error


def _first_line(error: Exception) -> str:
    """Return the first line of an error, or its class: some have no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def missing_file(path: str | Path) -> BrokenFileError:
    """Return the error that says that a checkpoint has lost a file."""
    path = Path(path)
    return BrokenFileError(
        f"{path.parent} has no {path.name}, which was written with it: the checkpoint was copied or uploaded in part. "
        "Copy the file too, or resume from another checkpoint."
    )


def sync(path: Path) -> None:
    """Force a file, or the names in a folder, to the disk, where the system can."""
    try:
        number = os.open(path, os.O_RDONLY)
    except OSError:
        if path.is_dir():
            return  # Windows opens no folder
        raise
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # "not here"; a full disk is an error
            raise
    finally:
        os.close(number)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
