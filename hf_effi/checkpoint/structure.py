"""
Whether the files of a checkpoint are whole, from their structure alone: headers and what they say of the length, a
directory at the end, JSON that ends. Milliseconds for any size.
"""

from __future__ import annotations

import json
import pickletools
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .._files import CHECKPOINT_PREFIXES

# As transformers calls them. Named here since importing a Trainer takes seconds, and whoever only looks needs none.
OPTIMIZER_NAME, SCHEDULER_NAME, SCALER_NAME = "optimizer.pt", "scheduler.pt", "scaler.pt"
TRAINER_STATE_NAME = "trainer_state.json"
PREFIX_CHECKPOINT_DIR = "checkpoint"

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
    yield from _broken_shards(folder)
    state = folder / TRAINER_STATE_NAME  # written last
    if not state.is_file():
        yield f"{TRAINER_STATE_NAME} is missing"
    elif (wrong := _wrong_json(state)) is not None:
        yield f"{TRAINER_STATE_NAME} {wrong}"
    elif not isinstance(found := json.loads(state.read_text(encoding="utf-8")), dict):
        yield f"{TRAINER_STATE_NAME} holds no state"
    elif (step := step_of(folder)) >= 0 and found.get("global_step") != step:
        yield f"{TRAINER_STATE_NAME} is of update {found.get('global_step')!r}"
    yield from _missing_halves(folder)


def has_optimizer(folder: Path) -> bool:
    """Return whether a checkpoint holds the state of an optimizer, its own or an engine's."""
    return (folder / OPTIMIZER_NAME).is_file() or bool(_of_an_engine(folder))


def _of_an_engine(folder: Path) -> list[Path]:
    """Return the files and folders in which FSDP and DeepSpeed keep the optimizer."""
    return [*folder.glob("optimizer.bin"), *folder.glob("optimizer_*"), *folder.glob("global_step*")]


def _missing_halves(folder: Path) -> Iterator[str]:
    """
    What a resume would go on without, in silence: stock then starts a fresh optimizer, scheduler or generator.

    A checkpoint of `save_only_model=True` has none of the three. DeepSpeed keeps the scheduler with the optimizer.
    """
    deepspeed = any(path.is_dir() and path.name.startswith("global_step") for path in _of_an_engine(folder))
    found = {
        OPTIMIZER_NAME: has_optimizer(folder),
        SCHEDULER_NAME: (folder / SCHEDULER_NAME).is_file() or deepspeed,
        "rng_state.pth": any(folder.glob("rng_state*.pth")),
    }
    if any(found.values()):
        yield from (f"{name} is missing" for name, there in found.items() if not there)


def sharded_states(folder: Path) -> list[Path]:
    """Return the folders of a checkpoint in which FSDP keeps weights and optimizer, each process its shards."""
    found = [*folder.glob("pytorch_model_fsdp_*"), *folder.glob("optimizer_*")]
    return sorted(path for path in found if path.is_dir())


def _broken_shards(folder: Path) -> Iterator[str]:
    states = sharded_states(folder)
    if states and not any(path.name.startswith("pytorch_model_fsdp_") for path in states):
        yield "pytorch_model_fsdp_0 is missing"
    for state in states:
        metadata = state / ".metadata"
        if not metadata.is_file():  # written last
            yield f"{state.name}/.metadata is missing, as where not every process had written its shards"
            continue
        if (ends := _ends_of_shards(metadata)) is None:
            yield f"{state.name}/.metadata ends early or is damaged"
            continue
        for name, end in sorted(ends.items()):
            path = state / name
            if not path.is_file():
                yield f"{state.name}/{name} is missing, which its .metadata names"
            elif (size := path.stat().st_size) < end:
                yield f"{state.name}/{name} ends early ({size} bytes where its .metadata says {end})"


def _ends_of_shards(metadata: Path) -> dict[str, int] | None:
    """
    Return the files that a `.metadata` names, and how long each has to be; `None` for one that is damaged.

    It is a pickle, whose steps are only read: nothing in it is run. Each tensor has `relative_path`, `offset` and
    `length`, one after the other.
    """
    ends: dict[str, int] = {}
    memo: dict[int, Any] = {}
    found: dict[str, Any] = {}
    last: Any = None
    wanted: str | None = None
    try:
        with metadata.open("rb") as file:
            for step, value, _ in pickletools.genops(file):
                if step.name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
                    memo[len(memo) if value is None else value] = last
                    continue
                last = memo.get(int(value or 0)) if step.name in ("BINGET", "LONG_BINGET") else value
                if last in ("relative_path", "offset", "length"):
                    wanted = str(last)
                elif wanted is not None:
                    found[wanted] = last
                    name, start, length = (found.get(key) for key in ("relative_path", "offset", "length"))
                    if wanted == "length" and type(start) is int and type(length) is int and isinstance(name, str):
                        if Path(name).name == name:
                            ends[name] = max(ends.get(name, 0), start + length)
                        found.clear()
                    wanted = None
    except (ValueError, OverflowError):
        return None
    return ends


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


def step_of(folder: Path) -> int:
    """Return N of `checkpoint-N`, and -1 for another name."""
    number = folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
    return int(number) if number != folder.name and number.isascii() and number.isdigit() else -1
