"""
Who writes a checkpoint while the training goes on: a thread of this process, or a process that outlives it.

`python -m hf_effi.checkpoint.writer N` is the second one; it is started by [`ProcessWriter`] and talks through the
socket N.
"""

from __future__ import annotations

import dataclasses
import mmap
import os
import socket
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any, NoReturn, Protocol

from .commit import Commit
from .staging import Buffers, HostBuffers, Place, SharedBuffers


class Writer(Protocol):
    """Writes one checkpoint at a time."""

    @property
    def buffers(self) -> Buffers:
        """Where the states that it writes are copied to."""

    #: how long the last one took
    seconds: float

    def submit(self, commit: Commit) -> None:
        """Begin to write. The one before has to be waited for first."""

    def wait(self) -> None:
        """Wait for what was submitted, and raise what it raised."""

    def close(self) -> None:
        """Give threads, processes and memory back."""


class ThreadWriter:
    """A thread of this process. Python waits for it at its end; it goes with a process that is killed."""

    def __init__(self) -> None:
        self.buffers: Buffers = HostBuffers()
        self.seconds = 0.0
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def submit(self, commit: Commit) -> None:
        """Begin to write."""
        self._thread = threading.Thread(target=self._run, args=(commit,), name=f"hf_effi checkpoint {commit.step}")
        self._thread.start()

    def wait(self) -> None:
        """Wait for what was submitted, and raise what it raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Give the memory back."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.buffers.close()

    def _run(self, commit: Commit) -> None:
        began = time.monotonic()
        try:
            commit.finish()
        except Exception as error:  # told by `wait`
            self._error = error
        self.seconds = time.monotonic() - began


@dataclasses.dataclass
class _Child:
    process: subprocess.Popen[bytes]
    pipe: Connection[Any, Any]
    #: file -> inode of the memory that it has
    known: dict[str, int] = dataclasses.field(default_factory=dict)


class ProcessWriter:
    """
    A process of its own session, which goes on writing where this process is killed, and ends after that.

    The copies are in shared memory that only the two processes have; nothing of it is left when both have ended.
    """

    #: what the process runs
    module = "hf_effi.checkpoint.writer"

    def __init__(self) -> None:
        self.buffers: SharedBuffers = SharedBuffers()
        self.seconds = 0.0
        self._child: _Child | None = None
        self._running: Commit | None = None

    @property
    def pid(self) -> int | None:
        """Number of the process; `None` where none runs."""
        return None if self._child is None else self._child.process.pid

    def start(self) -> None:
        """Start the process. It takes some seconds to be ready, for which whoever submits does not wait."""
        self._child = self._child or self._started()

    def submit(self, commit: Commit) -> None:
        """Begin to write."""
        child = self._child = self._child or self._started()
        assigned = {field.name: getattr(commit, field.name) for field in dataclasses.fields(commit)}
        del assigned["at"], assigned["held"]
        try:
            for file in commit.writes:
                name = file.memory
                descriptor = self.buffers.descriptor(name)
                inode = os.fstat(descriptor).st_ino
                if child.known.get(name) != inode:
                    child.pipe.send(("memory", name))
                    send_handle(child.pipe, descriptor, child.process.pid)
                    child.known[name] = inode
            child.pipe.send(("commit", assigned))
            # The lock goes along: it is held while the process starts, and after this one is gone.
            if commit.held is None:
                raise ValueError("submit() takes a commit that has begun.")
            send_handle(child.pipe, commit.held, child.process.pid)
            commit.release()
        except OSError as error:
            self._gone(child, commit, error)
        self._running = commit

    def wait(self) -> None:
        """Wait for what was submitted, and raise what it raised."""
        commit, self._running = self._running, None
        if commit is None or (child := self._child) is None:
            return
        try:
            error, self.seconds = child.pipe.recv()
        except (EOFError, OSError) as gone:
            self._gone(child, commit, gone)
        if error is not None:
            raise error

    def close(self) -> None:
        """End the process once it has written what it was given, and give the memory back."""
        if self._child is not None:
            self._child.pipe.close()
            self._child.process.wait()
            self._child = None
        self.buffers.close()

    def _started(self) -> _Child:
        ours, theirs = socket.socketpair()
        with theirs:
            number = theirs.fileno()
            process = subprocess.Popen(
                [sys.executable, "-m", self.module, str(number)],
                pass_fds=(number,),
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        return _Child(process, Connection(ours.detach()))

    def _gone(self, child: _Child, commit: Commit, error: Exception) -> NoReturn:
        code = child.process.wait()
        child.pipe.close()
        self._child = None
        commit.abandon()
        raise OSError(
            f"the process that writes checkpoints ended with exit code {code}"
            + (", as one that the system ended for its memory does" if code == -9 else "")
        ) from error


def _tensors(content: Any, memory: mmap.mmap) -> Any:
    """Return a state with each place replaced by the tensor that is there."""
    if isinstance(content, Place):
        return content.tensor(memory)
    if isinstance(content, dict):
        for name, value in content.items():
            content[name] = _tensors(value, memory)
        return content
    if isinstance(content, (list, tuple)):
        items = [_tensors(value, memory) for value in content]
        return type(content)(*items) if hasattr(content, "_fields") else type(content)(items)
    return content


def _portable(error: Exception) -> Exception:
    """Return an error that another process can make again."""
    if isinstance(error, OSError) and error.errno is not None:
        return OSError(error.errno, error.strerror, error.filename)
    return OSError(f"{type(error).__name__}: {error}")


def serve(pipe: Connection[Any, Any], at: Any = None) -> None:
    """Write the checkpoints that come through a pipe, until the other end is closed or gone."""
    memory: dict[str, mmap.mmap] = {}
    while True:
        try:
            kind, content = pipe.recv()
        except EOFError:
            return
        if kind == "memory":
            number = recv_handle(pipe)
            memory[content] = mmap.mmap(number, 0)
            os.close(number)
            continue
        began, error = time.monotonic(), None
        commit = Commit(**content, held=recv_handle(pipe), **({} if at is None else {"at": at}))
        commit.writes = [
            dataclasses.replace(file, content=_tensors(file.content, memory[file.memory])) for file in commit.writes
        ]
        try:
            commit.finish()
        except Exception as problem:  # told to the trainer
            error = _portable(problem)
        commit.writes = []
        try:
            pipe.send((error, time.monotonic() - began))
        except OSError:  # the trainer is gone; what it asked for is done
            return


def main(arguments: list[str]) -> int:
    """Serve the trainer at the other end of the socket whose number is given."""
    serve(Connection(int(arguments[0])))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
