"""
Two preloaded processes that children are forked from, so that they need not import torch and the rest again: one for
the ranks of even number, one for the others.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
#: what a launcher tells one rank of one job, and no library reads while it is imported
LAUNCHER = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "GLOO_SOCKET_IFNAME",
)
#: whether a server imports anything before its first fork; tests of the servers themselves have no need of it
PRELOAD = True
#: servers, each with a hash seed of its own; two are enough for what a seed decides to differ between ranks
SERVERS = 2
_START_SECONDS = 600.0
_STOP_SECONDS = 30.0


def _first_hash_seed() -> int:
    given = os.environ.get("PYTHONHASHSEED", "random")
    return int(given) if given.isdigit() else random.SystemRandom().randrange(1, 2**32 - 1024)


_FIRST_HASH_SEED = _first_hash_seed()


def hash_seed(rank: int) -> int:
    """
    Return the hash seed of a rank: `PYTHONHASHSEED + rank % 2`; a random number where the variable is not set.

    Ranks need different seeds: under one seed the order of a set is the same everywhere, and code that lets it decide
    what a rank does would pass. Of four ranks two and two have the same, and are forked from the same server.
    """
    return (_FIRST_HASH_SEED + rank % SERVERS) % 2**32


class Server:
    """
    The server of every second rank: an interpreter that has imported what children need, and forks one at a request.

    It runs no thread, no process group and no CUDA. It ends, and kills its children, once this process closes the
    connection or dies.
    """

    def __init__(self, rank: int, env: Mapping[str, str]) -> None:
        self.rank, self.env, self._owner = rank, dict(env), os.getpid()
        self._log = tempfile.TemporaryFile(prefix=f"hf_effi_server{rank}_")
        self._connection, theirs = Pipe()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.helpers._server", str(theirs.fileno()), str(int(PRELOAD))],
                cwd=ROOT,
                env=self.env,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C in a terminal is for the session of tests alone
            )
        self._numbers = itertools.count()
        self._pids: dict[int, int] = {}
        self._codes: dict[int, int] = {}

    def serves(self, env: Mapping[str, str]) -> bool:
        """
        Whether a child with these variables may be forked from this server.

        Libraries read variables while they are imported; what has been imported under others would not notice.
        """
        own = {name: value for name, value in env.items() if name not in LAUNCHER}
        return own == self.env and os.getpid() == self._owner and self.process.poll() is None

    def ask(self, directory: Path, rank: int, env: Mapping[str, str], cwd: Path, output: Path) -> int:
        """Ask for a child that runs the job of `directory`; return its number, to be given to the methods below."""
        number = next(self._numbers)
        with self._explained():
            self._connection.send((number, str(directory), rank, dict(env), str(cwd), str(output)))
        return number

    def pid(self, number: int) -> int:
        """Return the process id of a child; the first call waits for the imports of the server."""
        deadline = time.monotonic() + _START_SECONDS
        while number not in self._pids:
            if not self._receive(0.05) and time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"the server of rank {self.rank} did not answer in {_START_SECONDS:g} s.")
        return self._pids[number]

    def code(self, number: int, wait: bool = False) -> int | None:
        """Return the exit code of a child as `subprocess.Popen` has it, `None` while it runs."""
        while number not in self._codes:
            if not self._receive(0.05 if wait else 0.0) and not wait:
                return None
        return self._codes[number]

    def stop(self) -> None:
        """End the server with all its children, and wait for it."""
        if os.getpid() != self._owner:
            return
        # Not only closed: another process that was forked from this one may hold a copy.
        with socket.socket(fileno=os.dup(self._connection.fileno())) as both_ends:
            both_ends.shutdown(socket.SHUT_RDWR)
        self._connection.close()
        for number in self._pids:
            self._codes.setdefault(number, -signal.SIGKILL)
        try:
            self.process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._log.close()

    def _receive(self, timeout: float) -> bool:
        with self._explained():
            if not self._connection.poll(timeout):
                return False
            event, number, value = self._connection.recv()
        (self._pids if event == "started" else self._codes)[number] = value
        return True

    @contextlib.contextmanager
    def _explained(self) -> Any:
        try:
            yield
        except (EOFError, OSError) as error:
            code = self.process.wait()
            self._log.seek(0)
            said = self._log.read().decode(errors="replace").strip()
            raise RuntimeError(
                f"the server of rank {self.rank} ended with exit code {code} and said:\n{said}"
            ) from error


class Forked:
    """A child that a server forked, with what [`tests.helpers.distributed.Children`] uses of `subprocess.Popen`."""

    def __init__(self, server: Server, number: int) -> None:
        self._server, self._number = server, number

    @property
    def pid(self) -> int:
        return self._server.pid(self._number)

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        return self._server.code(self._number)

    def wait(self) -> int | None:
        return self._server.code(self._number, wait=True)


_SERVERS: dict[int, Server] = {}


def fork_child(directory: Path, rank: int, env: Mapping[str, str], cwd: Path, output: Path) -> Forked:
    """
    Return a child of the server for this rank, which is started here where there is none for these variables.

    Args:
        directory (`Path`): Where the job lies that [`tests.helpers._child`] runs.
        rank (`int`): Which server, by its remainder, and what the child is told.
        env (`Mapping[str, str]`): All variables of the child.
        cwd (`Path`): Where it runs.
        output (`Path`): The file that takes its output.
    """
    place = rank % SERVERS
    server = _SERVERS.get(place)
    if server is None or not server.serves(env):
        if server is not None:
            server.stop()
        server = _SERVERS[place] = Server(place, {name: value for name, value in env.items() if name not in LAUNCHER})
    return Forked(server, server.ask(directory, rank, env, cwd, output))


def stop_servers() -> None:
    """End all servers of this process."""
    while _SERVERS:
        _SERVERS.popitem()[1].stop()


def server_pids() -> list[int]:
    """Return the process ids of the servers that run, by rank."""
    return [server.process.pid for _, server in sorted(_SERVERS.items())]


def kill_group(pid: int) -> None:
    """SIGKILL a child with its own children."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


atexit.register(stop_servers)
