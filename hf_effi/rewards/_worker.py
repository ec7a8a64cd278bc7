"""
The process that starts programs, one after the other: no thread, nothing of the trainer in it. Standard library only.

The client (`sandbox.py`) sends a message for each program and gets one back. For each program the worker forks a
*keeper*, which prepares the folder, forks the program, watches it, and ends everything that the program started; in a
pid namespace the keeper is process 1, with whose end the kernel ends all others.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import selectors
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from . import _kernel as kernel

#: seconds between two looks at the memory of a program, and that a keeper has to end what it started
_TICK, _GRACE = 0.05, 5.0
_MOST_HEADER = 2**24

Blobs = dict[str, bytes]


def pack(message: dict[str, Any], blobs: Blobs) -> bytes:
    """Return a message as bytes: length of the header, header in JSON, then the blobs."""
    header = json.dumps({**message, "blobs": [(name, len(blob)) for name, blob in blobs.items()]}).encode()
    return b"".join((struct.pack("!I", len(header)), header, *blobs.values()))


def read_message(descriptor: int, deadline: float | None = None) -> tuple[dict[str, Any], Blobs] | None:
    """
    Return the next message of a pipe, `None` at its end.

    Raises:
        TimeoutError: it is not there at `deadline`, on the clock of `time.monotonic`.
    """
    start = _read(descriptor, 4, deadline)
    if start is None:
        return None
    size = struct.unpack("!I", start)[0]
    header = _read(descriptor, size, deadline) if size <= _MOST_HEADER else None
    if header is None:
        return None
    message = json.loads(header)
    blobs: Blobs = {}
    for name, length in message.pop("blobs"):
        blob = _read(descriptor, length, deadline)
        if blob is None:
            return None
        blobs[name] = blob
    return message, blobs


def _unpacked(report: bytes) -> tuple[dict[str, Any], Blobs]:
    """Return the message in what a keeper wrote; nothing where it did not get to its end."""
    size = 4 + struct.unpack("!I", report[:4])[0] if len(report) >= 4 else 5
    if len(report) < size:
        return {}, {}
    message, blobs = json.loads(report[4:size]), {}
    for name, length in message.pop("blobs"):
        blobs[name] = report[size : size + length]
        size += length
    return (message, blobs) if size == len(report) else ({}, {})


def _read(descriptor: int, size: int, deadline: float | None) -> bytes | None:
    parts, left = [], size
    while left:
        if deadline is not None:
            ready = select.poll()  # select.select takes no descriptor above 1023, of which a trainer may have many
            ready.register(descriptor, select.POLLIN)
            if not ready.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError("no answer")
        part = os.read(descriptor, min(left, 1 << 20))
        if not part:
            return None
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of it."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


class Worker:
    """What this process may do, measured by the client before; see `_probe.py`."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.root: bool = config["own_uid"]
        self.pid: bool = config["pid_namespace"]
        self.proc: bool = config["proc"]
        self.private: bool = config["private_root"]
        self.process_limit: str = config["process_limit"]
        self.folder: str = config["folder"]
        with contextlib.suppress(OSError):  # where memory runs out, the trainer is not what the kernel should end
            kernel.tell("/proc/self/oom_score_adj", "1000")
        self.uid, self.lock = kernel.take_free_uid() if self.root else (os.getuid(), None)
        if config["user_namespace"]:
            kernel.enter_user_namespace(self.uid if self.root else None)
        flags = (kernel.CLONE_NEWNS if self.private else 0) | (kernel.CLONE_NEWNET if config["network"] else 0)
        if flags:
            kernel.unshare(flags | kernel.CLONE_NEWUTS)
        if config["user_namespace"] and config["no_more_namespaces"]:
            kernel.forbid_user_namespaces()
        if self.private:
            kernel.enter_private_root(config["readable"], self.proc)
        kernel.adopt_orphans()
        kernel.hide_from_ptrace()

    def run(self, request: dict[str, Any], blobs: Blobs) -> tuple[dict[str, Any], Blobs]:
        """Run one program and return what came of it."""
        out, err, report = os.pipe(), os.pipe(), os.pipe()
        life, kept_life = socket.socketpair()  # the keeper ends when the worker's end is closed, or the worker dies
        stdin = os.memfd_create("stdin")
        write_all(stdin, blobs.pop("stdin"))
        os.lseek(stdin, 0, os.SEEK_SET)
        child = os.fork()
        if child == 0:
            try:
                for descriptor in (out[0], err[0], report[0]):
                    os.close(descriptor)
                life.close()
                self._become_keeper(request, blobs, (stdin, out[1], err[1]), report[1], kept_life)
            finally:
                os._exit(1)
        for descriptor in (out[1], err[1], report[1], stdin):
            os.close(descriptor)
        kept_life.close()
        keeper = struct.unpack("!i", life.recv(4) or struct.pack("!i", child))[0]
        if keeper != child:
            os.waitpid(child, 0)
        try:
            stopped, (stdout, stderr, told) = read_bounded(
                request["limits"],
                (out[0], err[0], report[0]),
                stop=lambda: life.shutdown(socket.SHUT_RDWR),
                kill=lambda: os.kill(keeper, signal.SIGKILL),
            )
        finally:
            for descriptor in (out[0], err[0], report[0]):
                os.close(descriptor)
            life.close()
            os.waitpid(keeper, 0)
            if not self.pid:  # nothing is left, unless the keeper was killed
                self._end_all(keeper)
        answer, kept = _unpacked(told)
        return {**answer, "stopped": stopped}, {"stdout": stdout, "stderr": stderr, **kept}

    def _become_keeper(
        self, request: dict[str, Any], files: Blobs, pipes: tuple[int, int, int], report: int, life: socket.socket
    ) -> None:
        try:
            if self.private or self.pid:
                kernel.unshare(
                    (kernel.CLONE_NEWNS if self.private else 0)
                    | (kernel.CLONE_NEWPID | kernel.CLONE_NEWIPC if self.pid else 0)
                )
            if self.pid:
                inner = os.fork()
                if inner:
                    life.send(struct.pack("!i", inner))
                    os._exit(0)
            else:
                life.send(struct.pack("!i", os.getpid()))
            answer, kept = self._keep(request, files, pipes, life)
        except Exception as error:
            answer, kept = {"setup": f"{type(error).__name__}: {error}"}, {}
        write_all(report, pack(answer, kept))
        os._exit(0)

    def _keep(
        self, request: dict[str, Any], files: Blobs, pipes: tuple[int, int, int], life: socket.socket
    ) -> tuple[dict[str, Any], Blobs]:
        """Prepare, start, watch and end a program; runs in the keeper."""
        os.setsid()
        limits, folder = request["limits"], kernel.BOX
        if self.private:
            kernel.mount_box(limits["folder_bytes"], self.uid)
            if self.proc:
                kernel.mount_proc()
        else:
            folder = tempfile.mkdtemp(prefix="program-", dir=self.folder)
            os.chown(folder, self.uid, -1)
        try:
            kernel.write_files(folder, {n.removeprefix("file:"): f for n, f in files.items()}, self.uid)
            kernel.adopt_orphans()
            started = time.monotonic()
            failure, fail = os.pipe()
            child = os.fork()
            if child == 0:
                try:
                    self._become_program(request, folder, pipes, fail)
                finally:
                    os._exit(127)
            for descriptor in (*pipes, fail):
                os.close(descriptor)
            why = self._watch(child, life, limits["memory_bytes"])
            seconds = time.monotonic() - started
            status = self._end_all(child)
            used = resource.getrusage(resource.RUSAGE_CHILDREN)
            answer = {
                "status": os.waitstatus_to_exitcode(status),
                "why": why,
                "seconds": seconds,
                "cpu_seconds": used.ru_utime + used.ru_stime,
                "not_started": os.read(failure, 4096).decode(errors="replace"),
            }
            kept: Blobs = {}
            if request["keep"] and status == 0 and why is None:
                try:
                    found = kernel.read_files(folder, limits["folder_bytes"] // 2)
                    kept = {f"file:{name}": content for name, content in found.items()}
                except (ValueError, OSError, RecursionError) as error:
                    answer["not_kept"] = f"the folder cannot be kept: {error}"
            return answer, kept
        finally:
            if not self.private:
                shutil.rmtree(folder, ignore_errors=True)

    def _become_program(self, request: dict[str, Any], folder: str, pipes: tuple[int, int, int], fail: int) -> None:
        """Give up everything, then turn into the program; runs in the program's process."""
        try:
            os.setsid()
            for number, descriptor in enumerate(pipes):
                os.dup2(descriptor, number)  # all of them are above 2: the worker keeps its own 0 to 2 open
            os.dup2(fail, 3, inheritable=False)
            kernel.close_from(4)
            fail = 3
            for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
                with contextlib.suppress(OSError):  # the C library keeps two for itself
                    signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            processes = request["limits"]["processes"]
            if self.process_limit == "none":
                processes = None
            elif not self.root:  # the worker and the keeper count too; without a namespace everything of this user
                processes += 2 if self.process_limit == "own" else kernel.tasks_of(self.uid)
            kernel.drop_capabilities()
            kernel.set_limits(request["limits"], processes)
            if self.root:
                kernel.become(self.uid)
            kernel.give_up_privileges()
            os.umask(0o077)
            os.chdir(folder)
            environment = {
                "HOME": folder,
                "TMPDIR": kernel.TEMPORARY if self.private else folder,
                **request["environment"],
            }
            os.execvpe(request["argv"][0], request["argv"], environment)
        except BaseException as error:
            os.write(fail, f"{type(error).__name__}: {error}".encode()[:4000])

    def _watch(self, child: int, life: socket.socket, memory: int) -> str | None:
        """Wait until the program ends, the worker says so (or ends), or its processes hold too much memory."""
        ended = kernel.process_descriptor(child)
        waiting = select.poll()
        waiting.register(ended, select.POLLIN)
        waiting.register(life, select.POLLIN | select.POLLHUP)
        try:
            while True:
                ready = [descriptor for descriptor, _ in waiting.poll(_TICK * 1000)]
                if ended in ready:
                    return None
                if ready:
                    return "stopped"
                mine = self._others()
                if mine is not None and kernel.bytes_held(mine, segments=self.proc) > memory:
                    return "memory"
        finally:
            os.close(ended)

    def _others(self) -> set[int] | None:
        """Return the processes of the program; `None` where /proc does not show them."""
        if not self.proc:
            return None if self.private else kernel.descendants(os.getpid())
        return {int(name) for name in os.listdir("/proc") if name.isdigit() and name != "1"} or None

    def _end_all(self, child: int) -> int:
        """Kill and wait for everything that the program has started; return the status of the program itself."""
        status = -1
        while True:
            if os.getpid() == 1:  # of a pid namespace: these are the program's processes, and nobody else's
                with contextlib.suppress(ProcessLookupError):
                    os.kill(-1, signal.SIGKILL)
            elif self.root:
                killer = os.fork()
                if killer == 0:
                    try:
                        kernel.become(self.uid)  # from here on -1 means this worker's programs
                        os.kill(-1, signal.SIGKILL)
                    finally:
                        os._exit(0)
                os.waitpid(killer, 0)
            else:
                for pid in kernel.descendants(os.getpid()):
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.kill(pid, signal.SIGKILL)
            try:
                while True:
                    pid, found = os.waitpid(-1, 0)
                    if pid == child:
                        status = found
                    if os.getpid() != 1:
                        break  # others may have been started meanwhile
            except ChildProcessError:
                return status


def read_bounded(
    limits: dict[str, Any], pipes: tuple[int, int, int], stop: Callable[[], None], kill: Callable[[], None]
) -> tuple[str, tuple[bytes, bytes, bytes]]:
    """
    Read stdout and stderr of a program within its limits, and a report, until the report's pipe is closed.

    Returns:
        `tuple`: `"timeout"`, `"output"`, or `""` where no limit was reached; what was read of each.
    """
    out, err, report = pipes
    found: dict[int, list[bytes]] = {descriptor: [] for descriptor in pipes}
    printed, most, stopped = 0, limits["output_bytes"], ""
    deadline = time.monotonic() + limits["wall_seconds"]
    with selectors.DefaultSelector() as waiting:
        for descriptor in pipes:
            os.set_blocking(descriptor, False)
            waiting.register(descriptor, selectors.EVENT_READ)
        while report in waiting.get_map():
            now = time.monotonic()
            if now >= deadline or (printed > most and not stopped):
                if stopped:
                    kill()
                else:
                    stopped = "output" if printed > most else "timeout"
                    stop()
                deadline = now + _GRACE
            for key, _ in waiting.select(max(0.0, deadline - now)):
                part = os.read(key.fd, 1 << 16)
                if not part:
                    waiting.unregister(key.fd)
                elif key.fd == report or printed <= most:
                    found[key.fd].append(part)
                printed += len(part) if key.fd != report else 0
    for descriptor in (out, err):  # all who wrote have ended
        with contextlib.suppress(BlockingIOError):
            while printed <= most and (part := os.read(descriptor, 1 << 16)):
                found[descriptor].append(part)
                printed += len(part)
    if printed > most:
        stopped = stopped or "output"
    texts = b"".join(found[out])[:most], b"".join(found[err])[:most]
    return stopped, (*texts, b"".join(found[report]))


def main() -> None:
    """Serve the client until it closes the pipe."""
    os.setsid()
    requests, answers = os.dup(0), os.dup(1)
    nothing = os.open("/dev/null", os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    first = read_message(requests)
    if first is None:
        return
    try:
        worker = Worker(first[0])
    except Exception as error:
        write_all(answers, pack({"failed": f"{type(error).__name__}: {error}"}, {}))
        return
    write_all(answers, pack({"ready": True}, {}))
    trainer, waiting = os.getppid(), select.poll()
    waiting.register(requests, select.POLLIN)
    while True:
        while not waiting.poll(5000):
            if os.getppid() != trainer:  # it was killed, and a process that it forked holds the pipe open
                return
        request = read_message(requests)
        if request is None:
            return
        answer, blobs = worker.run(*request)
        write_all(answers, pack(answer, blobs))


if __name__ == "__main__":
    sys.exit("started by hf_effi.rewards.Sandbox only")
