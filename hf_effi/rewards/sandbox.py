"""A sandbox for programs that a model wrote: limits, an empty folder, no network; it says what it guards against."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from ._container import Container
from ._isolation import GUARDS, Isolation, probe_isolation, refuse_if_weaker
from ._pool import Pool
from ._program import ProgramResult, SandboxLimits, check_count

_MIB = 2**20

#: what a program has of its own, or not at all
_NOT_SHOWN = ("/proc", "/dev", "/sys", "/box")


class Sandbox:
    """
    Runs programs that nobody has read, such as those that a model wrote.

    Each program gets a private empty folder, a bare environment, no descriptors but stdin, stdout and stderr, limits
    on everything in [`SandboxLimits`], and, by the namespaces of Linux, no network, no sight of other processes, and
    no file but its own and those of the system. As root it runs as a user of its own, whom limits on processes bind.
    Whatever it starts ends with it. What the machine allows is measured, and where a guard is missing, the sandbox
    refuses, unless `accept` gives it up by name. `print(sandbox.describe())` says what holds.

    It does not guard against bugs of the kernel, nor against one program learning how busy the machine is. Where
    programs come from an adversary rather than from a model in training, run the trainer in a virtual machine too.

    Programs run in `workers` processes that are started at first use and serve one program at a time; they hold
    nothing of the trainer, and one that dies is replaced. The object pickles without them.

    Args:
        limits (`SandboxLimits`, *optional*): Of every program that is run without limits of its own.
        workers (`int`, *optional*, defaults to 2): Programs that run at one time.
        accept (`Sequence[str]`, *optional*): Guards that may be missing: `"network"`, `"files"`, `"leftovers"`,
            `"processes"`, `"parent"`, `"memory"`.
        readable (`Sequence[str]`, *optional*): Folders that programs may read, beside those of the system (`/usr`,
            `/bin`, `/lib`) and of the Python interpreter.
        environment (`Mapping[str, str]`, *optional*): Variables beside `PATH`, `HOME`, `TMPDIR` and `LANG`.
        container (`Sequence[str]`, *optional*): A command that runs programs in a container in place of all this. The
            program's command is appended. `{folder}` stands for a folder of this machine with its files, and must be
            there; `{name}` for a new name, `{memory_bytes}` and `{processes}` for the limits. What it guards against
            is what the command says, such as `--network=none`; limits on time and output stay.
        container_stop (`Sequence[str]`, *optional*): A command with `{name}` that ends a container at a limit, such as
            `["podman", "kill", "{name}"]`.

    Raises:
        RefusedError: the machine gives less isolation than asked for; the message names what is missing.
        ValueError, TypeError: an argument is out of range.

    Example:
    ```python
    >>> sandbox = Sandbox(accept=tuple(GUARDS))  # whatever the machine; leave accept out for your own runs
    >>> result = sandbox.run(["python3", "-c", "print(6 * 7)"])
    >>> result.status, result.text
    ('ok', '42\n')
    >>> sandbox.close()
    ```
    """

    def __init__(
        self,
        limits: SandboxLimits | None = None,
        *,
        workers: int = 2,
        accept: Sequence[str] = (),
        readable: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        container: Sequence[str] | None = None,
        container_stop: Sequence[str] | None = None,
    ) -> None:
        if limits is not None and not isinstance(limits, SandboxLimits):
            raise TypeError(f"limits must be a SandboxLimits, got {type(limits).__name__} {limits!r}.")
        self.limits = limits or SandboxLimits()
        self.workers = check_count("workers", workers)
        self.accept, self.readable = _texts("accept", accept), _texts("readable", readable)
        for path in self.readable:
            if not os.path.isdir(path) or os.path.abspath(path).startswith(_NOT_SHOWN) or os.path.abspath(path) == "/":
                raise ValueError(
                    f"readable={self.readable!r}: {path!r} must be a folder, and neither / nor one in "
                    f"{', '.join(_NOT_SHOWN)}."
                )
        unknown = [name for name in self.accept if name not in GUARDS]
        if unknown:
            raise ValueError(f"accept={self.accept!r}: {unknown[0]!r} is no guard. Guards: {', '.join(GUARDS)}.")
        self.environment = {
            "PATH": os.pathsep.join((_folder_of_python(), "/usr/local/bin", "/usr/bin", "/bin")),
            "LANG": "C.UTF-8",
            **_variables(environment),
        }
        self.container = None if container is None else Container(container, container_stop)
        if container is None and container_stop is not None:
            raise ValueError("container_stop= ends containers, and there is no container=.")
        if container is not None and (accept or readable):
            raise ValueError("with container= the container isolates: leave accept= and readable= out.")
        self._pools: dict[int, Pool] = {}
        self._lock = threading.Lock()
        if self.container is None:
            refuse_if_weaker(probe_isolation(self.readable), self.accept)

    @property
    def isolation(self) -> Isolation | None:
        """What this machine allows; `None` with a container, of which nothing is measured."""
        return None if self.container is not None else probe_isolation(self.readable)

    def describe(self) -> str:
        """Return in sentences what the sandbox guards against on this machine, and what not."""
        limits, isolation = self.limits, self.isolation
        bounded = (
            f"A program has {limits.wall_seconds:g} s, {limits.memory_bytes / _MIB:.0f} MiB of memory, "
            f"{limits.output_bytes / 1e6:g} MB of output, {limits.folder_bytes / _MIB:.0f} MiB of files and "
            f"{limits.processes} processes; it inherits neither environment nor descriptors."
        )
        if isolation is None:
            return f"{bounded}\nIt runs by {self.container}: that command says what else holds; nothing is measured."
        end = "- It may use bugs of the kernel, and learn how busy the machine is."
        return f"{bounded}\n{isolation.describe()}\n{end}"

    def run(
        self,
        argv: Sequence[str],
        stdin: str | bytes = b"",
        files: Mapping[str, str | bytes] | None = None,
        *,
        limits: SandboxLimits | None = None,
        keep: bool = False,
    ) -> ProgramResult:
        """
        Run a program and wait for it.

        Args:
            argv (`Sequence[str]`): The program, looked for in `PATH` or in its folder as `"./name"`, and arguments.
            stdin (`str` or `bytes`, *optional*): What it reads.
            files (`Mapping[str, str | bytes]`, *optional*): Relative path -> content of what its folder holds; all are
                executable.
            limits (`SandboxLimits`, *optional*): In place of the sandbox's.
            keep (`bool`, *optional*, defaults to `False`): Return the files of the folder when it ends with "ok".

        Raises:
            ValueError: a path leads out of the folder, or the files do not fit into it.
            OSError: the sandbox itself could not be set up.
        """
        return self._submit(argv, stdin, files, limits, keep).result()

    async def run_async(
        self,
        argv: Sequence[str],
        stdin: str | bytes = b"",
        files: Mapping[str, str | bytes] | None = None,
        *,
        limits: SandboxLimits | None = None,
        keep: bool = False,
    ) -> ProgramResult:
        """Like [`~Sandbox.run`], beside whatever else the event loop has; at most `workers` programs at one time."""
        return await asyncio.wrap_future(self._submit(argv, stdin, files, limits, keep))

    def _submit(
        self, argv: Any, stdin: Any, files: Any, limits: Any, keep: bool
    ) -> concurrent.futures.Future[ProgramResult]:
        limits = self.limits if limits is None else limits
        command = _texts("argv", argv)
        if not command or any("\0" in part for part in command):
            raise ValueError(f"argv={argv!r} must name a program, without NUL characters.")
        blobs = {"stdin": _bytes(stdin)}
        for name, content in (files or {}).items():
            blobs[f"file:{_checked_path(name)}"] = _bytes(content)
        size = sum(len(blob) for name, blob in blobs.items() if name != "stdin")
        if size > limits.folder_bytes or any(len(blob) > limits.folder_bytes for blob in blobs.values()):
            raise ValueError(f"{size:,} bytes of files, or stdin, are more than folder_bytes={limits.folder_bytes:,}.")
        request = {
            "argv": list(command),
            "limits": limits.of_process(),
            "environment": self.environment,
            "keep": bool(keep),
        }
        return self._pool().submit(request, blobs)

    def _pool(self) -> Pool:
        """Return the pool of this process: a fork has the parent's, of which it must not use anything."""
        with self._lock:
            pool = self._pools.get(os.getpid())
            if pool is None:
                if self.container is None:  # a pickled sandbox may have come to another machine
                    refuse_if_weaker(probe_isolation(self.readable), self.accept)
                pool = self._pools[os.getpid()] = Pool(self)
        return pool

    def close(self) -> None:
        """End the workers; the next program starts new ones."""
        with self._lock:
            pool = self._pools.pop(os.getpid(), None)
        if pool is not None:
            pool.close()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_pools", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._pools, self._lock = {}, threading.Lock()


def _folder_of_python() -> str:
    return os.path.dirname(os.path.realpath(sys.executable))


def _texts(name: str, values: Any) -> tuple[str, ...]:
    if isinstance(values, (str, bytes)) or not all(isinstance(value, str) for value in values):
        raise TypeError(f"{name}={values!r} must be a list of texts.")
    return tuple(values)


def _variables(environment: Mapping[str, str] | None) -> dict[str, str]:
    for name, value in (environment or {}).items():
        if not isinstance(name, str) or not isinstance(value, str) or "\0" in name + value or "=" in name or not name:
            raise ValueError(f"environment: {name!r}={value!r} must be a name and a text, without NUL characters.")
    return dict(environment or {})


def _bytes(content: str | bytes) -> bytes:
    return content.encode(errors="replace") if isinstance(content, str) else bytes(content)


def _checked_path(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or ".." in path.parts or "\0" in name:
        raise ValueError(f"files: {name!r} must be a path inside the folder, such as 'main.py' or 'src/main.rs'.")
    return str(path)
