"""
Whether a checkpoint was written to its end: what a process that was killed inside of a save leaves is told by name.
"""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

from transformers.trainer import (
    OPTIMIZER_NAME,
    SCALER_NAME,
    SCHEDULER_NAME,
    TRAINER_STATE_NAME,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..._files import CHECKPOINT_PREFIXES
from ...errors import BrokenFileError

#: what a Trainer reads when it resumes, as patterns; other files of a checkpoint are no concern of a resume
_READ = (
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model.bin.index.json",
    "adapter_model.bin",
    "config.json",
    "adapter_config.json",
    OPTIMIZER_NAME,
    SCHEDULER_NAME,
    SCALER_NAME,
    "rng_state*.pth",
    *(f"{prefix}*{ending}" for prefix in CHECKPOINT_PREFIXES for ending in (".pt", ".json")),
)


def check_checkpoint(folder: str | Path) -> None:
    """
    Raise where a resume from this checkpoint would stop at a file that is not whole.

    Only the structure of each file is looked at, in milliseconds for any size: a header and what it says of the
    length, a directory at the end, JSON that ends.

    Args:
        folder (`str` or `Path`): A `checkpoint-N`. What is no folder is left to the Trainer.

    Raises:
        BrokenFileError: names the file, what is wrong with it, and the newest whole checkpoint beside this one.
    """
    folder = Path(folder)
    if not folder.is_dir() or (broken := first_broken(folder)) is None:
        return
    others = sorted(_checkpoints_beside(folder), key=_step, reverse=True)
    whole = next((other for other in others if first_broken(other) is None), None)
    advice = (
        f"Resume from the newest whole checkpoint: resume_from_checkpoint={str(whole)!r}."
        if whole is not None
        else f"No other checkpoint in {folder.parent} is whole: start the run again."
    )
    raise BrokenFileError(
        f"{folder} is no whole checkpoint, as where a process was killed inside of a save: {broken}. {advice}"
    )


def first_broken(folder: Path) -> str | None:
    """Return a name and what is wrong with it, or `None` for a checkpoint whose files are whole."""
    try:
        return next(_broken(folder), None)
    except OSError as error:
        return f"it cannot be read ({error})"


def _broken(folder: Path) -> Iterator[str]:
    for path in sorted({path for pattern in _READ for path in folder.glob(pattern) if path.is_file()}):
        look = {".json": _wrong_json, ".safetensors": _wrong_tensors}.get(path.suffix, _wrong_archive)
        if (wrong := look(path)) is not None:
            yield f"{path.name} {wrong}"
        elif path.name.endswith(".index.json"):
            yield from _missing_shards(path)
    state = folder / TRAINER_STATE_NAME  # written last
    if not state.is_file():
        yield f"{TRAINER_STATE_NAME} is missing"
    elif (wrong := _wrong_json(state)) is not None:
        yield f"{TRAINER_STATE_NAME} {wrong}"
    elif not isinstance(json.loads(state.read_text(encoding="utf-8")), dict):
        yield f"{TRAINER_STATE_NAME} holds no state"


def _wrong_json(path: Path) -> str | None:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        return f"ends early or is damaged ({type(error).__name__}: {error})"
    return None


def _wrong_tensors(path: Path) -> str | None:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            return f"ends early ({size} bytes, which is less than its header)"
        try:
            entries = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
        except (ValueError, RecursionError, AttributeError, LookupError, TypeError):
            return "is damaged (its header is no description of tensors)"
    wanted = 8 + length + max(ends, default=0)
    return None if size == wanted else f"has {size} bytes where its header says {wanted}"


def _wrong_archive(path: Path) -> str | None:
    with path.open("rb") as file:
        start = file.read(4)
    if start[:1] == b"\x80":
        return None  # a pickle of an old torch, whose end only reading it shows
    try:
        with zipfile.ZipFile(path) as archive:
            archive.infolist()
    except zipfile.BadZipFile:
        return f"ends early or is damaged ({path.stat().st_size} bytes, no directory at the end)"
    return None


def _missing_shards(index: Path) -> Iterator[str]:
    found = json.loads(index.read_text(encoding="utf-8"))
    shards = found.get("weight_map", {}) if isinstance(found, dict) else {}
    for name in sorted(set(shards.values()) if isinstance(shards, dict) else ()):
        if not (index.parent / str(name)).is_file():
            yield f"{name} is missing, which {index.name} names"


def _checkpoints_beside(folder: Path) -> Iterator[Path]:
    for other in folder.parent.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if other.is_dir() and other.name != folder.name and _step(other) >= 0:
            yield other


def _step(folder: Path) -> int:
    number = folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
    return int(number) if number.isascii() and number.isdigit() else -1
