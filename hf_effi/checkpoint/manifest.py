"""
The manifest of a checkpoint: which files it has, how long each is, and a digest of each.

It is written last, into a folder that has not been renamed into place yet. So a `checkpoint-N` with a manifest was
written to its end, and whatever happened to it since can be found.
"""

from __future__ import annotations

import hashlib
import os
import platform
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from .._compat import CORE_PACKAGES, version_of
from .._files import save_json
from .._untrusted import load_json
from .._version import __version__
from ..errors import BrokenFileError
from .structure import first_broken, step_of

Digest = Literal["crc32", "sha256"]
#: "size" compares lengths and the structure of each file, in milliseconds; "content" reads every byte.
Level = Literal["size", "content"]

MANIFEST = "hf_effi_manifest.json"
#: of `MANIFEST`
SCHEMA = 1
#: What a copy may lack and still be resumed: `training_args.bin` holds a token and is not uploaded.
NOT_NEEDED = ("training_args.bin", "README.md")
_BLOCK = 1 << 22


@dataclass(frozen=True)
class CheckpointReport:
    """
    What was found of one checkpoint.

    Args:
        path (`Path`): Its folder.
        step (`int`): Of its name; -1 where the name is another one.
        sealed (`bool`): Whether it has a manifest. Without one only the structure of its files can be looked at.
        problem (`str`, *optional*): The first file that is wrong, and how; `None` for a whole checkpoint.
        level (`str`): How closely it was looked at.
        size (`int`): Bytes of all its files.
    """

    path: Path
    step: int
    sealed: bool
    problem: str | None
    level: Level
    size: int

    @property
    def whole(self) -> bool:
        """Whether nothing is wrong."""
        return self.problem is None


def digest_of(path: Path, kind: Digest) -> str:
    """Return the digest of a file in hexadecimal digits, reading it in blocks."""
    crc, sha = 0, hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            if kind == "crc32":
                crc = zlib.crc32(block, crc)
            else:
                sha.update(block)
    return f"{crc:08x}" if kind == "crc32" else sha.hexdigest()


def files_in(folder: Path) -> Iterator[Path]:
    """Yield every file below a folder except its manifest, in one order."""
    for parent, folders, names in os.walk(folder):
        folders.sort()
        yield from (Path(parent, name) for name in sorted(names) if name != MANIFEST)


def write_manifest(folder: Path, step: int, digest: Digest, facts: dict[str, Any]) -> None:
    """
    Write the manifest of a folder whose files are all there, and force it to the disk.

    Args:
        folder (`Path`): Of the checkpoint.
        step (`int`): The update that it holds.
        digest (`str`): `"crc32"` or `"sha256"`.
        facts (`dict`): What a resume compares, such as `world_size`.
    """
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, digest: digest_of(path, digest)}
        for path in files_in(folder)
    }
    versions = {"python": platform.python_version(), "hf_effi": __version__}
    versions |= {name: version for name in CORE_PACKAGES if (version := version_of(name)) is not None}
    content = {"schema": SCHEMA, "step": step, **facts, "versions": versions, "files": files}
    save_json(folder / MANIFEST, content, indent=1)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """
    Return the manifest of a checkpoint; `None` where there is none.

    Raises:
        ValueError: it is damaged or of a newer version; the text says how.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        content = load_json(path)
    except BrokenFileError as error:
        raise ValueError(f"ends early or is damaged ({error})") from None
    files = content.get("files") if isinstance(content, dict) else None
    good = isinstance(files, dict) and all(
        isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and _inside(name)
        for name, entry in files.items()
    )
    if not good or not isinstance(content.get("step"), int):
        raise ValueError("is damaged (it lists no files of this folder)")
    if content.get("schema") != SCHEMA:
        raise ValueError(
            f"is of version {content.get('schema')!r}, and this hf_effi reads version {SCHEMA}: update it"
        )
    return content


def verify_checkpoint(path: str | Path, level: Level = "content") -> CheckpointReport:
    """
    Look whether a checkpoint is whole.

    With a manifest every file that it lists is compared: its length, and with `level="content"` its digest. Files that
    came later, such as those of a callback's `on_save`, are no concern of it. Without a manifest, as stock Trainers
    write checkpoints, the structure of each file is looked at: headers, directories at the end, shards that an index
    names, an optimizer with its scheduler, the step in `trainer_state.json`. A flipped bit in a tensor of such a
    checkpoint is not found.

    Args:
        path (`str` or `Path`): A `checkpoint-N`.
        level (`str`, *optional*, defaults to `"content"`): `"size"` takes milliseconds at any size; `"content"` reads
            all bytes.

    Returns:
        [`CheckpointReport`]

    Raises:
        ValueError: another level.
        NotADirectoryError: there is no such folder.

    Example:
    ```python
    >>> verify_checkpoint("out/checkpoint-40", "size").problem  # doctest: +SKIP
    'optimizer.pt has 1024 bytes where the manifest says 65536'
    ```
    """
    if level not in ("size", "content"):
        raise ValueError(f'level={level!r} is not one of "size" (milliseconds) and "content" (reads every byte).')
    folder = Path(path)
    if not folder.is_dir():
        raise NotADirectoryError(f"There is no folder {str(folder)!r}. Name a checkpoint-N folder.")
    step = step_of(folder)
    try:
        size = sum(file.stat().st_size for file in files_in(folder))
        manifest, problem = read_manifest(folder), None
    except (ValueError, OSError) as error:
        return CheckpointReport(folder, step, True, f"{MANIFEST} {error}", level, 0)
    if manifest is not None:
        problem = _against(folder, step, manifest, level)
    return CheckpointReport(folder, step, manifest is not None, problem or first_broken(folder), level, size)


def _inside(name: str) -> bool:
    """Return whether a name of a manifest, which may be a stranger's, stays in the folder."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\\" not in name and "\0" not in name


def _against(folder: Path, step: int, manifest: dict[str, Any], level: Level) -> str | None:
    if step >= 0 and manifest["step"] != step:
        return f"{MANIFEST} is of step {manifest['step']}"
    for name, entry in manifest["files"].items():
        path = folder / name
        try:
            size = path.stat().st_size
            if not path.is_file():  # a device of a stranger's making has no end
                return f"{name} is no regular file"
            if size != entry["bytes"]:
                return f"{name} has {size} bytes where the manifest says {entry['bytes']}"
            if level == "content":
                kind: Digest = "sha256" if "sha256" in entry else "crc32"
                if digest_of(path, kind) != entry.get(kind):
                    return f"{name} was changed: its {kind} is not that of the manifest"
        except FileNotFoundError:
            if name not in NOT_NEEDED:
                return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error})"
    return None
