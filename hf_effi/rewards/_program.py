"""What a program may use, and what came of it."""

from __future__ import annotations

import math
import signal
from dataclasses import dataclass, field
from typing import Any, Literal

from ._worker import Blobs

#: how a program ended
Status = Literal["ok", "exit", "signal", "timeout", "memory", "output", "not_started", "lost"]
_MIB = 2**20


@dataclass(frozen=True)
class SandboxLimits:
    """
    What one program may use.

    Args:
        wall_seconds (`float`, *optional*, defaults to 10.0): Time on the clock, for all of its processes.
        cpu_seconds (`int`, *optional*, defaults to 10): CPU time of one process.
        memory_bytes (`int`, *optional*, defaults to 512 MiB): Memory of all processes together, at least 32 MiB.
        address_bytes (`int`, *optional*): Address space of one process; `None` for `memory_bytes`. Runtimes that
            reserve much more than they use (Java, Go, Node) need a large one, such as `2**40`.
        output_bytes (`int`, *optional*, defaults to 5,000,000): Of stdout and stderr together; what is beyond ends
            the program.
        file_bytes (`int`, *optional*, defaults to 16 MiB): Of one file that it writes.
        folder_bytes (`int`, *optional*, defaults to 64 MiB): Of all files that it writes, which lie in memory beside
            `memory_bytes`. Without the guard `leftovers` nothing enforces it.
        processes (`int`, *optional*, defaults to 16): Processes and threads at one time.
        open_files (`int`, *optional*, defaults to 64): Of one process, at least 8.

    Raises:
        ValueError: a limit is out of range.
    """

    wall_seconds: float = 10.0
    cpu_seconds: int = 10
    memory_bytes: int = 512 * _MIB
    address_bytes: int | None = None
    output_bytes: int = 5_000_000
    file_bytes: int = 16 * _MIB
    folder_bytes: int = 64 * _MIB
    processes: int = 16
    open_files: int = 64

    def __post_init__(self) -> None:
        seconds = self.wall_seconds
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0.01 <= seconds <= 1e6:
            raise ValueError(f"wall_seconds={seconds!r} must be a number from 0.01 to 1e6.")
        least = {"memory_bytes": 32 * _MIB, "open_files": 8, "folder_bytes": 4096}
        for name in (
            "memory_bytes",
            "cpu_seconds",
            "output_bytes",
            "file_bytes",
            "folder_bytes",
            "processes",
            "open_files",
        ):
            check_count(name, getattr(self, name), least.get(name, 1))
        if self.address_bytes is not None:
            check_count("address_bytes", self.address_bytes, 32 * _MIB)

    def of_process(self) -> dict[str, Any]:
        """Return what the worker is told."""
        return {
            "wall_seconds": self.wall_seconds,
            "cpu_seconds": self.cpu_seconds,
            "memory_bytes": self.memory_bytes,
            "address_bytes": self.address_bytes or self.memory_bytes,
            "output_bytes": self.output_bytes,
            "file_bytes": self.file_bytes,
            "folder_bytes": self.folder_bytes,
            "processes": self.processes,
            "open_files": self.open_files,
        }


@dataclass(frozen=True)
class ProgramResult:
    """
    What came of a program.

    Args:
        status (`str`): `"ok"`: it ended with exit code 0; `"exit"`: with another one; `"signal"`: a signal ended it;
            `"timeout"`, `"memory"`, `"output"`: it was ended at this limit (an allocation that fails shows as
            `"exit"`); `"not_started"`: it could not be executed, `message` says why; `"lost"`: it took its worker
            along, twice.
        exit_code (`int`, *optional*): Its exit code; `None` where a signal or the sandbox ended it.
        stdout, stderr (`bytes`): What it wrote, cut at the limit.
        seconds, cpu_seconds (`float`): Time on the clock, and CPU time of all its processes.
        message (`str`): What else there is to say.
        files (`dict[str, bytes]`): The files in its folder when it ended, for `keep=True` and `"ok"`. Where they are
            more than half of `folder_bytes`, the status is `"output"`, and there are none.
    """

    status: Status
    exit_code: int | None = None
    stdout: bytes = b""
    stderr: bytes = b""
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    message: str = ""
    files: dict[str, bytes] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether it ended with exit code 0 within its limits."""
        return self.status == "ok"

    @property
    def text(self) -> str:
        """Its stdout as text; bytes that are no UTF-8 are replaced."""
        return self.stdout.decode(errors="replace")

    def describe(self) -> str:
        """Return in one line how it ended."""
        code = "" if self.exit_code is None else f" (exit code {self.exit_code})"
        told = f": {self.message}" if self.message else ""
        return f"{self.status}{code}{told}, after {self.seconds:.2f} s and {self.cpu_seconds:.2f} s of CPU time"


def result_of(answer: dict[str, Any], blobs: Blobs) -> ProgramResult:
    """Return what the answer of a worker means."""
    ended = answer.get("status", 0)
    status: Status = "ok" if ended == 0 else "exit" if ended > 0 else "signal"
    message = f"signal {-ended}" if ended < 0 else ""
    if answer.get("not_started"):
        status, message = "not_started", answer["not_started"]
    elif answer["stopped"]:
        status, message = answer["stopped"], ""
    elif answer.get("why") == "memory":
        status, message = "memory", ""
    elif ended == -signal.SIGXCPU:
        status, message = "timeout", "CPU time"
    elif "not_kept" in answer:
        status, message = "output", answer["not_kept"]
    return ProgramResult(
        status=status,
        exit_code=ended if status in ("ok", "exit") else None,
        stdout=blobs["stdout"],
        stderr=blobs["stderr"],
        seconds=answer.get("seconds", math.nan),
        cpu_seconds=answer.get("cpu_seconds", math.nan),
        message=message,
        files={name.removeprefix("file:"): blob for name, blob in blobs.items() if name.startswith("file:")},
    )


def check_count(name: str, value: Any, least: int = 1) -> int:
    """Like `functional.data.check_count`, without torch: a worker's machine needs none."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= 2**62:
        raise ValueError(f"{name}={value!r} must be an integer of at least {least}.")
    return value
