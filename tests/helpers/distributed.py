"""Run a function under real DDP with gloo, in processes of its own, and bring back what each rank returned."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .collectives import first_difference, read_collectives
from .servers import LAUNCHER, ROOT, Forked, fork_child, hash_seed, kill_group, stop_servers

_SHOWN_CHARACTERS = 6000


class ChildFailure(AssertionError):
    """A child process failed; the message carries the output of every rank."""


def reference_to(function: Callable[..., Any]) -> tuple[str, str, str]:
    """Return (module, qualified name, file) of a top-level function, and raise when a child could not import it."""
    module, name = function.__module__, getattr(function, "__qualname__", "")
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    if not name or "." in name or "<" in name:
        raise ValueError(
            f"{name or function!r} cannot be run in another process. Pass a function defined at the top level of a "
            "test module, not a lambda, method, closure or partial; pass its values as arguments."
        )
    return module, name, file


def child_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a child: offline, one thread, the repository importable, no launcher's variables."""
    env = {k: v for k, v in os.environ.items() if k not in LAUNCHER and not k.startswith(("PYTEST_", "COV_"))}
    paths = [str(ROOT), *filter(None, [env.get("PYTHONPATH")])]
    return {
        **env,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        # A process that children are forked from must not touch CUDA, and must not run pyarrow's memory thread.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        "JE_ARROW_MALLOC_CONF": "background_thread:false",
        **(extra or {}),
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Children:
    """
    The processes of one job: one per rank, each in a session of its own, each with its own output file and hash seed.

    With `world_size=1` there is no process group at all, as in a plain `python script.py`; from 2 on the variables are
    those that `torchrun` sets. A child is forked from the preloaded server of its rank, or is an interpreter of its
    own where `fresh` asks for one or `env` is given: libraries read variables while they are imported.
    """

    def __init__(
        self,
        job: Mapping[str, Any],
        world_size: int,
        directory: Path,
        env: Mapping[str, str] | None = None,
        fresh: bool = False,
    ) -> None:
        self.directory, self.world_size = directory, world_size
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "job.pickle").write_bytes(pickle.dumps(dict(job)))
        port = str(_free_port())
        start = self._start if fresh or env else self._fork
        self.processes: list[subprocess.Popen[bytes] | Forked] = []
        for rank in range(world_size):
            launcher = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                # Else gloo looks up the host's name, which may resolve to an address that nothing listens on.
                "GLOO_SOCKET_IFNAME": "lo" if sys.platform.startswith("linux") else "lo0",
            }
            own = {"PYTHONHASHSEED": str(hash_seed(rank)), **(launcher if world_size > 1 else {}), **(env or {})}
            self.output(rank).touch()
            self.processes.append(start(rank, child_environment(own)))
        try:
            for process in self.processes:
                _ = process.pid  # a timeout counts from here, and not from the imports of a server
        except BaseException:
            stop_servers()
            raise

    def _fork(self, rank: int, env: Mapping[str, str]) -> Forked:
        return fork_child(self.directory, rank, env, ROOT, self.output(rank))

    def _start(self, rank: int, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        with self.output(rank).open("wb") as sink:
            return subprocess.Popen(
                [sys.executable, "-m", "tests.helpers._child", str(self.directory), str(rank)],
                cwd=ROOT,
                env=env,
                stdout=sink,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def output(self, rank: int) -> Path:
        return self.directory / f"rank{rank}.log"

    def kill(self) -> None:
        """SIGKILL every rank with its own children, and wait for them."""
        for process in self.processes:
            if process.poll() is None:
                kill_group(process.pid)
        for process in self.processes:
            process.wait()

    def wait(self, timeout: float, until: Callable[[], bool] | None = None) -> None:
        """
        Return when all ranks ended well, or when `until()` is true.

        Raises:
            ChildFailure: a rank failed (the others are killed at once: they would hang in a collective), or the
                timeout passed.
        """
        deadline = time.monotonic() + timeout
        while True:
            codes = [process.poll() for process in self.processes]
            if until is not None and until():
                return
            if any(codes):
                time.sleep(0.5)  # lets the other ranks write the error that they see themselves
                raise self.failure(f"exit codes {[process.poll() for process in self.processes]}")
            if all(code == 0 for code in codes):
                return
            if time.monotonic() > deadline:
                raise self.failure(f"no end after {timeout:g} s (exit codes so far {codes})")
            time.sleep(0.05)

    def failure(self, reason: str) -> ChildFailure:
        self.kill()
        parts = [f"{self.world_size} process(es): {reason}"]
        if difference := self.unequal_collectives(whole=False):
            parts.append(difference)
        for rank in range(self.world_size):
            text = self.output(rank).read_text(errors="replace").strip()
            shown = text if len(text) <= _SHOWN_CHARACTERS else "[...] " + text[-_SHOWN_CHARACTERS:]
            parts.append(f"--- rank {rank} (PYTHONHASHSEED={hash_seed(rank)}) ---\n{shown or '(no output)'}")
        return ChildFailure("\n".join(parts))

    def unequal_collectives(self, whole: bool) -> str | None:
        """Say where the ranks began to run different collectives, `None` where they agree."""
        files = [self.directory / f"collectives{rank}.txt" for rank in range(self.world_size)]
        return first_difference([read_collectives(path) for path in files], whole)

    def results(self) -> list[Any]:
        found = []
        for rank in range(self.world_size):
            path = self.directory / f"result{rank}.pickle"
            if not path.exists():
                raise self.failure(f"rank {rank} ended without a result")
            found.append(pickle.loads(path.read_bytes()))
        return found


def start_children(function: Callable[..., Any], world_size: int, directory: Path, *args: Any) -> Children:
    """Start `function(*args)` in processes of its own, for a test that signals them; it has to call `kill()`."""
    module, name, file = reference_to(function)
    job = {"module": module, "name": name, "file": file, "args": args, "kwargs": {}}
    return Children(job, world_size, directory)


def run_distributed(
    function: Callable[..., Any],
    world_size: int = 2,
    *args: Any,
    timeout: float = 240.0,
    env: Mapping[str, str] | None = None,
    fresh: bool = False,
    **kwargs: Any,
) -> list[Any]:
    """
    Run `function(*args, **kwargs)` on `world_size` ranks and return each rank's value, by rank.

    Args:
        function (`Callable`):
            A function at the top level of a test module. It reads its rank from the environment, as a training script
            does; `Trainer(args=...(use_cpu=True))` sets up gloo and DDP by itself. Its value must be picklable.
        world_size (`int`, *optional*, defaults to 2):
            Number of processes. 1 runs without a process group.
        args, kwargs:
            Picklable arguments, the same on every rank.
        timeout (`float`, *optional*, defaults to 240):
            Seconds until all ranks are killed.
        env (`Mapping[str, str]`, *optional*):
            Further environment variables; the ranks are interpreters of their own then.
        fresh (`bool`, *optional*, defaults to `False`):
            Start an interpreter for each rank, about 6 s of imports, in place of a fork of a preloaded one: for a
            function that does something before torch, triton or transformers are imported.

    Raises:
        ChildFailure: with the output of every rank; also where ranks ran different collectives of the whole group.
    """
    module, name, file = reference_to(function)
    job = {"module": module, "name": name, "file": file, "args": args, "kwargs": kwargs}
    with tempfile.TemporaryDirectory(prefix="hf_effi_ranks_") as directory:
        children = Children(job, world_size, Path(directory), env, fresh)
        try:
            children.wait(timeout)
            results = children.results()
            if difference := children.unequal_collectives(whole=True):
                raise children.failure(f"each rank came to its end, but {difference}")
            return results
        finally:
            children.kill()
